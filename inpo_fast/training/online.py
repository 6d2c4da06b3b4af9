"""Online training: every few steps new pairs are drawn by the policy itself, judged, and mixed into the data.

A round is `every` steps. Before its first step the policy, as it is, draws `candidates` pictures for the prompt of each
position that falls to it; the judge's favourite wins, its least one loses, and the pair takes the place of the stored
one at that position. Where the judge sees no difference the stored pair stays.

Which positions (a draw from seed and position), the noise (seed, position, candidate) and the weights (those after so
many steps) fix a round: it is the same on any number of processes and after a resume. Its pictures are parquet files of
Pick-a-Pic's schema in the run's folder, online/STEP/NNNNN.parquet, written whole, each drawn in batches of its own; a
run that is stopped while it draws keeps those it has.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from inpo_fast.comparison.drawing import draw, drawing_with
from inpo_fast.config import OnlineConfig, RunConfig
from inpo_fast.data.images import png
from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.data.parquet import ParquetSource
from inpo_fast.data.places import File
from inpo_fast.judges import Judge
from inpo_fast.judges.registry import make_judge
from inpo_fast.models.models import Models
from inpo_fast.runtime import distributed, keyed_rng
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import whole
from inpo_fast.runtime.preemption import Preempted, Preemption
from inpo_fast.training.saved_checkpoint import found, step_of

FOLDER = "online"  # of the run
CHUNK = 64  # pairs of a file: what an interruption costs at most
CACHE_BYTES = 2**28  # of files that are being read
SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("score_0", pa.float64()),
        ("score_1", pa.float64()),
        ("position", pa.int64()),
    ]
)


class Online:
    """The rounds of a run. `begin` before a round's first step, then `pair` for its positions."""

    def __init__(self, how: OnlineConfig, *, seed: int, steps: int, pairs_per_step: int, run: Path, judge: Judge):
        """steps, pairs_per_step: as of train.*; run: the run's folder."""
        self.how, self.seed, self.steps, self.pairs_per_step, self.judge = how, seed, steps, pairs_per_step, judge
        self.folder, self.checkpoints = run / FOLDER, run / "checkpoints"
        self.rank, self.world = distributed.rank_and_world()
        self._source: ParquetSource | None = None
        self._index: dict[int, int] = {}  # of a position in the source

    def begins(self, step: int) -> bool:
        """Whether a round starts with this step."""
        return step >= self.how.start and (step - self.how.start) % self.how.every == 0

    def round_of(self, step: int) -> int | None:
        """Its first step; None before the first round."""
        return None if step < self.how.start else step - (step - self.how.start) % self.how.every

    def segments(self, first: int) -> list[tuple[int, int]]:
        """Steps from `first` to the last, cut where a round begins: nothing is read across."""
        cuts = [first, *(step for step in range(first + 1, self.steps) if self.begins(step)), self.steps]
        return list(pairwise(cuts))

    def positions(self, first: int) -> list[int]:
        """Of the round that starts with this step: those whose pairs are drawn."""
        last = min(first + self.how.every, self.steps)
        span = range(first * self.pairs_per_step, last * self.pairs_per_step)
        return [p for p in span if keyed_rng.uniform("online", self.seed, p) < self.how.mix]

    def pair(self, position: int) -> Pair | None:
        """What was drawn for a position of this round, None where the stored pair stays."""
        index = self._index.get(position)
        return None if index is None else self._source.read(index)

    def forget_after(self, done: int) -> None:
        """What steps past the checkpoint left behind: other weights will draw it again. What else is there stays."""
        for path in self.folder.glob("*"):
            if path.name.startswith(".tmp-") or (path.name.isdigit() and int(path.name) > done):
                shutil.rmtree(path, ignore_errors=True)

    def begin(
        self,
        step: int,
        models: Models,
        prompt_of: Callable[[int], str],
        preemption: Preemption,
        show: Callable[[int, int], None] = lambda drawn, wanted: None,
    ) -> dict[str, float]:
        """Opens the round that `step` belongs to; where it starts here, draws what is missing of it. Metrics.

        All processes call it. prompt_of: the stored pair's, by position; BadPair where it has none. show: told how
        many pictures of how many this process has drawn. UserError where pairs that were trained on are gone.
        Preempted, on all processes, where one was asked to stop: what is drawn stays.
        """
        first = self.round_of(step)
        self._source, self._index = None, {}
        if first is None:
            return {}
        folder, positions = self.folder / f"{first:06d}", self.positions(first)
        chunks = [positions[lo : lo + CHUNK] for lo in range(0, len(positions), CHUNK)]
        missing = [number for number in range(len(chunks)) if not _file(folder, number).exists()]
        if missing and step != first:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(chunks)} files of pairs that steps {first} to {step - 1} used; "
                "put them back, or remove the checkpoints after that step and continue with --resume from one before"
            )
        distributed.barrier()  # all have looked before anybody adds
        if self.rank == 0 and not self.how.keep:
            self._prune(first)
        mine = missing[self.rank :: self.world]
        wanted, drawn = self.how.candidates * sum(len(chunks[number]) for number in mine), 0
        with drawing_with(models.pipeline, models.policy):
            for number in mine:
                if preemption.asked:
                    break
                try:
                    table = self._chunk(chunks[number], models, prompt_of, preemption)
                except Preempted:
                    break
                self._write(table, _file(folder, number))
                drawn += self.how.candidates * len(chunks[number])
                show(drawn, wanted)
        preemption.agree(step, preemption.asked)  # also: from here on all files are there
        if not chunks:
            return {}
        self._source = ParquetSource([_place(_file(folder, number)) for number in range(len(chunks))], CACHE_BYTES)
        at = [
            pq.read_table(_file(folder, number).absolute(), columns=["position"])["position"]
            for number in range(len(chunks))
        ]
        self._index = {position: index for index, position in enumerate(p for part in at for p in part.to_pylist())}
        if step != first:
            return {}
        return {
            "online_pairs": len(self._index),
            "online_ties": len(positions) - len(self._index),
            "online_evaluations": len(positions) * self.how.evaluations_a_pair,
        }

    def _chunk(
        self, positions: Sequence[int], models: Models, prompt_of: Callable[[int], str], preemption: Preemption
    ) -> pa.Table:
        """Some pairs; fewer rows than positions where there is no prompt or no better picture."""
        how, prompts = self.how, {}
        for position in positions:
            with contextlib.suppress(BadPair):  # the trainer meets it at this position and says so
                prompts[position] = prompt_of(position)
        captions = [prompt for prompt in prompts.values() for _ in range(how.candidates)]
        keys = [("online", self.seed, position, k) for position in prompts for k in range(how.candidates)]
        self.judge.check(captions)
        settings = {"steps": how.sampler_steps, "guidance": how.guidance, "batch": how.batch}
        settings["advance"] = lambda _: preemption.check()
        pictures = draw(models.pipeline, captions, keys, **settings)
        scores = self.judge.score(pictures, captions).total.reshape(-1, how.candidates)
        rows = []
        for row, (position, prompt) in enumerate(prompts.items()):
            best, worst = int(scores[row].argmax()), int(scores[row].argmin())
            if not scores[row, best] - scores[row, worst] >= self.judge.tie:  # also where a score is no number
                continue
            winner, loser = (png(pictures[row * how.candidates + k]) for k in (best, worst))
            values = (prompt, winner, loser, 1.0, 0.0, scores[row, best], scores[row, worst], position)
            rows.append(dict(zip(SCHEMA.names, values, strict=True)))
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def _write(self, table: pa.Table, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as aside:
                pq.write_table(table, aside.absolute(), compression="none")  # pictures are compressed
        except OSError as problem:
            raise UserError(
                f"{path} cannot be written ({problem.strerror}); free some space and continue with --resume: what was "
                "drawn of this round is complete"
            ) from problem

    def _prune(self, first: int) -> None:
        """Rounds before this one that no checkpoint would continue in."""
        steps = [step_of(path) for path in found(self.checkpoints)]
        oldest = min([first, *(self.round_of(step) or 0 for step in steps)])
        for path in self.folder.glob("*"):
            if path.name.isdigit() and int(path.name) < oldest:
                shutil.rmtree(path, ignore_errors=True)


def open_online(config: RunConfig, device: torch.device) -> Online | None:
    """None for a run without rounds. UserError where the judge cannot be had."""
    how, train = config.online, config.train
    if not how.every:
        return None
    judge = make_judge(how.judge, device, how.batch)
    run = Path(config.output)
    return Online(how, seed=config.seed, steps=train.steps, pairs_per_step=train.pairs_per_step, run=run, judge=judge)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def _place(path: Path) -> File:
    return File(str(path), f"{path.parent.parent.name}/{path.parent.name}/{path.name}")
