"""Pairs listed in metadata.jsonl beside their images, one JSON object a line.

`prompt` (or `caption`) and one of: `image_0`, `image_1`, `label` (0 or 1: the better one; 0.5: a tie; 0.7: image_1 is
better with probability 0.7), or label_0 and label_1 in its place; or `chosen`, `rejected` and perhaps `confidence`.
`weight` where there is one. Image paths are relative to the folder and never leave it.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from inpo_fast.data import identity, labels, records
from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import open_regular


class Choice(NamedTuple):
    """What a record says: paths of the two images as written, and how sure it is."""

    prompt: str
    winner: str
    loser: str
    label: float
    weight: float


class ListedSource:
    """Pairs of a JSON listing, which is checked whole when it is opened; in memory stays where each record lies."""

    blocks = None
    bytes = 0

    def __init__(self, listing: Path, images: Path):
        self.listing = listing
        self.images = images.resolve()
        self.ties = 0
        # 16 bytes a pair: where the record lies, its length, and the number of its line (or place in the list)
        self._start, self._length, self._number = array("q"), array("i"), array("i")
        if not self.images.is_dir():
            raise UserError(f"data.images: no such folder: {images}")
        for number, start, length, record in self._scan():
            if self._choice(record, f"{listing}:{number}") is None:
                self.ties += 1
                continue
            self._start.append(start)
            self._length.append(length)
            self._number.append(number)

    def _scan(self) -> Iterator[tuple[int, int, int, dict]]:
        return records.lines(self.listing)

    def _choice(self, record: dict, where: str) -> Choice | None:
        """None: a tie."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._start)

    def id(self, index: int) -> str:
        """Of a pair, without reading it."""
        return f"{self.listing.name}:{self._number[index]}"

    def read(self, index: int) -> Pair:
        id, _, choice = self._said(index)
        winner, loser = self._bytes(id, choice.winner), self._bytes(id, choice.loser)
        return Pair(id, choice.prompt, winner, loser, choice.label, choice.weight)

    def image_files(self, index: int) -> tuple[Path, Path]:
        """Where a pair's images lie. BadPair if they may not be read."""
        id, _, choice = self._said(index)
        return self._path(id, choice.winner), self._path(id, choice.loser)

    def facts(self, fields: Sequence[str]) -> Iterator[dict]:
        """Of each pair in turn: its prompt and the named fields (None where a record has none)."""
        for index in range(len(self)):
            _, record, choice = self._said(index)
            yield {"prompt": choice.prompt} | {name: record.get(name) for name in fields}

    def identity(self) -> dict[str, str]:
        with open_regular(self.listing) as file:
            rows = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {"rows": rows, "pictures": identity.of_files(self._mentioned())}

    def _mentioned(self) -> Iterator[Path | None]:
        """The files of each pair in turn; None where one may not be read."""
        for number, _, _, record in self._scan():
            choice = self._choice(record, f"{self.listing}:{number}")
            for name in sorted((choice.winner, choice.loser)) if choice else ():  # whichever is better
                try:
                    yield self._path("", name)
                except BadPair:
                    yield None

    def _said(self, index: int) -> tuple[str, dict, Choice]:
        """The pair's id, its record and what that says."""
        number = self._number[index]
        record = records.read(self.listing, number, self._start[index], self._length[index])
        choice = self._choice(record, f"{self.listing}:{number}")
        if choice is None:
            raise UserError(f"{self.listing}:{number}: changed since it was opened; start again")
        return self.id(index), record, choice

    def _bytes(self, id: str, name: str) -> bytes:
        path = self._path(id, name)
        try:
            return path.read_bytes()
        except (OSError, ValueError) as problem:  # missing; NUL in the name
            raise _bad(id, name, problem) from problem

    def _path(self, id: str, name: str) -> Path:
        try:
            path = (self.images / name).resolve()
        except (OSError, ValueError, RuntimeError) as problem:  # NUL in the name; a loop of links
            raise _bad(id, name, problem) from problem
        if not path.is_relative_to(self.images):
            raise BadPair(f"{id}: {name}: outside {self.images}")
        return path


def _bad(id: str, name: str, problem: Exception) -> BadPair:
    return BadPair(f"{id}: {name!r}: {getattr(problem, 'strerror', None) or problem}")


class FolderSource(ListedSource):
    def __init__(self, folder: Path, images: Path | None = None):
        listing = folder if folder.name == "metadata.jsonl" else folder / "metadata.jsonl"
        if not listing.is_file():
            raise UserError(f"{folder}: no metadata.jsonl in this folder")
        super().__init__(listing, images or listing.parent)

    def _choice(self, record: dict, where: str) -> Choice | None:
        text = prompt(record, where)
        keys = record.keys() if isinstance(record, dict) else ()
        if {"chosen", "rejected"} <= keys:
            sides, decided = (record["chosen"], record["rejected"]), labels.confidence(record, where)
            decided = None if decided is None else (0, decided)
        elif {"image_0", "image_1"} <= keys and ("label" in keys or {"label_0", "label_1"} <= keys):
            sides, decided = (record["image_0"], record["image_1"]), labels.choice(record, where)
        else:
            raise UserError(f"{where}: needs image_0, image_1 and label, or chosen and rejected; has {sorted(record)}")
        weight = labels.weight(record, where)
        sides = tuple(image_path(side, where) for side in sides)
        if decided is None:
            return None
        side, label = decided
        return Choice(text, sides[side], sides[1 - side], label, weight)


def prompt(record: object, where: str) -> str:
    """The text of a record. UserError if it is no object or has none."""
    text = record.get("prompt", record.get("caption")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: no text under `prompt` or `caption`")
    return text


def image_path(value: object, where: str) -> str:
    """A path as written. UserError of anything else, a URL too: nothing is downloaded while training."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: image {value!r}; expected the path of a file")
    if "://" in value:
        raise UserError(f"{where}: image {value} is a URL; download the images and write their paths in its place")
    return value
