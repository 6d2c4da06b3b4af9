"""Pairs listed in metadata.jsonl beside their images, one JSON object a line.

`prompt` (or `caption`) and one of: `image_0`, `image_1`, `label` (0 or 1: the better one; 0.5: a tie; 0.7: image_1 is
better with probability 0.7), or label_0 and label_1 in its place; or `chosen`, `rejected` and perhaps `confidence`.
`weight` where there is one. Image paths are relative to the folder and never leave it.
"""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from inpo_fast.data import identity, labels, records
from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import inside, open_regular, read_regular


class Choice(NamedTuple):
    """What a record says: paths of the two images as written, and how sure it is. side: negative where neither is
    better (data/labels.py); said: its label fields."""

    side: int
    prompt: str
    winner: str
    loser: str
    label: float
    weight: float
    said: str


class ListedSource:
    """Pairs of a JSON listing, which is checked whole when it is opened; in memory stays where each record lies."""

    blocks = None
    bytes = 0

    def __init__(self, listing: Path, images: Path):
        self.listing, self.undecided = listing, labels.Undecided()
        self.images = Path(os.path.realpath(images))
        # 16 bytes a pair: where the record lies, its length, and the number of its line (or place in the list)
        self._start, self._length, self._number = array("q"), array("i"), array("i")
        if not self.images.is_dir():
            raise UserError(f"data.images: no such folder: {images}")
        for number, start, length, record in self._scan():
            where = f"{listing}:{number}"
            choice = self._choice(record, where)
            if choice.side < 0:
                self.undecided = self.undecided.counted(choice.side, f"{choice.said} ({where})")
                continue
            self._start.append(start)
            self._length.append(length)
            self._number.append(number)
        self.ties = self.undecided.ties

    def _scan(self) -> Iterator[tuple[int, int, int, dict]]:
        return records.lines(self.listing)

    def _choice(self, record: dict, where: str) -> Choice:
        """What a record says of its pair: the listing's kind decides (FolderSource here, HpdSource in hpd.py)."""
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
            yield {"prompt": text_of(choice.prompt)} | {name: record.get(name) for name in fields}

    def identity(self) -> dict[str, str]:
        with open_regular(self.listing) as file:
            rows = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {"rows": rows, "pictures": identity.of_files(self._mentioned())}

    def picture_below(self, folder: Path, places: Sequence[Path]) -> Path | None:
        """The first picture of the listing in one of these places in a folder, links followed; None where none is.
        Looks at no picture where the folder lies outside of where they may be."""
        if not folder.resolve().is_relative_to(self.images):
            return None
        solid = [f"{os.path.realpath(place)}{os.sep}" for place in places]
        found = (path for path in self._mentioned() if path is not None and f"{path}".startswith(tuple(solid)))
        return next(found, None)

    def _mentioned(self) -> Iterator[Path | None]:
        """The files of each pair in turn; None where one may not be read."""
        for number, _, _, record in self._scan():
            choice = self._choice(record, f"{self.listing}:{number}")
            for name in sorted((choice.winner, choice.loser)) if choice.side >= 0 else ():  # whichever is better
                try:
                    yield self._path("", name)
                except BadPair:
                    yield None

    def _said(self, index: int) -> tuple[str, dict, Choice]:
        """The pair's id, its record and what that says."""
        number = self._number[index]
        record = records.read(self.listing, number, self._start[index], self._length[index])
        choice = self._choice(record, f"{self.listing}:{number}")
        if choice.side < 0:
            raise UserError(f"{self.listing}:{number}: changed since it was opened; start again")
        return self.id(index), record, choice

    def _bytes(self, id: str, name: str) -> bytes:
        try:
            return read_regular(self._path(id, name))
        except OSError as problem:  # missing, a loop of links, a named pipe
            raise _bad(id, name, problem) from problem

    def _path(self, id: str, name: str) -> Path:
        try:
            return inside(self.images, name, resolved=True)
        except (OSError, ValueError) as problem:  # outside; NUL or half a character in the name
            raise _bad(id, name, problem) from problem


def _bad(id: str, name: str, problem: Exception) -> BadPair:
    return BadPair(f"{id}: {name!r}: {getattr(problem, 'strerror', None) or problem}")


class FolderSource(ListedSource):
    def __init__(self, folder: Path, images: Path | None = None):
        listing = folder if folder.name == "metadata.jsonl" else folder / "metadata.jsonl"
        if not listing.is_file():
            raise UserError(f"{folder}: no metadata.jsonl in this folder")
        super().__init__(listing, images or listing.parent)

    def _choice(self, record: dict, where: str) -> Choice:
        text, said = prompt(record, where), labels.said(record)
        keys = record.keys() if isinstance(record, dict) else ()
        numbered = {"image_0", "image_1"} <= keys and ("label" in keys or {"label_0", "label_1"} <= keys)
        if {"chosen", "rejected"} <= keys:
            sides, (side, label) = (record["chosen"], record["rejected"]), labels.confidence(record, where)
            other = (record["image_0"], record["image_1"]) if numbered else None
            if other and contradict(sides, side, other, labels.choice(record, where)[0]):
                side, said = labels.UNCLEAR, f"chosen {sides[0]!r} and label {labels.CONTRADICT}"
        elif numbered:
            sides, (side, label) = (record["image_0"], record["image_1"]), labels.choice(record, where)
        else:
            raise UserError(f"{where}: needs image_0, image_1 and label, or chosen and rejected; has {sorted(record)}")
        weight = labels.weight(record, where)
        sides = tuple(image_path(side, where) for side in sides)
        return Choice(side, text, sides[side == 1], sides[side != 1], label, weight, said)


def contradict(images: Sequence, side: int, others: Sequence, other: int) -> bool:
    """Whether a record names two images and their better side twice, and not the same. What is no label, or no path,
    says nothing."""
    if not all(isinstance(name, str) for name in (*images, *others)):
        return False
    first, second = ([os.path.normpath(name) for name in pair] for pair in (images, others))
    if first == second[::-1] and other >= 0:
        other = 1 - other
    elif first != second and sorted(first) != sorted(second):
        return min(side, other) >= labels.TIE  # about other images
    return labels.contradict(side, other)


def prompt(record: object, where: str) -> str:
    """What a record has for a prompt; a `Pair` of anything but a usable text is a bad one. UserError if the record is
    no object or has no prompt at all."""
    for name in ("prompt", "caption") if isinstance(record, dict) else ():
        if name in record:
            return record[name]
    raise UserError(f"{where}: no text under `prompt` or `caption`")


def text_of(prompt: object) -> str:
    """For who looks at prompts only (filters): an empty one in place of what is no text."""
    return prompt if isinstance(prompt, str) else ""


def image_path(value: object, where: str) -> str:
    """A path as written. UserError of anything else, a URL too: nothing is downloaded while training."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: image {value!r}; expected the path of a file")
    if "://" in value:
        raise UserError(f"{where}: image {value} is a URL; download the images and write their paths in its place")
    return value
