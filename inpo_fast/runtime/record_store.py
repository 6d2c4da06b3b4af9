"""Records on disk under keys: a folder of safetensors shards that any number of processes may read and add to.

A record is a row of each of a shard's tensors, its parts: (rows, entries, …), all records of a folder alike. The header
of a shard names the keys of its rows, so opening a folder reads headers only. A shard appears whole or not at all, and
each entry of a row has a CRC-32: a damaged file costs its records, never a wrong number. manifest.json says in plain
words what the records were made from; its digest is part of every key that `key` makes, so that a record from other
circumstances cannot even be found.
"""

import contextlib
import hashlib
import json
import logging
import time
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import open_regular, parse_json, read_text, whole
from inpo_fast.runtime.warn_once import warn_once

log = logging.getLogger(__name__)

ROWS = 256  # records of a shard at most
MANIFEST = "manifest.json"
DAMAGE = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)
ABANDONED = 24 * 3600  # seconds after which nobody is still writing a file


def digest(*parts: bytes) -> str:
    """32 hexadecimal digits of byte strings. The lengths count: ("ab", "c") is not ("a", "bc")."""
    out = hashlib.blake2b(digest_size=16)
    for part in parts:
        out.update(len(part).to_bytes(8, "little"))
        out.update(part)
    return out.hexdigest()


class RecordStore:
    """An open folder. `places`: key -> (file, row), read when opened; what this process writes is added."""

    def __init__(self, folder: Path, identity: dict):
        """identity: plain values that name all that the records depend on beyond their keys.

        Writes nothing. UserError when the folder holds other things or records of another identity.
        """
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))  # as it reads from a file: tuples become lists
        self._secret = json.dumps(self.identity, sort_keys=True).encode()
        self.places: dict[str, tuple[Path, int]] = {}
        if folder.exists():
            self._check()
            # the newest last: what was made again stands in a newer shard than the damaged one that it replaces
            for path in sorted(folder.glob("*.safetensors"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
                self._index(path)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def key(self, *parts: bytes) -> str:
        """The key of a record of this identity that is a function of `parts`."""
        return digest(self._secret, *parts)

    def start(self) -> None:
        """Makes the folder and its manifest where they are not there yet. UserError when it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".tmp-*"):  # of processes that were killed while they wrote
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile by the one that writes it
                    if time.time() - path.stat().st_mtime > ABANDONED:
                        path.unlink()
            if not (self.folder / MANIFEST).exists():
                with whole(self.folder / MANIFEST) as aside:
                    aside.write_text(json.dumps(self.identity, indent=1), encoding="utf-8")
        except OSError as problem:
            raise UserError(f"{self.folder}: cannot be written ({problem.strerror}); name another folder") from problem
        self._check()  # another process may have been first

    def read(self, part: str, keys: list[str], first: list[int] | None = None) -> list[torch.Tensor | None]:
        """One part of each record, (entries, …) on the CPU, or its `first` entries alone; None where there is no such
        record. A file that turns out to be damaged is named in a warning and counts as absent from then on."""
        out: list[torch.Tensor | None] = [None] * len(keys)
        shards: dict[Path, list[tuple[int, int]]] = {}
        for number, key in enumerate(keys):
            if key in self.places:
                path, row = self.places[key]
                shards.setdefault(path, []).append((number, row))
        for path, wanted in shards.items():
            try:
                with safe_open(path, "pt") as shard:
                    values, sums = shard.get_slice(part), shard.get_tensor(f"{part}.crc32")
                    for number, row in wanted:
                        entries = sums.shape[1] if first is None else first[number]
                        value = values[row, :entries]
                        if [_crc32(entry) for entry in value] != sums[row, :entries].tolist():
                            raise ValueError(f"checksum of row {row} does not hold")
                        out[number] = value
            except DAMAGE as problem:
                self._give_up(path, problem)  # rows that were read before are good: each has its own checksums
        return out

    def write(self, keys: list[str], parts: dict[str, torch.Tensor]) -> None:
        """Adds records, in shards of at most ROWS. parts: (len(keys), entries, …), any device; all of a folder alike.
        UserError when the disk is full: no shard is left half written."""
        for lo in range(0, len(keys), ROWS):
            some = keys[lo : lo + ROWS]
            tensors = {name: value[lo : lo + ROWS].cpu().contiguous() for name, value in parts.items()}
            for name, value in list(tensors.items()):
                tensors[f"{name}.crc32"] = torch.tensor([[_crc32(entry) for entry in row] for row in value])
            path = self.folder / f"{digest(*(key.encode() for key in some))}.safetensors"
            try:
                with whole(path) as aside:
                    save_file(tensors, aside, {"keys": " ".join(some)})
            except (OSError, SafetensorError) as problem:
                raise UserError(
                    f"{self.folder}: {len(some)} records could not be written ({problem}); earlier ones are whole: "
                    "free some space and start again (training with --resume, perhaps --inversion.cache=OTHER_FOLDER)"
                ) from problem
            self.places |= {key: (path, row) for row, key in enumerate(some)}

    def _check(self) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            if not self.folder.is_dir() or any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise UserError(f"{self.folder} holds other things and no {MANIFEST}; name a new or an empty folder")
            return
        try:
            theirs = dict(parse_json(read_text(path)))
        except (OSError, ValueError, TypeError) as problem:
            raise UserError(
                f"{path}: cannot be read ({problem}), so what this folder holds is unknown; name another folder"
            ) from problem
        if theirs != self.identity:
            raise UserError(
                f"{self.folder} was made for something else ({_differences(theirs, self.identity)}); name another "
                "folder"
            )

    def _index(self, path: Path) -> None:
        try:
            open_regular(path).close()
            with safe_open(path, "pt") as shard:
                keys = shard.metadata()["keys"].split()
                for name in shard.keys():  # noqa: SIM118
                    if shard.get_slice(name).get_shape()[0] != len(keys):
                        raise ValueError(f"{name} has another number of rows than keys")
        except DAMAGE as problem:
            self._give_up(path, problem, warn_once)
            return
        for row, key in enumerate(keys):
            self.places[key] = (path, row)

    def _give_up(self, path: Path, problem: Exception, say=logging.Logger.warning) -> None:
        """say: what all processes find out while opening, one of them says."""
        self.places = {key: place for key, place in self.places.items() if place[0] != path}
        say(log, "%s is damaged (%s): its records are made again; remove this file", path, problem)


def _differences(theirs: dict, ours: dict) -> str:
    """Values where they say something, of digests only the name."""
    names = [name for name in dict.fromkeys((*ours, *theirs)) if theirs.get(name) != ours.get(name)]
    digests = [n for n in names if n in theirs and n in ours and _is_digest(theirs[n]) and _is_digest(ours[n])]
    plain = [f"{n} is {_short(theirs.get(n))} there, {_short(ours.get(n))} here" for n in names if n not in digests]
    return "; ".join([f"not the same: {', '.join(digests)}", *plain] if digests else plain)


def _is_digest(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, str) and len(v) == 32 and set(v) <= set("0123456789abcdef") for v in values)


def _short(value: object) -> str:
    said = str(value)
    return said if len(said) <= 200 else f"{said[:200]}…"


def _crc32(entry: torch.Tensor) -> int:
    return zlib.crc32(entry.contiguous().reshape(-1).view(torch.uint8).numpy())
