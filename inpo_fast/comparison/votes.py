"""Human votes on pairs of pictures: which pairs, which votes were given, and the parquet that training reads.

Votes are appended to a log (vote_log.py); the parquet is made from it and replaced as a whole. What is in the log is
not asked again, as long as it is about the very pictures of a case.
"""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from inpo_fast.comparison.model_comparison import NEGATIVE_CONTROL
from inpo_fast.comparison.vote_log import CHOICES, Vote, VoteLog, made, notice, skipped
from inpo_fast.data import records
from inpo_fast.data.pair import BadPair, Source
from inpo_fast.data.parquet import PICKAPIC_SCHEMA
from inpo_fast.data.text import unusable
from inpo_fast.runtime import keyed_rng, lock
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import inside, read_regular, whole
from inpo_fast.runtime.record_store import digest

SAVE_EVERY = 20  # votes between two writings of the parquet


@dataclass(frozen=True)
class Case:
    """Two pictures for one prompt, left and right as they are shown; models: who drew them (the voter is not told).
    place: cases with neighbouring ones are read fastest one after another."""

    key: str
    prompt: str
    models: tuple[str, str]
    images: tuple[Callable[[], bytes], Callable[[], bytes]]
    place: int = 0

    def pictures(self) -> tuple[bytes, bytes]:
        """OSError, BadPair or UserError where one cannot be read."""
        left, right = self.images
        return left(), right()


class Contradiction(ValueError):
    """A second vote on a case, other than the first."""


def cases_of_evaluation(folder: Path, models: Sequence[str], seed: int) -> list[Case]:
    """Pairs of one prompt and noise from pictures.jsonl; sides and order are drawn. UserError where there is none."""
    listing = folder / "pictures.jsonl"
    if not listing.is_file():
        raise UserError(
            f"--pictures {folder}: no pictures.jsonl; name the --output of inpo_fast.evaluate with its models"
        )
    by_model: dict[str, dict[tuple[str, int], tuple[Path, str]]] = {}
    for number, _, _, record in records.lines(listing):
        where, (model, prompt, seed, file, image) = f"{listing}:{number}", _fields(record, f"{listing}:{number}")
        if wrong := unusable(prompt):
            raise UserError(f"{where}: {wrong}; run the evaluation again")
        try:
            path = inside(folder, file)
        except (OSError, ValueError) as problem:
            why = getattr(problem, "strerror", None) or "no name of a file"
            raise UserError(f"{where}: file {file!r}: {why}; only pictures below the folder are shown") from problem
        by_model.setdefault(model, {})[prompt, seed] = path, image
    models = list(models) or [name for name in by_model if name != NEGATIVE_CONTROL][:2]
    if len(models) != 2 or len({*models}) != 2 or not {*models} <= by_model.keys():
        raise UserError(f"--models {' '.join(models)}: give two of {', '.join(by_model)}")
    cases = []
    for (prompt, number), first in by_model[models[0]].items():
        second = by_model[models[1]].get((prompt, number))
        if second is not None and first[1] != second[1]:  # equal pictures: nothing to choose
            key = digest(prompt.encode(), *sorted((first[1].encode(), second[1].encode())))
            sides = [(models[0], first[0]), (models[1], second[0])]
            cases.append(_case(key, prompt, sides, seed, lambda path: lambda: read_regular(path)))
    return _shuffled(cases, seed)


def _fields(record: object, where: str) -> tuple:
    """model, prompt, seed, file and image of a line of pictures.jsonl."""
    kinds = {"model": str, "prompt": str, "seed": int, "file": str, "image": str}
    values = [record.get(name) if isinstance(record, dict) else None for name in kinds]
    for (name, kind), value in zip(kinds.items(), values, strict=True):
        if not isinstance(value, kind):
            raise UserError(f"{where}: no {name!r}; run the evaluation again")
    return tuple(values)


def cases_of_source(source: Source, seed: int) -> list[Case]:
    """Every pair of a preference source that has a usable prompt, to be judged anew."""
    prompts = [record["prompt"] for record in source.facts(())]
    cases = []
    for index, prompt in enumerate(prompts):
        if unusable(prompt):
            continue  # a broken pair
        sides = [("better", (index, "winner")), ("worse", (index, "loser"))]
        read = lambda at: lambda: getattr(source.read(at[0]), at[1])  # noqa: E731
        cases.append(_case(source.id(index), prompt, sides, seed, read, index))
    return _shuffled(cases, seed)


def _case(key: str, prompt: str, sides: list, seed: int, opener: Callable, place: int = 0) -> Case:
    left, right = sides if keyed_rng.hash_key("vote side", seed, key) % 2 else sides[::-1]
    return Case(key, prompt, (left[0], right[0]), (opener(left[1]), opener(right[1])), place)


