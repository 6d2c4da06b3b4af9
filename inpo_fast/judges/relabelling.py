"""Labels of a source's pairs by judges, written as a sidecar in parts (`python -m inpo_fast.relabel`).

Bradley-Terry: an image that scores s better is the better one with probability sigmoid(s / temperature); several judges
give the mean of their probabilities or the share of their votes (section 5.3 and S8 of arXiv 2503.18454 take single
judges). An interrupted relabelling goes on at the first part that is missing.
"""

import json
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inpo_fast.data.config import DataConfig
from inpo_fast.data.identity import identity_of
from inpo_fast.data.images import decode
from inpo_fast.data.pair import BadPair, Source
from inpo_fast.data.relabelled import METADATA
from inpo_fast.judges import Judge, judge_id
from inpo_fast.judges.cache import ScoreCache
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import parse_json, read_text, whole, write_text
from inpo_fast.runtime.progress import picture_progress

PART = 512  # pairs that are judged between two writes


def probabilities(better: np.ndarray, worse: np.ndarray, temperature: float, tie: float) -> np.ndarray:
    """(N,): Bradley-Terry's that the first is better, 1/2 for ties; NaN where a score is."""
    difference = better - worse
    with np.errstate(over="ignore"):
        chance = 1 / (1 + np.exp(-difference / temperature))
    return np.where(np.abs(difference) < tie, 0.5, chance)


def vote(each: Sequence[np.ndarray], how: str) -> tuple[np.ndarray, np.ndarray]:
    """(soft, hard), (N,) each, from the judges' probabilities (N,)."""
    stacked = np.stack(each)
    if how == "majority":
        stacked = np.where(np.isnan(stacked), np.nan, np.where(stacked == 0.5, 0.5, stacked > 0.5))
    soft = stacked.mean(0)
    hard = np.where(np.isnan(soft), np.nan, np.where(np.abs(soft - 0.5) < 1e-9, 0.5, soft > 0.5))
    return soft, hard


def score_part(
    source: Source, rows: range, judges: Sequence[Judge], config: DataConfig, cache: ScoreCache | None = None
) -> pa.Table:
    """id and both scores of each judge for some pairs; null where a pair is broken.

    cache: of judges whose scores cost something, so that not even a part's are lost.
    """
    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        read = list(pool.map(lambda index: _read(source, index, config.max_pixels), rows))
    good = [i for i, found in enumerate(read) if found is not None]
    columns: dict = {"id": [source.id(index) for index in rows]}
    for judge in judges:
        scores = np.full((len(rows), 2), np.nan)
        if good:
            images = [image for i in good for image in read[i][1]]
            prompts = [read[i][0] for i in good for _ in range(2)]
            judge.check(prompts)
            paid = cache is not None and hasattr(judge, "cost")
            found = cache.score(judge, images, prompts) if paid else judge.score(images, prompts)
            scores[good] = found.total.reshape(-1, 2)
        for side, name in enumerate(("better", "worse")):
            columns[f"{name}.{judge.name}"] = pa.array(scores[:, side], from_pandas=True)
    return pa.table(columns)


def _read(source: Source, index: int, max_pixels: int) -> tuple[str, list[np.ndarray]] | None:
    try:
        pair = source.read(index)
        return pair.prompt, [np.asarray(decode(image, max_pixels)) for image in (pair.winner, pair.loser)]
    except BadPair:
        return None  # the trainer will drop it and say so


def relabel(source: Source, judges: Sequence[Judge], output: Path, config: DataConfig) -> Path:
    """Scores of all pairs, in parts beside `output`; this process takes its share. The folder of the parts."""
    rank, world = distributed.rank_and_world()
    folder = output.with_name(f".{output.name}.parts")
    about = {"source": identity_of(source), "judges": [judge_id(judge) for judge in judges]}
    if rank == 0:
        _start(folder, about, output)
    distributed.barrier()
    parts = [range(lo, min(lo + PART, len(source))) for lo in range(0, len(source), PART)]
    missing = [number for number in range(len(parts)) if not _part(folder, number).exists()]
    distributed.barrier()  # all have looked before anybody adds
    count = sum(2 * len(parts[number]) for number in missing)
    for judge in judges:
        if rank == 0 and count and hasattr(judge, "cost"):
            print(f"judge {judge.name}: {judge.cost(count)}")
    mine, cache = missing[rank::world], ScoreCache(folder / "scores")
    with picture_progress(sum(2 * len(parts[n]) for n in mine), "judge", shown=rank == 0) as advance:
        for number in mine:
            table = score_part(source, parts[number], judges, config, cache)
            try:
                with whole(_part(folder, number)) as aside:
                    pq.write_table(table, aside.absolute())  # a:b/c would be an address to pyarrow
            except OSError as problem:
                raise UserError(
                    f"{folder} cannot be written ({problem.strerror}); free some space and repeat the command: it goes "
                    "on where it stopped"
                ) from problem
            advance(2 * len(parts[number]), "pairs")
    distributed.barrier()
    return folder


def finish(folder: Path, output: Path, judges: Sequence[Judge], temperatures: Sequence[float], how: str, about: dict):
    """Joins the parts to the sidecar, whole or not at all; the parts go."""
    table = pa.concat_tables(pq.read_table(path.absolute()) for path in sorted(folder.glob("*.parquet")))
    each = []
    for judge, temperature in zip(judges, temperatures, strict=True):
        sides = [table[f"{name}.{judge.name}"].to_numpy(zero_copy_only=False) for name in ("better", "worse")]
        each.append(probabilities(*sides, temperature, judge.tie))
    soft, hard = vote(each, how)
    for position, (name, values) in enumerate((("soft", soft), ("hard", hard)), 1):
        table = table.add_column(position, name, pa.array(values, from_pandas=True))
    table = table.replace_schema_metadata({METADATA: json.dumps(about).encode()})
    with whole(output) as aside:
        pq.write_table(table, aside.absolute(), compression="zstd")
    shutil.rmtree(folder)
    return table


def _start(folder: Path, about: dict, output: Path) -> None:
    notes = folder / "about.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = re.compile(r"\d{6}\.parquet|scores|about\.json|\.tmp-.*")
        if not all(ours.fullmatch(path.name) for path in folder.iterdir()):
            raise UserError(f"{folder} holds other things than a relabelling's; move it away, or name another --output")
        if notes.exists() and parse_json(read_text(notes)) != about:
            raise UserError(
                f"{folder} holds the beginning of another relabelling (other pairs or judges); remove it, or name "
                f"another --output than {output}"
            )
        write_text(notes, json.dumps(about, indent=1))
    except (OSError, ValueError) as problem:
        raise UserError(f"{folder} cannot be written or read ({problem}); name another --output") from problem


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"


def report(table: pa.Table, judges: Sequence[Judge], output: Path) -> None:
    hard = table["hard"].to_numpy(zero_copy_only=False).astype(np.float64)
    seen = int((~np.isnan(hard)).sum())
    agree, ties = int((hard == 1).sum()), int((hard == 0.5).sum())
    names = ", ".join(judge.name for judge in judges)
    print(
        f"{output}: {seen:,} pairs labelled by {names}; {agree:,} as in the source, "
        f"{seen - agree - ties:,} turned around, {ties:,} ties, {len(hard) - seen:,} without a label "
        "(unreadable, or no clear score)"
    )
