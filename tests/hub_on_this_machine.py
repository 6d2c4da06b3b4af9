"""A Hugging Face hub in miniature: serves folders as repositories, and remembers what it was asked for.

Only what huggingface_hub asks of it: a model's information, a file's metadata (HEAD) and its bytes (GET).
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    def __init__(self, repositories: dict[str, Path]):
        self.repositories, self.asked = repositories, []
        self.commit, self.moves = COMMIT, False  # moves: the branch has a new commit after every file
        hub = self

        class Answers(BaseHTTPRequestHandler):
            def log_message(self, *_) -> None: ...

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                parts = unquote(self.path.split("?")[0]).strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    return self.about("/".join(parts[2:4]), parts[4:], body)
                repository, file = "/".join(parts[:2]), "/".join(parts[4:])
                folder = hub.repositories.get(repository)
                if folder is None:
                    return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"", body)
                path = folder / file
                if not path.is_file():
                    headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                    return self.send(404, headers, b"", body)
                commit = parts[3] if len(parts[3]) == 40 else hub.commit
                if body:
                    hub.asked.append(file)
                    hub.commit = f"{len(hub.asked):040x}" if hub.moves else COMMIT
                content = path.read_bytes()
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.send(200, {"ETag": etag, "X-Repo-Commit": commit}, content, body)

            def about(self, repository: str, rest: list[str], body: bool) -> None:
                folder = hub.repositories.get(repository)
                if folder is None:
                    return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
                files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                if rest[:1] == ["tree"]:
                    tree = [
                        {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files
                    ]
                    return self.send(200, {}, json.dumps(tree).encode(), body)
                about = {"id": repository, "sha": hub.commit, "siblings": [{"rfilename": f} for f in files]}
                self.send(200, {}, json.dumps(about).encode(), body)

            def send(self, status: int, headers: dict, content: bytes, body: bool) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