def _shuffled(cases: list[Case], seed: int) -> list[Case]:
    if not cases:
        raise UserError("there is no pair to vote on: no prompt has two different pictures")
    return sorted(cases, key=lambda case: keyed_rng.hash_key("vote order", seed, case.key))


class Votes:
    """The cases and the votes on them. Safe from several threads; one at a time for an output."""

    def __init__(self, cases: Sequence[Case], output: Path, user: int = 0):
        """Looks at the pictures of cases that have a vote. UserError where another process votes for this output."""
        self.cases, self.output, self.user = list(cases), output, user
        path = output.with_name(f"{output.name}.votes.jsonl")
        self.lock = threading.Lock()
        if output.exists() and not path.exists():
            raise UserError(f"--output {output} is there, and {path.name} beside it is not; name another file")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._held = lock.take(output.parent, f".{output.name}.lock", of=output)
            self.log = VoteLog(path)
        except OSError as problem:
            raise UserError(f"{path} cannot be written ({problem.strerror}); name another --output") from problem
        self.given: dict[str, Vote] = {}  # by case, in the order they were given
        self._find()
        self.notice = notice(self.log, self.given.values(), (case.key for case in self.cases), path)

    def _find(self) -> None:
        """The votes of the log that are about these very pictures."""
        asked = {vote.case for vote in self.log.votes.values()}
        about = {}
        for case in sorted(self.cases, key=lambda case: case.place):  # neighbours in a file together
            if case.key in asked and case.key not in about:
                try:
                    about[case.key] = made(case.key, case.prompt, case.pictures(), "skip").about
                except (OSError, BadPair, UserError):
                    about[case.key] = None
        self.given = {vote.case: vote for key, vote in self.log.votes.items() if about.get(vote.case) == key}

    def close(self) -> None:
        """Gives the output back."""
        self.log.close()
        os.close(self._held)

    def next(self) -> int | None:
        """The number of the first case without a vote; None when all have one."""
        with self.lock:
            return next((i for i, case in enumerate(self.cases) if case.key not in self.given), None)

    @property
    def done(self) -> int:
        return sum(case.key in self.given for case in self.cases)

    def vote(self, number: int, choice: str) -> None:
        """ValueError for what is no choice or no case; Contradiction, saying so, where the case has another vote: the
        first one stays, and the same form sent twice counts once."""
        if choice not in CHOICES or not 0 <= number < len(self.cases):
            raise ValueError(f"choice {choice!r} of case {number}")
        case = self.cases[number]
        with self.lock:
            try:
                vote = made(case.key, case.prompt, case.pictures(), choice)
            except (OSError, BadPair) as problem:
                if choice != "skip":
                    raise UserError(f"a picture of {case.prompt[:60]!r} cannot be read ({problem})") from problem
                self.given[case.key] = skipped(case.key, case.prompt)  # the next time it is asked again
                return
            if first := self.given.get(case.key):
                if (first.choice, first.winner) != (vote.choice, vote.winner):
                    raise Contradiction("this pair has another vote already; undo takes the last one back")
                return
            self.log.add(vote)
            self.given[case.key] = vote
        if self.done % SAVE_EVERY == 0 or self.done == len(self.cases):
            self.save()

    def undo(self) -> None:
        """Takes the last vote back."""
        with self.lock:
            if self.given:
                _, vote = self.given.popitem()
                self.log.undo(vote)

    def save(self) -> int:
        """Writes the parquet: Pick-a-Pic v2's columns, image_0 the one that stands on the left. The number of rows."""
        with self.lock:
            rows = []
            for number, case in enumerate(self.cases):
                vote = self.given.get(case.key)
                if vote is None or vote.choice == "skip":
                    continue
                try:
                    pictures = case.pictures()
                except (OSError, BadPair) as problem:
                    raise UserError(f"a picture of {case.prompt[:60]!r} cannot be read ({problem})") from problem
                if made(case.key, case.prompt, pictures, "skip").about != vote.about:
                    del self.given[case.key]  # replaced while they were voted on: it is asked again
                    continue
                rows.append(self._row(number, case, pictures, vote))
            with whole(self.output) as aside:
                table = pa.Table.from_pylist(rows, schema=PICKAPIC_SCHEMA)
                # a relative path such as a:b/c would be an address to pyarrow
                pq.write_table(table, aside.absolute(), row_group_size=256, compression="zstd")
            return len(rows)

    def _row(self, number: int, case: Case, pictures: tuple[bytes, bytes], vote: Vote) -> dict:
        (left, right), uids = pictures, [digest(picture) for picture in pictures]
        label = 0.5 if vote.winner is None else float(vote.winner == uids[0])
        return {
            "are_different": label != 0.5,
            "best_image_uid": vote.winner or "tie",
            "caption": case.prompt,
            "created_at": datetime.fromtimestamp(vote.time, UTC).replace(tzinfo=None),
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
