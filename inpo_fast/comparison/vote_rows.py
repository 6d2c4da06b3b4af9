"""The parquet that is made from a log of votes: Pick-a-Pic v2's columns, one row a voter and pair.

Rows of pairs that are not shown now stay as they are, for their pictures are inside the parquet: so one file gathers
the votes of several pages (other models, other sources, --limit) and of several voters.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from inpo_fast.comparison.vote_log import Key, Pair, Vote, VoteLog, pair_of, prompt_digest
from inpo_fast.data.parquet import PICKAPIC_SCHEMA
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import whole
from inpo_fast.runtime.record_store import digest

GROUP = 256  # rows of a row group


@dataclass(frozen=True)
class Row:
    """What a row says beside its pictures."""

    user: int | None
    pair: Pair
    left: str  # the digest of image_0
    label: float | None  # label_0
    number: int  # ranking_id

    @property
    def key(self) -> Key:
        return (self.user, *self.pair)


def read_rows(path: Path) -> list[Row]:
    """Of a parquet that an earlier call wrote, without its pictures; none where there is no file. UserError where it is
    something else."""
    if not path.exists():
        return []
    names = ["caption", "image_0_uid", "image_1_uid", "user_id", "label_0", "ranking_id"]
    try:
        with pq.ParquetFile(path.absolute()) as file:  # a relative path such as a:b/c would be an address to pyarrow
            if not file.schema_arrow.equals(PICKAPIC_SCHEMA):
                raise UserError(f"--output {path} has other columns than votes have; name another file")
            columns = [column.to_pylist() for column in file.read(columns=names).select(names)]
        rows = []
        for caption, left, right, user, label, number in zip(*columns, strict=True):
            rows.append(Row(user, pair_of(prompt_digest(caption), left, right), left, label, number))
    except (OSError, pa.ArrowException, TypeError, AttributeError) as problem:
        why = str(problem).splitlines()[0]
        raise UserError(
            f"--output {path} cannot be read ({why}); move it away: what is voted on here is made anew from its log"
        ) from problem
    return rows


def label_of(vote: Vote, left: str) -> float:
    """Pick-a-Pic's label_0."""
    return 0.5 if vote.winner is None else float(vote.winner == left)


def stays(row: Row, log: VoteLog) -> bool:
    """Not where its voter took the vote back, or skips the pair now."""
    if vote := log.votes.get(row.key):
        return vote.choice != "skip"
    return row.key not in log.undone and (None, *row.pair) not in log.undone


def voter_of(rows: Iterable[Row], log: VoteLog) -> dict[Pair, int]:
    """Who gave the votes that do not say it, by the rows that they became."""
    return {row.pair: row.user for row in rows if row.user is not None and row.key not in log.votes}


def new_row(vote: Vote, prompt: str, models: tuple[str, str], pictures: tuple[bytes, bytes], of_prompt: int) -> dict:
    """models, pictures: of the left and of the right one. Its number comes when it is written."""
    uids = [digest(picture) for picture in pictures]
    return {
        "caption": prompt,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": "",
        "image_1_uid": uids[1],
        "image_1_url": "",
        "jpg_0": pictures[0],
        "jpg_1": pictures[1],
        "model_0": models[0],
        "model_1": models[1],
        "user_id": vote.user,
        "num_example_per_prompt": of_prompt,
        **_said(vote, uids[0]),
    }


def _said(vote: Vote, left: str) -> dict:
    label = label_of(vote, left)
    return {
        "are_different": label != 0.5,
        "best_image_uid": vote.winner or "tie",
        "created_at": datetime.fromtimestamp(vote.time, UTC).replace(tzinfo=None),
        "label_0": label,
        "label_1": 1 - label,
    }


def write_rows(path: Path, old: list[Row], log: VoteLog, new: Iterable[dict]) -> None:
    """The old rows that stay, labelled as the log says, and the new ones, with numbers that no other row has."""
    following = max((row.number for row in old), default=-1) + 1
    with whole(path) as aside, pq.ParquetWriter(aside.absolute(), PICKAPIC_SCHEMA, compression="zstd") as out:
        waiting: list[pa.Table] = []
        for table in _tables(path, old, log, new, following):
            waiting.append(table)
            if sum(map(len, waiting)) >= GROUP:
                out.write_table(pa.concat_tables(waiting), row_group_size=GROUP)
                waiting = []
        if waiting:
            out.write_table(pa.concat_tables(waiting), row_group_size=GROUP)


def _tables(path: Path, old: list[Row], log: VoteLog, new: Iterable[dict], following: int) -> Iterator[pa.Table]:
    if old:
        with pq.ParquetFile(path.absolute()) as file:
            start = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False)
                for at, row in enumerate(old[start : start + len(table)]):
                    if not stays(row, log):
                        continue
                    one, vote = table.slice(at, 1), log.votes.get(row.key)
                    if vote is not None and label_of(vote, row.left) != row.label:
                        one = _table(one.drop_columns(["created_at"]).to_pylist()[0] | _said(vote, row.left))
                    yield one
                start += len(table)
    for number, row in enumerate(new, following):
        yield _table(row | {"ranking_id": number, "__index_level_0__": number})


def _table(row: dict) -> pa.Table:
    return pa.Table.from_pylist([row], schema=PICKAPIC_SCHEMA)
