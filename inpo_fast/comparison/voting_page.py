"""The page on which people vote blind on pairs of pictures, and its server.

On this machine only (127.0.0.1); which side is whose is drawn and never sent to the page.
"""

import html
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from inpo_fast.comparison.votes import Contradiction, Votes
from inpo_fast.data.pair import BadPair
from inpo_fast.runtime.errors import UserError

LARGEST_FORM = 1000  # bytes
KINDS = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"RIFF", "image/webp"), (b"GIF8", "image/gif"))
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{done} of {total} voted</title><style>
body {{ font: 17px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem; text-align: center;
  overflow-wrap: anywhere; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }}
.pair button {{ padding: .4rem; }}
img {{ display: block; width: 100%; max-height: 68vh; object-fit: contain; image-rendering: {rendering}; }}
button {{ font: inherit; padding: .5rem 1.2rem; border: 2px solid #8888; border-radius: .5rem; background: none;
  color: inherit; cursor: pointer; }}
button:hover, button:focus-visible {{ border-color: #0067ab; }}
.more {{ margin-top: .8rem; display: flex; gap: .6rem; justify-content: center; flex-wrap: wrap; }}
progress {{ width: 100%; }} .note {{ opacity: .7; font-size: .85rem; }}
</style></head><body>
<progress max="{total}" value="{done}"></progress>
{body}
<form method="post" action="/undo"><input type="hidden" name="token" value="{token}">
<div class="more"><button id="undo">undo the last vote (u)</button></div></form>
<p class="note">{done} of {total}; every vote is saved at once.</p>
<script nonce="{nonce}">
const keys = {{ArrowLeft: "left", ArrowRight: "right", t: "tie", s: "skip", u: "undo"}};
addEventListener("keydown", e => {{ const b = document.getElementById(keys[e.key]); if (b && !e.repeat) b.click(); }});
</script></body></html>"""
BODY = """<p id="prompt">{prompt}</p>
<form method="post" action="/vote"><input type="hidden" name="token" value="{token}">
<input type="hidden" name="case" value="{number}">
<div class="pair">
<button id="left" name="choice" value="left" aria-label="the left picture is better">
<img src="/image/{number}/0" alt="left"></button>
<button id="right" name="choice" value="right" aria-label="the right picture is better">
<img src="/image/{number}/1" alt="right"></button>
</div>
<div class="more"><button id="tie" name="choice" value="tie">no difference (t)</button>
<button id="skip" name="choice" value="skip">skip (s)</button></div></form>"""
THANKS = "<h1>Thank you.</h1><p>All pairs have a vote; the result is in {output}.</p>"


class Server(ThreadingHTTPServer):
    """votes, and the token that every form must send back: another page in the same browser cannot vote."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], votes: Votes, pixelated: bool = False):
        super().__init__(address, Handler)
        self.votes, self.token, self.pixelated = votes, secrets.token_urlsafe(16), pixelated


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30

    def do_GET(self) -> None:
        if not self._is_asked_by_name():
            return
        if self.path == "/":
            self._page()
        elif self.path.startswith("/image/"):
            self._image()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_asked_by_name():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST_FORM:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        form = {name: values[0] for name, values in parse_qs(self.rfile.read(int(length)).decode("latin-1")).items()}
        if not secrets.compare_digest(form.get("token", "").encode(), self.server.token.encode()):
            self.send_error(HTTPStatus.FORBIDDEN, "open the page again")
            return
        try:
            if self.path == "/vote":
                self.server.votes.vote(int(form.get("case", "")), form.get("choice", ""))
            elif self.path == "/undo":
                self.server.votes.undo()
            else:
                raise ValueError(self.path)
        except ValueError as problem:
            if isinstance(problem, Contradiction):
                self.send_error(HTTPStatus.CONFLICT, explain=f"the vote was not saved: {problem}")
            elif isinstance(problem, UserError):
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(problem))
            else:
                self.send_error(HTTPStatus.BAD_REQUEST)
            return
        except OSError as problem:  # the disk is full: nobody must think the vote was kept
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=f"the vote was not saved: {problem.strerror}")
            return
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _is_asked_by_name(self) -> bool:
        """A foreign page whose name was made to point to this machine sends its own name along."""
        own = str(self.server.server_address[0])
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if own in ("127.0.0.1", "::1") and host not in ("127.0.0.1", "localhost", "[::1]"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return False
        return True

    def _page(self) -> None:
        votes, nonce = self.server.votes, secrets.token_urlsafe(12)
        number = votes.next()
        if number is None:
            body = THANKS.format(output=html.escape(str(votes.output)))
        else:
            prompt = html.escape(votes.cases[number].prompt)
            body = BODY.format(prompt=prompt, number=number, token=self.server.token)
        rendering = "pixelated" if self.server.pixelated else "auto"
        counts = {"done": votes.done, "total": len(votes.cases), "rendering": rendering}
        page = PAGE.format(body=body, token=self.server.token, nonce=nonce, **counts).encode()
        rules = f"default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'"
        self._send(page, "text/html; charset=utf-8", f"{rules}; form-action 'self'; frame-ancestors 'none'")

    def _image(self) -> None:
        _, _, number, side = [*self.path.split("/"), "", ""][:4]
        votes = self.server.votes
        if not number.isdigit() or int(number) >= len(votes.cases) or side not in ("0", "1"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            content = votes.cases[int(number)].images[int(side)]()
        except (OSError, BadPair, UserError) as problem:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(problem))
            return
        kind = next((kind for start, kind in KINDS if content.startswith(start)), "application/octet-stream")
        self._send(content, kind, "default-src 'none'")

    def _send(self, content: bytes, kind: str, policy: str) -> None:
        self.send_response(HTTPStatus.OK)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": policy}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments) -> None:
        """Not a line for every picture."""
