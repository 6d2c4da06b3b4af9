"""Human votes on pairs of pictures: which pairs, which votes were given, and the parquet that training reads.

Votes are appended to a log (vote_log.py); the parquet is made from it (vote_rows.py) and replaced as a whole. What is
in the log is not asked again of the same voter, as long as it is about the very pictures of a case.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from inpo_fast.comparison.model_comparison import NEGATIVE_CONTROL
from inpo_fast.comparison.vote_log import CHOICES, Pair, Vote, VoteLog, made, notice, pair_of, prompt_digest
from inpo_fast.comparison.vote_rows import label_of, new_row, read_rows, stays, voter_of, write_rows
from inpo_fast.data import records
from inpo_fast.data.pair import BadPair, Source
from inpo_fast.data.text import unusable
from inpo_fast.runtime import keyed_rng, lock
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import inside, read_regular
from inpo_fast.runtime.record_store import digest

SAVE_EVERY = 20  # votes between two writings of the parquet


@dataclass(frozen=True)
class Case:
    """Two pictures for one prompt, left and right as they are shown; models: who drew them (the voter is not told).
    key: of the order and the sides alone. place: cases with neighbouring ones are read fastest one after another."""

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
        cases.append(_case(digest(prompt.encode(), str(index).encode()), prompt, sides, seed, read, index))
    return _shuffled(cases, seed)


def _case(key: str, prompt: str, sides: list, seed: int, opener: Callable, place: int = 0) -> Case:
    left, right = sides if keyed_rng.hash_key("vote side", seed, key) % 2 else sides[::-1]
    return Case(key, prompt, (left[0], right[0]), (opener(left[1]), opener(right[1])), place)


def _shuffled(cases: list[Case], seed: int) -> list[Case]:
    if not cases:
        raise UserError("there is no pair to vote on: no prompt has two different pictures")
    return sorted(cases, key=lambda case: keyed_rng.hash_key("vote order", seed, case.key))


class Votes:
    """The cases, and the votes of one voter on them. Safe from several threads; one at a time for an output."""

    def __init__(self, cases: Sequence[Case], output: Path, user: int = 0):
        """Looks at the pictures of cases whose prompt has a vote. UserError where another process votes for this
        output, or where it is something else than votes."""
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
        try:
            named = voter_of(rows := read_rows(output), self.log)
        except UserError:
            self.close()
            raise
        self.log.name_voters(lambda pair: named.get(pair, 0))
        self._prompts = [prompt_digest(case.prompt) for case in self.cases]
        self._of_prompt = Counter(self._prompts)
        self._pairs: dict[int, Pair | None] = {}  # by case, of those that were looked at; None: cannot be read
        self._unread: set[int] = set()  # cases skipped as their pictures cannot be read: asked again the next time
        self.given: dict[Pair, Vote] = {}  # of this voter on these cases
        self._find()
        self._order: list[Pair | int] = [*self.given]  # what undo takes back: votes, and cases in _unread
        self.notice = notice(self.log, self.given.values(), user, {row.key for row in rows}, path)

    def _find(self) -> None:
        """The votes of the log that are this voter's, about these very pictures."""
        mine = {vote.pair: vote for vote in self.log.votes.values() if vote.user == self.user}
        shown = self._looked_up({pair[0] for pair in mine})
        self.given = {pair: vote for pair, vote in mine.items() if pair in shown}

    def _looked_up(self, prompts: set[str]) -> dict[Pair, int]:
        """The cases with these prompts by what their pictures are."""
        asked = [number for number, prompt in enumerate(self._prompts) if prompt in prompts]
        for number in sorted(asked, key=lambda number: self.cases[number].place):  # neighbours in a file together
            self._pair(number)
        return {pair: number for number in reversed(asked) if (pair := self._pairs[number])}

    def _pair(self, number: int) -> Pair | None:
        if number not in self._pairs:
            try:
                pictures = self.cases[number].pictures()
                self._pairs[number] = pair_of(self._prompts[number], *map(digest, pictures))
            except (OSError, BadPair, UserError):
                self._pairs[number] = None
        return self._pairs[number]

    def close(self) -> None:
        """Gives the output back."""
        self.log.close()
        os.close(self._held)

    def _is_done(self, number: int, voted: set[str]) -> bool:
        """voted: the prompts of this voter's votes; other cases need not be looked at."""
        return number in self._unread or (self._prompts[number] in voted and self._pair(number) in self.given)

    def _done(self) -> Iterator[bool]:
        voted = {pair[0] for pair in self.given}
        return (self._is_done(number, voted) for number in range(len(self.cases)))

    def next(self) -> int | None:
        """The number of the first case without a vote; None when all have one."""
        with self.lock:
            return next((number for number, is_done in enumerate(self._done()) if not is_done), None)

    @property
    def done(self) -> int:
        with self.lock:
            return sum(self._done())

    def vote(self, number: int, choice: str) -> None:
        """ValueError for what is no choice or no case; Contradiction, saying so, where the case has another vote of
        this voter: the first one stays, and the same form sent twice counts once."""
        if choice not in CHOICES or not 0 <= number < len(self.cases):
            raise ValueError(f"choice {choice!r} of case {number}")
        case = self.cases[number]
        with self.lock:
            try:
                vote = made(self.user, case.prompt, case.pictures(), choice)
            except (OSError, BadPair) as problem:
                if choice != "skip":
                    raise UserError(f"a picture of {case.prompt[:60]!r} cannot be read ({problem})") from problem
                if number not in self._unread:
                    self._unread.add(number)
                    self._order.append(number)
                return
            self._pairs[number] = vote.pair
            if first := self.given.get(vote.pair):
                if (first.choice == "skip", first.winner) != (vote.choice == "skip", vote.winner):
                    raise Contradiction("this pair has another vote already; undo takes the last one back")
                return
            self.log.add(vote)
            self.given[vote.pair] = vote
            self._order.append(vote.pair)
        done = self.done
        if done % SAVE_EVERY == 0 or done == len(self.cases):
            self.save()

    def undo(self) -> None:
        """Takes the last vote back."""
        with self.lock:
            if self._order:
                last = self._order.pop()
                if isinstance(last, int):
                    self._unread.discard(last)
                else:
                    self.log.undo(self.given.pop(last))

    def save(self) -> int:
        """Writes the parquet: Pick-a-Pic v2's columns, image_0 the one that stood on the left. Rows of votes on other
        pairs and of other voters stay; where nothing is to change, nothing is written. The number of rows."""
        with self.lock:
            old = read_rows(self.output)
            kept = [row for row in old if stays(row, self.log)]
            has_row = {row.key for row in kept}
            votes = [v for v in self.log.votes.values() if v.choice != "skip" and v.key not in has_row]
            shown = self._looked_up({vote.pair[0] for vote in votes})
            votes = [vote for vote in votes if vote.pair in shown]
            new, lost = [], None
            for vote in votes:
                case = self.cases[number := shown[vote.pair]]
                try:
                    pictures = case.pictures()
                except (OSError, BadPair, UserError) as problem:
                    lost = lost or UserError(f"a picture of {case.prompt[:60]!r} cannot be read ({problem})")
                    continue
                if pair_of(self._prompts[number], *map(digest, pictures)) != vote.pair:
                    del self._pairs[number]  # replaced while they were voted on: it is asked again
                    continue
                new.append(new_row(vote, case.prompt, case.models, pictures, self._of_prompt[self._prompts[number]]))
            said = [(row, self.log.votes.get(row.key)) for row in kept]
            if new or len(kept) < len(old) or any(vote and label_of(vote, row.left) != row.label for row, vote in said):
                write_rows(self.output, old, self.log, new)
            if lost:
                raise lost  # the others are written
            return len(kept) + len(new)
