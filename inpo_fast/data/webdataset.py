"""Pairs in webdataset tar shards: members `x.0.jpg`, `x.1.jpg`, `x.json` make the pair x.

The JSON has `prompt` (or `caption`), `label` (0 or 1: the better one; 0.5: a tie; 0.7: the second is better with
probability 0.7) or `label_0`, `label_1`, and perhaps `weight`. Any image format after `.0.` and `.1.`.

Read with the standard library's tarfile and an index of where each member lies, not with the webdataset package: that
streams shards through a shuffle buffer, so that what comes next depends on what was read before; here a pair is a
function of its position, memory is one pair's, and a resume needs no replay. Opening reads the headers and the JSON of
every shard once (a remote shard's bytes pass by whole). A tar that is compressed as a whole has no such places.
"""

import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from inpo_fast.data import identity, labels
from inpo_fast.data.folder import prompt, text_of
from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.data.places import File
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import open_regular, parse_json


class _Span(NamedTuple):
    start: int
    length: int


class WebdatasetSource:
    blocks = None
    bytes = 0

    def __init__(self, shards: Sequence[File]):
        self.shards = list(shards)
        self.undecided = labels.Undecided()
        # 52 bytes a pair and its key: shard, then first byte and length of JSON, winner and loser
        self._shard, self._start, self._length = array("i"), array("q"), array("q")
        self._keys, self._key_ends = bytearray(), array("q")
        self._records = identity.new_digest()
        for number, shard in enumerate(self.shards):
            for key, parts in _samples(shard):
                where = [parts[name] for name in sorted(parts) if name != "record"]
                identity.add(
                    self._records, _encoded(key), repr(where).encode(), json.dumps(parts.get("record")).encode()
                )
                self._add(number, f"{shard}:{key}", key, parts)

    def _add(self, shard: int, where: str, key: str, parts: "dict[str, _Span | dict]") -> None:
        missing = [name for name in ("0", "1", "json", "record") if name not in parts]
        if missing:
            raise UserError(f"{where}: no member {key}.{missing[0]}{'' if missing[0] == 'json' else '.<image>'}")
        side, _ = _choice(parts["record"], where)
        if side < 0:
            self.undecided = self.undecided.counted(side, f"{labels.said(parts['record'])} ({where})")
            return
        spans = (parts["json"], parts[str(side)], parts[str(1 - side)])
        self._shard.append(shard)
        self._start.extend(span.start for span in spans)
        self._length.extend(span.length for span in spans)
        self._keys += _encoded(key)
        self._key_ends.append(len(self._keys))

    @property
    def ties(self) -> int:
        return self.undecided.ties

    def __len__(self) -> int:
        return len(self._shard)

    def id(self, index: int) -> str:
        """Of a pair, without reading it."""
        key = self._keys[self._key_ends[index - 1] if index else 0 : self._key_ends[index]].decode()
        return f"{self.shards[self._shard[index]].name}:{key}"

    def identity(self) -> dict[str, str]:
        with ThreadPoolExecutor(identity.READERS) as pool:
            found = pool.map(self._of_pictures, range(len(self.shards)))
            pictures = identity.new_digest()
            identity.add(pictures, *found)
        return {"rows": self._records.hexdigest(), "pictures": pictures.hexdigest()}

    def _of_pictures(self, shard: int) -> bytes:
        """Of a shard here both ends of each picture of a pair, of a remote one what its file system says; where they
        lie is with the rows."""
        file, digest = self.shards[shard], identity.new_digest()
        if file.fs is not None:
            return identity.checksum(file).encode()
        shards = np.frombuffer(self._shard, np.int32)
        pairs = range(np.searchsorted(shards, shard), np.searchsorted(shards, shard, "right"))
        with open_regular(file.path) as opened:
            for start, length in sorted(
                (self._start[i], self._length[i]) for p in pairs for i in (3 * p + 1, 3 * p + 2)
            ):
                identity.add(digest, *identity.ends(opened.fileno(), start, length))
        return digest.digest()

    def read(self, index: int) -> Pair:
        shard, id = self.shards[self._shard[index]], self.id(index)
        key = id.removeprefix(f"{shard.name}:")
        places = range(3 * index, 3 * index + 3)
        try:
            found, winner, loser = shard.read(*((self._start[i], self._length[i]) for i in places))
            record = parse_json(found)
            side, label = _choice(record, f"{shard}:{key}")
            if side < 0:
                raise ValueError("another label")
        except (OSError, ValueError) as problem:  # a UserError too: the record was good when it was opened
            raise UserError(f"{shard}:{key}: changed since it was opened ({problem}); start again") from problem
        if len(winner) != self._length[places[1]] or len(loser) != self._length[places[2]] or not (winner and loser):
            raise BadPair(f"{id}: image missing")
        return Pair(id, prompt(record, id), winner, loser, label, labels.weight(record, id))

    def facts(self, fields: Sequence[str]) -> Iterator[dict]:
        """Of each pair in turn: its prompt and the named fields of its JSON (None where there is none)."""
        for index in range(len(self)):
            (found,) = self.shards[self._shard[index]].read((self._start[3 * index], self._length[3 * index]))
            record = parse_json(found)
            yield {"prompt": text_of(prompt(record, str(index)))} | {name: record.get(name) for name in fields}


def _encoded(key: str) -> bytes:
    """Names of members that are no UTF-8 come with lone surrogates, which could not be printed."""
    return key.encode("utf-8", "backslashreplace")


def _choice(record: dict, where: str) -> tuple[int, float]:
    prompt(record, where)
    labels.weight(record, where)
    if not ("label" in record or {"label_0", "label_1"} <= record.keys()):
        raise UserError(f"{where}: its JSON needs label, or label_0 and label_1; has {sorted(record)}")
    return labels.choice(record, where)


def _samples(shard: File) -> "Iterator[tuple[str, dict[str, _Span | dict]]]":
    """Neighbouring members with the same name up to its first dot, by what follows: '0', '1', 'json', 'record'."""
    if shard.name.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
        raise UserError(f"{shard}: a compressed tar has no random access; unpack it to a plain .tar")
    key, parts = None, {}
    try:
        size = shard.size()
        with shard.open(in_order=True) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile would keep every header
                if not member.isreg():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                stem = f"{folder}/{stem}" if folder else stem
                if stem != key:
                    if key is not None:
                        yield key, parts
                    key, parts = stem, {}
                span = _Span(member.offset_data, member.size)
                kind = extension if extension == "json" else extension.partition(".")[0]
                if kind in parts:
                    raise UserError(f"{shard}:{key}: two members {key}.{kind}; a key names one pair")
                parts[kind] = span
                if kind == "json":
                    parts["record"] = parse_json(tar.extractfile(member).read())
            file.seek(tar.offset)  # tarfile takes whatever is no header for the end; a true end is a block of zeros
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError) as problem:
        if shard.is_lfs_pointer():
            raise UserError(f"{shard} {git_lfs.WHAT}") from problem
        raise UserError(f"{shard}: not a readable tar ({problem}); download it again or remove it") from problem
    except ValueError as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"{shard}:{key}: not JSON in UTF-8 ({problem})") from problem
    if key is not None:
        yield key, parts
