"""JSON that carries the SHA-256 of its own bytes: its last key. A reader that knows nothing of it reads plain JSON."""

import hashlib
import json
import re

from inpo_fast.runtime.files import parse_json

_MARK = b'"sha256": "'
_TAIL = re.compile(rb'[0-9a-f]{64}"\n}\Z')  # of what is sealed, whatever a changed bit has made of the key's name


def dumps(content: dict) -> str:
    """An object's text; the last key, `sha256`, is of everything before it."""
    head = json.dumps(content, indent=1).removesuffix("\n}" if content else "}").encode()
    head += b",\n " if content else b"\n "
    return f'{head.decode()}{_MARK.decode()}{hashlib.sha256(head).hexdigest()}"\n}}'


def loads(text: bytes) -> tuple[dict, bool]:
    """The object without its seal, and whether it had one. ValueError where it is no JSON object, or not what was
    sealed; each changed bit is noticed, in the seal too."""
    content = parse_json(text.decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    if "sha256" not in content and not _TAIL.search(text):
        return content, False
    head, _, tail = text.rpartition(_MARK)
    if tail != f'{hashlib.sha256(head).hexdigest()}"\n}}'.encode():
        raise ValueError("its SHA-256 is not the one that it names")
    del content["sha256"]
    return content, True
