"""Votes on disk as they are given, one JSON line each, synced before the next pair is shown.

A line says who voted, on what, and what won, by content: the prompt's digest, those of both pictures (of the bytes of
their files) and the winner's. So it means the same whatever stands left the next time, whoever is compared and
whatever was replaced or renamed on disk; and it counts only for the very pictures that it names.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from inpo_fast.runtime.files import parse_json, read_text
from inpo_fast.runtime.record_store import digest

LATEST = 2**33  # seconds since 1970: the year 2242; parquet's times end in 2262
CHOICES = ("left", "right", "tie", "skip")


Pair = tuple[str, str, str]  # digests: of the prompt and of both pictures, these in the order of their digits
Key = tuple[int | None, str, str, str]  # whose vote, and on what


@dataclass(frozen=True)
class Vote:
    """prompt, pictures, winner: digests. winner: None where there is none (choice tie or skip). user: the voter; None
    in lines of older versions, which did not say it."""

    user: int | None
    prompt: str
    pictures: tuple[str, str]  # left and right, as they were shown
    choice: str
    winner: str | None
    time: float

    @property
    def pair(self) -> Pair:
        """What was voted on."""
        return pair_of(self.prompt, *self.pictures)

    @property
    def key(self) -> Key:
        """A later line of the same voter about the same pair counts in place of this one."""
        return (self.user, *self.pair)


def pair_of(prompt: str, left: str, right: str) -> Pair:
    return (prompt, *sorted((left, right)))


def prompt_digest(prompt: str) -> str:
    return digest(prompt.encode())


def made(user: int, prompt: str, pictures: tuple[bytes, bytes], choice: str) -> Vote:
    """A vote that is given now. Equal pictures have no winner."""
    left, right = (digest(picture) for picture in pictures)
    choice = "tie" if left == right and choice != "skip" else choice
    winner = {"left": left, "right": right}.get(choice)
    return Vote(user, prompt_digest(prompt), (left, right), choice, winner, round(time.time(), 3))


class VoteLog:
    """An open log; whoever opens it holds the lock of what is made from it. OSError where it cannot be written."""

    def __init__(self, path: Path):
        self.votes: dict[Key, Vote] = {}  # those in force, in the order they were given
        self.undone: set[Key] = set()
        self.without_pictures = 0  # lines of older versions, which do not say who won
        self.unreadable = 0  # cut short by a crash
        text = read_text(path, errors="replace") if path.exists() else ""
        for line in text.splitlines():
            if line.strip():
                self._take(line)
        self._file = path.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self._file.write("\n")  # ends a line that a crash cut short

    def add(self, vote: Vote) -> None:
        line = {"case": digest(*(part.encode() for part in vote.pair)), "user": vote.user}
        line |= {"prompt": vote.prompt, "pictures": vote.pictures}
        self._write(line | {"choice": vote.choice, "winner": vote.winner, "time": vote.time})
        self._put(vote)

    def undo(self, vote: Vote) -> None:
        case = digest(*(part.encode() for part in vote.pair))
        self._write({"undo": case, "user": vote.user, "prompt": vote.prompt, "pictures": vote.pictures})
        self._drop(vote.key)

    def name_voters(self, voter: Callable[[Pair], int]) -> None:
        """Whose the votes are in lines that do not say it."""
        named = (replace(v, user=voter(v.pair)) if v.user is None else v for v in self.votes.values())
        self.votes = {vote.key: vote for vote in named}

    def close(self) -> None:
        self._file.close()

    def _put(self, vote: Vote) -> None:
        self.votes.pop(vote.key, None)  # to the end
        self.votes[vote.key] = vote
        self.undone.discard(vote.key)

    def _drop(self, key: Key) -> None:
        """A voter takes back a vote of before voters were written down, too."""
        unnamed = (None, *key[1:])
        key = unnamed if key not in self.votes and unnamed in self.votes else key
        self.votes.pop(key, None)
        self.undone.add(key)

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _take(self, line: str) -> None:
        try:
            said = parse_json(line)
            case, prompt, pictures = said.get("undo") or said["case"], said.get("prompt"), said.get("pictures")
            user = said.get("user")
            if pictures is None:
                self.without_pictures += "choice" in said
                return
            left, right = pictures
            if not all(isinstance(x, str) for x in (case, prompt, left, right)):
                raise TypeError("digests are text")
            if user is not None and (type(user) is not int or not 0 <= user < 2**63):
                raise TypeError("a voter is a number")
            if "undo" in said:
                self._drop((user, *pair_of(prompt, left, right)))
                return
            choice, winner = said["choice"], said["winner"]
            fits = winner in (left, right) if choice in ("left", "right") else winner is None and choice in CHOICES
            when = float(said["time"])
            if not (fits and 0 <= when < LATEST):
                raise ValueError("the winner is neither picture, or the time is none")
            self._put(Vote(user, prompt, (left, right), choice, winner, when))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.unreadable += 1


def notice(log: VoteLog, fitting: Iterable[Vote], user: int, rows: set[Key], path: Path) -> str | None:
    """How many lines do not count for this voter's page, and why; None where all do. rows: whose rows there are."""
    fit = {vote.key for vote in fitting}
    others = [key for key in log.votes if key not in fit]
    mine = sum(key[0] == user for key in others)
    parts = (
        (mine, "on pairs that are not among these"),
        (len(others) - mine, "of other voters"),
        (log.without_pictures, "of an older version, which do not say which picture won"),
        (log.unreadable, "that cannot be read"),
    )
    said = [f"{number:,} {what}" for number, what in parts if number]
    if not said:
        return None
    total = sum(number for number, _ in parts)
    stay = "they stay where they are" + (", and so do their rows" if rows.intersection(others) else "")
    lacking = sum(log.votes[key].choice != "skip" and key not in rows for key in others)
    stay += f"; {lacking:,} have no row, which comes when their pairs are shown again" if lacking else ""
    return f"{path.name}: {total:,} lines do not count here ({'; '.join(said)}); {stay}"
