"""A judge behind an address that speaks OpenAI's chat format: HPSv3, UnifiedReward or any model that sees pictures.

    url: http://127.0.0.1:8000/v1/chat/completions
    model: Qwen2.5-VL-7B-Instruct
    question: "How well does this picture show: {prompt}? Answer with one number from {low} to {high}."
    low: 0
    high: 10

Which number of an answer is the score says answers.py: `N/10` if it stands there, else the only number on the scale;
an answer without one is asked for again, then counted, said, and no score (NaN). Other keys: see Settings. What the
answers will cost at most is said before the first request, and with max_cost a dearer judging is refused. The picture
goes along as a PNG in the message.
"""

import base64
import concurrent.futures
import email.utils
import http.client
import json
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from inpo_fast.data.images import png
from inpo_fast.judges import Scores
from inpo_fast.judges.answers import score_in
from inpo_fast.judges.http_settings import address_and_headers, read_settings
from inpo_fast.judges.post import TooLarge, TooLate, post
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.masking import masked, without_secrets
from inpo_fast.runtime.record_store import digest

log = logging.getLogger(__name__)

LONGEST_WAIT = 30.0  # seconds between two tries, whatever the server asks for
DECIDES = ("url", "model", "question", "low", "high", "max_tokens")  # what a score depends on
RULE = 3  # of answers.py; with another one, kept scores are those of another judge
PASSES = (408, 425, 429)  # statuses below 500 that are worth another try
ENOUGH = 20  # answers from which on the share of the unclear ones says something


class HttpJudge:
    def __init__(self, path: Path):
        self.settings = how = read_settings(path)
        self.address, self.headers = address_and_headers(how, path)
        self.name, self.tie = f"http:{how.model}", how.tie
        own = {name: asdict(how)[name] for name in DECIDES}
        own |= {"url": without_secrets(how.url), "rule": RULE}  # the same judge with another key is the same
        self.id = f"{self.name} {digest(json.dumps(own).encode())}"
        self.asked = self.unclear = 0

    def check(self, prompts: Sequence[str]) -> None:
        """Any text will do."""

    def cost(self, n: int) -> str:
        """What n scores cost at most, in words. UserError beyond max_cost."""
        how = self.settings
        most = n * (1 + how.retries) * how.price
        text = f"{n:,} requests to {masked(how.url)} ({how.model})"
        if how.price:
            text += f", {n * how.price:,.2f} in all at {how.price:g} each, {most:,.2f} if every one is tried again"
        if how.max_cost is not None and n * how.price > how.max_cost:
            raise UserError(f"judge {self.name}: {text}; more than its max_cost {how.max_cost:g}")
        return text

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        """NaN where no try brought a clear answer. UserError where the server does not answer as it should, or more
        than max_unclear of all answers so far are unclear."""
        stop = threading.Event()
        with ThreadPoolExecutor(self.settings.parallel) as pool:
            futures = [pool.submit(self._ask, *pair, stop) for pair in zip(images, prompts, strict=True)]
            try:
                for future in concurrent.futures.wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()  # a refusal of any of them ends the waits of all
                answers = [future.result() for future in futures]
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        self._count([said for said in answers if isinstance(said, str)], len(answers))
        return Scores(np.array([math.nan if isinstance(said, str) else said for said in answers], dtype=np.float64))

    def _count(self, unclear: Sequence[str], asked: int) -> None:
        self.asked, self.unclear = self.asked + asked, self.unclear + len(unclear)
        if not unclear:
            return
        how = self.settings
        said = f"{len(unclear)} of {asked} answers hold no clear score from {how.low:g} to {how.high:g}"
        said += f", such as {masked(unclear[0][:80])!r}"
        if self.unclear > how.max_unclear * max(self.asked, ENOUGH):
            raise UserError(
                f"judge {self.name}: {said}; with those before {self.unclear} of {self.asked}, more than its "
                f"max_unclear {how.max_unclear:g}: ask for one number only, or raise max_tokens where answers are cut"
            )
        log.warning("judge %s: %s; these pictures have no score", self.name, said)

    def _ask(self, image: np.ndarray, prompt: str, stop: threading.Event) -> float | str:
        """The score, or the last answer where none was clear."""
        how, wait, problem, answer = self.settings, 0.5, "", None
        for attempt in range(1 + how.retries):
            if attempt and answer is None:
                stop.wait(min(wait, LONGEST_WAIT))
                wait *= 2
            if stop.is_set():
                break
            try:
                reply = post(self.address, self._request(image, prompt), self.headers, how.timeout)
            except TooLarge as refused:
                raise UserError(f"judge {self.name}: {masked(how.url)}: {refused}; is it a chat address?") from refused
            except (TooLate, OSError, http.client.HTTPException) as failed:  # no connection, cut off
                answer, problem = None, str(getattr(failed, "reason", failed)) or type(failed).__name__
                continue
            if reply.status >= 300:
                problem, answer = f"HTTP {reply.status} {_line(reply.reason)}: {_line(reply.content)}", None
                if reply.status not in PASSES and reply.status < 500:
                    raise UserError(f"judge {self.name}: {how.url}: {problem}; mend the judge's file")
                wait = _seconds(reply.headers.get("Retry-After"), wait)
                continue
            try:
                answer, cut = _answer(reply.content)
            except (ValueError, KeyError, IndexError, TypeError, RecursionError):
                kind = reply.headers.get("Content-Encoding") or reply.headers.get_content_type()
                answer, problem = None, f"not a chat completion ({_line(kind)}): {_line(reply.content)}"
                continue
            value = None if cut else score_in(answer, how.low, how.high)
            if value is not None:
                return value
        if answer is not None:
            return answer
        raise UserError(
            f"judge {self.name}: {how.url}: no score for {prompt[:80]!r} after {1 + how.retries} tries (last: "
            f"{problem}); what was scored before is kept where a cache is used: repeat the command when it answers"
        )

    def _request(self, image: np.ndarray, prompt: str) -> bytes:
        how = self.settings
        text = how.question
        # the prompt last: what stands in it is not filled in
        for name, value in (("low", f"{how.low:g}"), ("high", f"{how.high:g}"), ("prompt", prompt)):
            text = text.replace("{" + name + "}", value)
        address = "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": address}}]
        body = {"model": how.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        return json.dumps(body | {"max_tokens": how.max_tokens}).encode()


def _answer(content: bytes) -> tuple[str, bool]:
    """What the model said, "" where that is no text; whether it was cut off behind a number, which may go on."""
    choice = json.loads(content)["choices"][0]
    said = choice["message"]["content"]
    if isinstance(said, list):  # of parts, as in the question
        said = "".join(part["text"] for part in said if isinstance(part, dict) and isinstance(part.get("text"), str))
    said = said if isinstance(said, str) else ""
    return said, choice.get("finish_reason") == "length" and said[-1:] in tuple("0123456789./,-")


def _line(text: str | bytes) -> str:
    """Its first hundred characters, in one line."""
    text = text[:400].decode("utf-8", "replace") if isinstance(text, bytes) else text
    return "".join(c if c.isprintable() else " " for c in text)[:100].strip()


def _seconds(header: str | None, otherwise: float) -> float:
    """What Retry-After asks for, a number or a date."""
    try:
        asked = float(header)
    except (TypeError, ValueError):
        try:
            asked = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError, AttributeError):  # absent, or neither
            return otherwise
    return max(0.0, asked) if math.isfinite(asked) else otherwise
