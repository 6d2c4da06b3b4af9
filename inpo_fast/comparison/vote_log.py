"""Votes on disk as they are given, one JSON line each, synced before the next pair is shown.

A line says what was voted on and what won, by content: the prompt's digest, those of both pictures (of the bytes of
their files) and the winner's. So it means the same whatever stands left the next time, whoever is compared and
whatever was replaced on disk; and it counts only for the very pictures that it names.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from inpo_fast.runtime.files import parse_json, read_text
from inpo_fast.runtime.record_store import digest

LATEST = 2**33  # seconds since 1970: the year 2242; parquet's times end in 2262
CHOICES = ("left", "right", "tie", "skip")


@dataclass(frozen=True)
class Vote:
    """prompt, pictures, winner: digests. winner: None where there is none (choice tie or skip)."""

    case: str
    prompt: str
    pictures: tuple[str, str]  # left and right, as they were shown
    choice: str
    winner: str | None
    time: float

    @property
    def about(self) -> tuple:
        """What was voted on; a later line about the same counts in place of this one."""
        return (self.case, self.prompt, *sorted(self.pictures))


def made(case: str, prompt: str, pictures: tuple[bytes, bytes], choice: str) -> Vote:
    """A vote that is given now. Equal pictures have no winner."""
    left, right = (digest(picture) for picture in pictures)
    choice = "tie" if left == right and choice != "skip" else choice
    winner = {"left": left, "right": right}.get(choice)
    return Vote(case, digest(prompt.encode()), (left, right), choice, winner, round(time.time(), 3))


def skipped(case: str, prompt: str) -> Vote:
    """Of pictures that cannot be read."""
    return Vote(case, digest(prompt.encode()), ("", ""), "skip", None, round(time.time(), 3))


class VoteLog:
    """An open log; whoever opens it holds the lock of what is made from it. OSError where it cannot be written."""

    def __init__(self, path: Path):
        self.votes: dict[tuple, Vote] = {}  # those in force, in the order they were given
        self.without_pictures = 0  # lines of older versions, which do not say who won
        self.unreadable = 0  # cut short by a crash
        for line in read_text(path, errors="replace").splitlines() if path.exists() else ():
            if line.strip():
                self._take(line)
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell():
            self._file.write("\n")  # ends a line that a crash cut short

    def add(self, vote: Vote) -> None:
        line = {"case": vote.case, "prompt": vote.prompt, "pictures": vote.pictures}
        self._write(line | {"choice": vote.choice, "winner": vote.winner, "time": vote.time})
        self._put(vote)

    def undo(self, vote: Vote) -> None:
        self._write({"undo": vote.case, "prompt": vote.prompt, "pictures": vote.pictures})
        self.votes.pop(vote.about, None)

    def close(self) -> None:
        self._file.close()

    def _put(self, vote: Vote) -> None:
        self.votes.pop(vote.about, None)  # to the end
        self.votes[vote.about] = vote

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _take(self, line: str) -> None:
        try:
            said = parse_json(line)
            case, prompt, pictures = said.get("undo") or said["case"], said.get("prompt"), said.get("pictures")
            if pictures is None:
                self.without_pictures += "choice" in said
                return
            left, right = pictures
            if not all(isinstance(x, str) for x in (case, prompt, left, right)):
                raise TypeError("digests are text")
            if "undo" in said:
                self.votes.pop((case, prompt, *sorted((left, right))), None)
                return
            choice, winner = said["choice"], said["winner"]
            fits = winner in (left, right) if choice in ("left", "right") else winner is None and choice in CHOICES
            when = float(said["time"])
            if not (fits and 0 <= when < LATEST):
                raise ValueError("the winner is neither picture, or the time is none")
            self._put(Vote(case, prompt, (left, right), choice, winner, when))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.unreadable += 1


def notice(log: VoteLog, fitting: Iterable[Vote], cases: Iterable[str], path: Path) -> str | None:
    """How many lines do not count for these cases, and why; None where all do."""
    fit, known = {vote.about for vote in fitting}, set(cases)
    others = [vote for about, vote in log.votes.items() if about not in fit]
    changed = sum(vote.case in known for vote in others)
    parts = (
        (len(others) - changed, "on pairs that are not among these"),
        (changed, "on pairs whose prompt or pictures are others now"),
        (log.without_pictures, "of an older version, which do not say which picture won"),
        (log.unreadable, "that cannot be read"),
    )
    said = [f"{number:,} {what}" for number, what in parts if number]
    if not said:
        return None
    total = sum(number for number, _ in parts)
    return f"{path.name}: {total:,} lines do not count here ({'; '.join(said)}); they stay where they are"
