"""The pairs of a source under other labels: a sidecar that `python -m inpo_fast.relabel` wrote, read by pair id.

A sidecar is parquet: `id`; `soft`, how probable it is that the image which the source calls better is the better one;
`hard`, that rounded to 1, 0 or 0.5 (a tie); and of each judge both scores. Its metadata say which source it was
made for.
"""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from inpo_fast.data import labels
from inpo_fast.data.config import LabelsAs
from inpo_fast.data.identity import differences, identity_of
from inpo_fast.data.pair import Pair, Source
from inpo_fast.data.places import is_url
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import open_regular, parse_json, read_regular
from inpo_fast.runtime.record_store import digest

METADATA = b"inpo_fast.labels"


def pair_ids(source: Source) -> list[str]:
    if not hasattr(source, "id"):
        raise UserError(f"data.labels: the pairs of a {type(source).__name__} have no ids that are known beforehand")
    return [source.id(index) for index in range(len(source))]


class RelabelledSource:
    """Winner and loser change places where the labels say so; pairs whose labels tie are left out.

    labels: what the run's manifest says of them.
    """

    def __init__(self, source: Source, path: str, kind: LabelsAs):
        table, about = read_sidecar(path)
        said = about.get("source_identity")
        if not isinstance(said, dict):
            raise UserError(
                f"data.labels={path} does not say in full which pairs it was made for (an older version wrote it); "
                "relabel them: python -m inpo_fast.relabel"
            )
        if differ := differences(said, identity_of(source)):
            raise UserError(
                f"data.labels={path} was made for another source ({about['source']}): there differ "
                f"{' and '.join(differ)}; relabel this one: python -m inpo_fast.relabel"
            )
        ids = pair_ids(source)
        rows = pc.index_in(pa.array(ids, pa.string()), table["id"].combine_chunks())
        if missing := rows.null_count:
            first = ids[rows.is_null().to_numpy(zero_copy_only=False).argmax()]
            raise UserError(
                f"data.labels={path} has no label for {missing:,} of {len(ids):,} pairs, such as {first}; go on with "
                "python -m inpo_fast.relabel until it is whole"
            )
        better = table[kind].to_numpy()[rows.to_numpy()].astype(np.float64)  # NaN: no judge could see the pair
        side, label = labels.decide(better, 1 - better)
        self.kept = np.flatnonzero(side >= 0).astype(np.int64)
        self._swap = side[self.kept] == 1
        self._label = label[self.kept]
        unjudged, ties, unclear = (int((side == k).sum()) for k in (labels.UNLABELLED, labels.TIE, labels.UNCLEAR))
        example = f"{kind} {better[side == labels.UNCLEAR][0]:g} ({path})" if unclear else ""
        # which pairs there are is the source's to say, how sure they are the sidecar's
        own = labels.Undecided(ties, unjudged, unclear, example)
        self.source, self.undecided = source, replace(labels.undecided_of(source), unclear=0, example="").joined(own)
        self.ties = self.undecided.ties
        self.blocks = None if source.blocks is None else np.searchsorted(self.kept, source.blocks).astype(np.int64)
        self.bytes = int(source.bytes * len(self.kept) / max(1, len(source)))
        self.labels = {
            "file": str(path),
            "digest": digest(read_regular(Path(path).expanduser())),
            "as": kind,
            "judges": about["judges"],
            "turned_around": int(self._swap.sum()),
            "ties": ties,
            "unjudged": unjudged,
        }
        if not len(self.kept):
            raise UserError(f"data.labels={path} leaves none of {len(source):,} pairs: every one is a tie")

    def identity(self) -> dict[str, str]:
        own = digest(self.kept.tobytes(), self._swap.tobytes(), self._label.tobytes())
        return identity_of(self.source) | {"pairs": len(self), "labels": own}

    def __len__(self) -> int:
        return len(self.kept)

    def id(self, index: int) -> str:
        return self.source.id(int(self.kept[index]))

    def read(self, index: int) -> Pair:
        pair = self.source.read(int(self.kept[index]))
        winner, loser = (pair.loser, pair.winner) if self._swap[index] else (pair.winner, pair.loser)
        return Pair(pair.id, pair.prompt, winner, loser, float(self._label[index]), pair.weight)

    def facts(self, fields: Sequence[str]) -> Iterator[dict]:
        kept = set(self.kept.tolist())
        return (record for index, record in enumerate(self.source.facts(fields)) if index in kept)


def check_replaceable(output: Path, source: str) -> None:
    """UserError where a sidecar at `output` would take the place of something else, or become a part of the source."""
    if output.exists():
        try:
            read_sidecar(str(output))
        except UserError as problem:
            raise UserError(
                f"--output {output} holds no labels of python -m inpo_fast.relabel, so it is not replaced; name another"
            ) from problem
    here = output.resolve()
    if not is_url(source) and output.suffix == ".parquet":
        place = Path(source.removeprefix("file://")).expanduser()
        is_inside = place.is_dir() and here.is_relative_to(place.resolve())
        if is_inside or (glob.has_magic(source) and Path(output.absolute()).match(str(place.absolute()))):
            raise UserError(f"--output {output} would be read as a part of --source {source}; name a place outside it")


def read_sidecar(path: str) -> tuple[pa.Table, dict]:
    """The table and what it says of itself. UserError when it is no such file."""
    try:
        with open_regular(Path(path).expanduser()) as file:
            table = pq.read_table(file)
        about = parse_json((table.schema.metadata or {})[METADATA])
        names = {"id", "soft", "hard"} - set(table.column_names)
        if names:
            raise ValueError(f"no column {', '.join(sorted(names))}")
    except KeyError as problem:
        raise UserError(f"data.labels: {path} was not written by python -m inpo_fast.relabel") from problem
    except (OSError, ValueError, pa.ArrowException) as problem:
        if git_lfs.is_pointer(Path(path).expanduser()):
            raise UserError(f"data.labels: {path} {git_lfs.WHAT}") from problem
        line = str(problem).splitlines()[0]
        raise UserError(f"data.labels: {path} cannot be read ({line}); write it with inpo_fast.relabel") from problem
    return table, about
