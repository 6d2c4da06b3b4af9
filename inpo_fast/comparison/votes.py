"""Human votes on pairs of pictures: which pairs, which votes were given, and the parquet that training reads.

Votes are appended to a log, one JSON line each, synced before the next pair is shown; the parquet is made from it and
replaced as a whole. What is in the log is not asked again.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from inpo_fast.comparison.model_comparison import NEGATIVE_CONTROL
from inpo_fast.data import records
from inpo_fast.data.pair import BadPair, Source
from inpo_fast.data.parquet import PICKAPIC_SCHEMA
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import whole
from inpo_fast.runtime.record_store import digest

CHOICES = ("left", "right", "tie", "skip")
SAVE_EVERY = 20  # votes between two writings of the parquet


@dataclass(frozen=True)
class Case:
    """Two pictures for one prompt, left and right as they are shown; models: who drew them (the voter is not told)."""

    key: str
    prompt: str
    models: tuple[str, str]
    images: tuple[Callable[[], bytes], Callable[[], bytes]]


def cases_of_evaluation(folder: Path, models: Sequence[str], seed: int) -> list[Case]:
    """Pairs of one prompt and noise from pictures.jsonl; sides and order are drawn. UserError where there is none."""
    listing = folder / "pictures.jsonl"
    if not listing.is_file():
        raise UserError(
            f"--pictures {folder}: no pictures.jsonl; name the --output of inpo_fast.evaluate with its models"
        )
    by_model: dict[str, dict[tuple[str, int], tuple[Path, str]]] = {}
    for number, _, _, record in records.lines(listing):
        try:
            where = by_model.setdefault(record["model"], {})
            where[record["prompt"], record["seed"]] = folder / record["file"], record["image"]
        except (KeyError, TypeError) as problem:
            raise UserError(f"{listing}:{number}: no {problem}; run the evaluation again") from problem
    models = list(models) or [name for name in by_model if name != NEGATIVE_CONTROL][:2]
    if len(models) != 2 or len({*models}) != 2 or not {*models} <= by_model.keys():
        raise UserError(f"--models {' '.join(models)}: give two of {', '.join(by_model)}")
    cases = []
    for (prompt, number), first in by_model[models[0]].items():
        second = by_model[models[1]].get((prompt, number))
        if second is not None and first[1] != second[1]:  # equal pictures: nothing to choose
            key = digest(prompt.encode(), *sorted((first[1].encode(), second[1].encode())))
            sides = [(models[0], first[0]), (models[1], second[0])]
            cases.append(_case(key, prompt, sides, seed, lambda path: path.read_bytes))
    return _shuffled(cases, seed)


def cases_of_source(source: Source, seed: int) -> list[Case]:
    """Every pair of a preference source, to be judged anew."""
    prompts = [record["prompt"] for record in source.facts(())]
    cases = []
    for index, prompt in enumerate(prompts):
        sides = [("better", (index, "winner")), ("worse", (index, "loser"))]
        cases.append(
            _case(source.id(index), prompt, sides, seed, lambda at: lambda: getattr(source.read(at[0]), at[1]))
        )
    return _shuffled(cases, seed)


def _case(key: str, prompt: str, sides: list, seed: int, opener: Callable) -> Case:
    left, right = sides if keyed_rng.hash_key("vote side", seed, key) % 2 else sides[::-1]
    return Case(key, prompt, (left[0], right[0]), (opener(left[1]), opener(right[1])))


def _shuffled(cases: list[Case], seed: int) -> list[Case]:
    if not cases:
        raise UserError("there is no pair to vote on: no prompt has two different pictures")
    return sorted(cases, key=lambda case: keyed_rng.hash_key("vote order", seed, case.key))


class Votes:
    """The cases and the votes on them. Safe from several threads."""

    def __init__(self, cases: Sequence[Case], output: Path, user: int = 0):
        self.cases, self.output, self.user = list(cases), output, user
        self.log = output.with_name(f"{output.name}.votes.jsonl")
        self.lock = threading.Lock()
        self.given: dict[str, dict] = {}  # by case, in the order they were given
        if output.exists() and not self.log.exists():
            raise UserError(f"--output {output} is there, and {self.log.name} beside it is not; name another file")
        if self.log.exists():
            for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    self._apply(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    continue  # cut short by a crash
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.log.open("a", encoding="utf-8")
            if self._file.tell():
                self._file.write("\n")  # ends a line that a crash cut short
        except OSError as problem:
            raise UserError(f"{self.log} cannot be written ({problem.strerror}); name another --output") from problem

    def next(self) -> int | None:
        """The number of the first case without a vote; None when all have one."""
        with self.lock:
            return next((i for i, case in enumerate(self.cases) if case.key not in self.given), None)

    @property
    def done(self) -> int:
        return sum(case.key in self.given for case in self.cases)

    def vote(self, number: int, choice: str) -> None:
        """ValueError for what is no choice or no case. A case keeps its first vote: a form sent twice counts once."""
        if choice not in CHOICES or not 0 <= number < len(self.cases):
            raise ValueError(f"choice {choice!r} of case {number}")
        with self.lock:
            key = self.cases[number].key
            if key in self.given:
                return
            self._write({"case": key, "choice": choice, "time": round(time.time(), 3)})
        if self.done % SAVE_EVERY == 0 or self.done == len(self.cases):
            self.save()

    def undo(self) -> None:
        """Takes the last vote back."""
        with self.lock:
            own = {case.key for case in self.cases}
            if last := [key for key in self.given if key in own]:
                self._write({"undo": last[-1]})

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._apply(line)

    def _apply(self, line: dict) -> None:
        if "undo" in line:
            self.given.pop(line["undo"], None)
        elif line["choice"] in CHOICES:
            self.given[line["case"]] = line

    def save(self) -> int:
        """Writes the parquet: Pick-a-Pic v2's columns, image_0 the one that stood on the left. The number of rows."""
        with self.lock:
            rows = []
            for number, case in enumerate(self.cases):
                vote = self.given.get(case.key)
                if vote is None or vote["choice"] == "skip":
                    continue
                try:
                    rows.append(self._row(number, case, vote))
                except (OSError, BadPair) as problem:
                    raise UserError(f"a picture of {case.prompt[:60]!r} cannot be read ({problem})") from problem
            with whole(self.output) as aside:
                table = pa.Table.from_pylist(rows, schema=PICKAPIC_SCHEMA)
                # a relative path such as a:b/c would be an address to pyarrow
                pq.write_table(table, aside.absolute(), row_group_size=256, compression="zstd")
            return len(rows)

    def _row(self, number: int, case: Case, vote: dict) -> dict:
        left, right = (image() for image in case.images)
        uids = [digest(image) for image in (left, right)]
        label = {"left": 1.0, "right": 0.0, "tie": 0.5}[vote["choice"]]
        best = {"left": uids[0], "right": uids[1], "tie": "tie"}[vote["choice"]]
        return {
            "are_different": label != 0.5,
            "best_image_uid": best,
            "caption": case.prompt,
            "created_at": datetime.fromtimestamp(vote["time"], UTC).replace(tzinfo=None),
            "has_label": True,
            "image_0_uid": uids[0],
            "image_0_url": "",
            "image_1_uid": uids[1],
            "image_1_url": "",
            "jpg_0": left,
            "jpg_1": right,
            "label_0": label,
            "label_1": 1 - label,
            "model_0": case.models[0],
            "model_1": case.models[1],
            "ranking_id": number,
            "user_id": self.user,
            "num_example_per_prompt": sum(other.prompt == case.prompt for other in self.cases),
            "__index_level_0__": number,
        }
