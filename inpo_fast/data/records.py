"""JSON objects in a file, one a line or all in one list: each with the bytes where it lies, so that it can be read
again alone. Memory for one record at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import open_regular, parse_json

CHUNK = 2**20  # bytes read at a time
LARGEST = 2**26  # bytes of one record; more is taken for a list that never ends

Found = tuple[int, int, int, dict]  # number from 1 on, first byte, length, the record


def lines(path: Path) -> Iterator[Found]:
    """One record a line; empty lines count and are passed over. UserError with the line that is not JSON in UTF-8."""
    with _opened(path) as file:
        start = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, start, len(line), _parse(path, number, line)
            start += len(line)


def lines_or_list(path: Path) -> Iterator[Found]:
    """The same, or one JSON list, whose elements are numbered."""
    with _opened(path) as file:
        first = file.read(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return _elements(path) if first == b"[" else lines(path)


def read(path: Path, number: int, start: int, length: int) -> dict:
    """The record that lies there. UserError if it no longer does."""
    try:
        with open_regular(path) as file:
            file.seek(start)
            return parse_json(file.read(length))
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}:{number}: changed since it was opened ({problem}); start again") from problem


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror})") from problem


def _parse(path: Path, number: int, encoded: bytes) -> dict:
    try:
        return parse_json(encoded)
    except ValueError as problem:  # JSONDecodeError or UnicodeDecodeError
        if git_lfs.holds_pointer(encoded):
            raise UserError(f"{path} {git_lfs.WHAT}") from problem
        raise UserError(f"{path}:{number}: not JSON in UTF-8 ({problem})") from problem


def _elements(path: Path) -> Iterator[Found]:
    # Ends of elements are looked for in latin-1, where a character is a byte; UTF-8 has no byte of JSON's signs inside
    # other characters. The element itself is then parsed from its bytes.
    decoder = json.JSONDecoder()
    with _opened(path) as file:
        text = file.read(CHUNK).decode("latin-1")
        offset, at, number = 0, text.index("[") + 1, 0  # offset: of text[0] in the file
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at < len(text) and text[at] == "]":
                return
            try:
                _, end = decoder.raw_decode(text, at)
            except ValueError as problem:
                more = file.read(max(CHUNK, len(text) - at))
                if not more or len(text) - at > LARGEST:
                    raise UserError(
                        f"{path}: element {number + 1} of the list is cut off or not JSON ({problem}); download the "
                        "file again"
                    ) from problem
                text, offset, at = text[at:] + more.decode("latin-1"), offset + at, 0
                continue
            number += 1
            record = _parse(path, number, text[at:end].encode("latin-1"))
            yield number, offset + at, end - at, record
            at = end
