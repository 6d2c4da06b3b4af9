"""The YAML file of a judge over HTTP, read and checked; docs/judges.md shows one."""

import base64
import math
import os
import urllib.parse
from dataclasses import dataclass, fields, replace
from pathlib import Path

from inpo_fast.data.text import unusable
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import read_text
from inpo_fast.runtime.masking import keep_secret, keep_secrets_of
from inpo_fast.runtime.yaml_text import read_yaml

QUESTION = (
    "Rate how well this picture shows the following description and how good it looks. Answer with one number from "
    "{low} to {high} and nothing else. Description: {prompt}"
)
LONGEST_TIMEOUT = 86_400.0  # seconds
MOST_PARALLEL = 1000


@dataclass(frozen=True)
class Settings:
    """The judge's YAML file."""

    url: str
    model: str
    question: str = QUESTION  # {prompt}, {low} and {high} are filled in
    low: float = 0.0
    high: float = 10.0
    key_env: str | None = None  # name of the environment variable that holds the key
    timeout: float = 60.0  # seconds of one try, until the whole answer is here
    retries: int = 4  # after the first try; waits of 0.5, 1, 2, … seconds, or as the server asks, 30 at most
    parallel: int = 8  # requests at a time
    max_tokens: int = 16  # of an answer
    max_unclear: float = 0.2  # refuse to go on where more of the answers than this share hold no score
    price: float = 0.0  # of one request, in your currency
    max_cost: float | None = None  # refuse to begin where the requests would cost more
    tie: float = 1e-6  # scores that differ by less are a tie


TEXTS = ("url", "model", "question", "key_env")
WHOLE = ("retries", "parallel", "max_tokens")
NUMBERS = ("low", "high", "timeout", "max_unclear", "price", "max_cost", "tie", *WHOLE)


def read_settings(path: Path) -> Settings:
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as problem:
        said = getattr(problem, "strerror", None) or problem
        raise UserError(f"judge http: {path} cannot be read ({said})") from problem
    tree = read_yaml(text, f"judge http: {path} cannot be read")
    tree = tree if isinstance(tree, dict) else {}
    names = [field.name for field in fields(Settings)]
    for name in tree:
        if name not in names:
            raise UserError(f"{path}: unknown key {str(name)[:80]!r}; one of {', '.join(names)}")
    tree = {name: value for name, value in tree.items() if value is not None}
    for name in ("url", "model"):
        if not isinstance(tree.get(name), str) or not tree[name].strip():
            raise UserError(f"{path}: {name} is missing")
    for name in TEXTS:
        if name in tree and not isinstance(tree[name], str):
            raise UserError(f"{path}: {name} is {str(tree[name])[:80]!r}, expected a text")
        if name in tree and (wrong := unusable(tree[name])):
            raise UserError(f"{path}: {name}: {wrong}")
    for name in NUMBERS:
        if name in tree and (isinstance(tree[name], bool) or not isinstance(tree[name], int | float)):
            raise UserError(f"{path}: {name} is {str(tree[name])[:80]!r}, expected a number")
        if name in tree and not _finite(tree[name]):
            raise UserError(f"{path}: {name} is {str(tree[name])[:80]}, expected a finite number")
    keep_secrets_of(tree["url"])
    how = Settings(**tree | {"url": tree["url"].strip()})
    rules = [
        ("{prompt}" in how.question, "question", "have {prompt} in it"),
        (how.low < how.high, "low", "be below high"),
        (0 < how.timeout <= LONGEST_TIMEOUT, "timeout", f"be positive, and {LONGEST_TIMEOUT:g} at most"),
        (how.retries >= 0 and how.retries == int(how.retries), "retries", "be 0, 1, 2, …"),
        (1 <= how.parallel <= MOST_PARALLEL and how.parallel == int(how.parallel), "parallel", "be 1, 2, 3, … 1000"),
        (how.max_tokens >= 1 and how.max_tokens == int(how.max_tokens), "max_tokens", "be 1, 2, 3, …"),
        (0 <= how.max_unclear <= 1, "max_unclear", "be a share, from 0 to 1"),
        (how.price >= 0, "price", "not be negative"),
        (how.tie >= 0, "tie", "not be negative"),
    ]
    for good, name, need in rules:
        if not good:
            raise UserError(f"{path}: {name} is {str(getattr(how, name))[:200]!r}; it must {need}")
    _check_address(how.url, path)
    return replace(how, **{name: int(getattr(how, name)) for name in WHOLE})


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _check_address(url: str, path: Path) -> None:
    """Of the address only its beginning is quoted: the rest may be a password in a place where nobody masks it."""
    wrong = ""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host, wrong = None, None, "is no address"
    if parts is not None and parts.scheme.lower() not in ("http", "https"):
        wrong = "must begin with http:// or https://"
    elif not wrong and not host:
        wrong = "names no host"
    elif not wrong and (not url.isascii() or any(c <= " " or c == "\x7f" for c in url)):
        wrong = "has white space or characters that an address does not have; write them as %20, %C3%BC, …"
    if wrong:
        shown = f" {url[:80]!r}" if "@" not in url and "?" not in url else ""
        raise UserError(f"{path}: url{shown} {wrong}; expected such as http://127.0.0.1:8000/v1/chat/completions")


def address_and_headers(how: Settings, path: Path) -> tuple[str, dict[str, str]]:
    """The address without who logs in, and the headers that say it: the key, or the address's user and password."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    parts = urllib.parse.urlsplit(how.url)
    user, at, host = parts.netloc.rpartition("@")
    if how.key_env is not None:
        key = os.environ.get(how.key_env, "").strip()  # files and pipes add the end of a line
        if not key:
            raise UserError(f"{path}: key_env: no {how.key_env} in the environment; set it to your key")
        keep_secret(key)
        if not key.isascii() or any(c < " " or c == "\x7f" for c in key):
            raise UserError(
                f"{path}: key_env: {how.key_env} holds several lines, or characters that no key has; set it to the "
                "key alone"
            )
        if at:
            raise UserError(f"{path}: url has a user in it and key_env is set; give one of them")
        headers["Authorization"] = f"Bearer {key}"
    elif at:
        login = base64.b64encode(urllib.parse.unquote(user).encode()).decode("ascii")
        keep_secret(login)
        headers["Authorization"] = f"Basic {login}"
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path or "/", parts.query, "")), headers
