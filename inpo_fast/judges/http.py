"""A judge behind an address that speaks OpenAI's chat format: HPSv3, UnifiedReward or any model that sees pictures.

    url: http://127.0.0.1:8000/v1/chat/completions
    model: Qwen2.5-VL-7B-Instruct
    question: "How well does this picture show: {prompt}? Answer with one number from {low} to {high}."
    low: 0
    high: 10

The first number of the answer is the score. Other keys: see Settings. What the answers will cost at most is said before
the first request, and with max_cost a dearer judging is refused. The picture goes along as a PNG in the message.
"""

import base64
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import yaml

from inpo_fast.data.images import png
from inpo_fast.judges import Scores
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.record_store import digest

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
LONGEST_WAIT = 30.0  # seconds between two tries
DECIDES = ("url", "model", "question", "low", "high", "max_tokens")  # what a score depends on
QUESTION = (
    "Rate how well this picture shows the following description and how good it looks. Answer with one number from "
    "{low} to {high} and nothing else. Description: {prompt}"
)


@dataclass(frozen=True)
class Settings:
    """The judge's YAML file."""

    url: str
    model: str
    question: str = QUESTION  # {prompt}, {low} and {high} are filled in
    low: float = 0.0
    high: float = 10.0
    key_env: str | None = None  # name of the environment variable that holds the key
    timeout: float = 60.0  # seconds of one try
    retries: int = 4  # after the first try; waits of 0.5, 1, 2, … seconds, or as the server asks
    parallel: int = 8  # requests at a time
    max_tokens: int = 16  # of an answer
    price: float = 0.0  # of one request, in your currency
    max_cost: float | None = None  # refuse to begin where the requests would cost more
    tie: float = 1e-6  # scores that differ by less are a tie


class HttpJudge:
    def __init__(self, path: Path):
        self.settings = how = read_settings(path)
        self.name, self.tie = f"http:{how.model}", how.tie
        own = asdict(how)
        self.id = f"{self.name} {digest(json.dumps({name: own[name] for name in DECIDES}).encode())}"
        self.headers = {"Content-Type": "application/json"}
        if how.key_env is not None:
            if not (key := os.environ.get(how.key_env)):
                raise UserError(f"{path}: key_env: no {how.key_env} in the environment; set it to your key")
            self.headers["Authorization"] = f"Bearer {key}"
        self.opener = urllib.request.build_opener(_NoRedirect)  # it would carry the key elsewhere

    def check(self, prompts: Sequence[str]) -> None:
        """Any text will do."""

    def cost(self, n: int) -> str:
        """What n scores cost at most, in words. UserError beyond max_cost."""
        how = self.settings
        most = n * (1 + how.retries) * how.price
        text = f"{n:,} requests to {how.url} ({how.model})"
        if how.price:
            text += f", {n * how.price:,.2f} in all at {how.price:g} each, {most:,.2f} if every one is tried again"
        if how.max_cost is not None and n * how.price > how.max_cost:
            raise UserError(f"judge {self.name}: {text}; more than its max_cost {how.max_cost:g}")
        return text

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        with ThreadPoolExecutor(self.settings.parallel) as pool:
            futures = [pool.submit(self._ask, *pair) for pair in zip(images, prompts, strict=True)]
            try:
                return Scores(np.array([future.result() for future in futures], dtype=np.float64))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, image: np.ndarray, prompt: str) -> float:
        how, wait, problem = self.settings, 0.5, ""
        for attempt in range(1 + how.retries):
            if attempt:
                time.sleep(min(wait, LONGEST_WAIT))
                wait *= 2
            try:
                answer = self._request(image, prompt)
                return self._number(answer)
            except _Unclear as unclear:
                problem = str(unclear)
            except urllib.error.HTTPError as refused:
                said = refused.read(300).decode("utf-8", "replace").strip()
                problem = f"HTTP {refused.code} {refused.reason}: {said}".splitlines()[0]
                if refused.code != 429 and refused.code < 500:
                    raise UserError(f"judge {self.name}: {how.url}: {problem}; mend the judge's file") from refused
                wait = _seconds(refused.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException) as failed:  # no connection, timeout, cut off
                problem = str(getattr(failed, "reason", failed)) or type(failed).__name__
        raise UserError(
            f"judge {self.name}: {how.url}: no score for {prompt[:80]!r} after {1 + how.retries} tries (last: "
            f"{problem}); what was scored before is kept where a cache is used: repeat the command when it answers"
        )

    def _request(self, image: np.ndarray, prompt: str) -> str:
        how = self.settings
        text = how.question
        # the prompt last: what stands in it is not filled in
        for name, value in (("low", f"{how.low:g}"), ("high", f"{how.high:g}"), ("prompt", prompt)):
            text = text.replace("{" + name + "}", value)
        address = "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": address}}]
        body = {"model": how.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        encoded = json.dumps(body | {"max_tokens": how.max_tokens}).encode()
        with self.opener.open(urllib.request.Request(how.url, encoded, self.headers), timeout=how.timeout) as reply:
            content = reply.read()
        try:
            said = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as problem:
            raise _Unclear(f"not a chat completion: {content[:100]!r}") from problem
        return said if isinstance(said, str) else ""

    def _number(self, answer: str) -> float:
        found = NUMBER.search(answer)
        value = float(found[0]) if found else math.nan
        if not self.settings.low <= value <= self.settings.high:
            raise _Unclear(f"answer {answer[:80]!r} has no number from {self.settings.low:g} to {self.settings.high:g}")
        return value


class _Unclear(Exception):
    """An answer that is none."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args):
        return None


def read_settings(path: Path) -> Settings:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise UserError(f"judge http: {path} cannot be read ({' '.join(str(problem).split())})") from problem
    tree = tree if isinstance(tree, dict) else {}
    names = [field.name for field in fields(Settings)]
    for name in tree:
        if name not in names:
            raise UserError(f"{path}: unknown key {name!r}; one of {', '.join(names)}")
    for name in ("url", "model"):
        if not isinstance(tree.get(name), str) or not tree[name]:
            raise UserError(f"{path}: {name} is missing")
    numbers = ("low", "high", "timeout", "retries", "parallel", "max_tokens", "price", "tie")
    for name in numbers:
        if name in tree and (isinstance(tree[name], bool) or not isinstance(tree[name], int | float)):
            raise UserError(f"{path}: {name} is {tree[name]!r}, expected a number")
    how = Settings(**tree)
    rules = [
        (how.url.startswith(("http://", "https://")), "url", "begin with http:// or https://"),
        ("{prompt}" in how.question, "question", "have {prompt} in it"),
        (how.low < how.high, "low", "be below high"),
        (how.timeout > 0, "timeout", "be positive"),
        (how.retries >= 0 and how.retries == int(how.retries), "retries", "be 0, 1, 2, …"),
        (how.parallel >= 1 and how.parallel == int(how.parallel), "parallel", "be 1, 2, 3, …"),
        (how.price >= 0, "price", "not be negative"),
    ]
    for good, name, need in rules:
        if not good:
            raise UserError(f"{path}: {name} is {getattr(how, name)!r}; it must {need}")
    return how


def _seconds(header: str | None, otherwise: float) -> float:
    try:
        return max(0.0, float(header))
    except (TypeError, ValueError):  # absent, or a date
        return otherwise
