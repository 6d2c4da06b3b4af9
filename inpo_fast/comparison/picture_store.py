"""Pictures on disk as they are drawn, one PNG each: an interrupted evaluation goes on, and nothing is drawn twice.

A folder for each model and way of drawing, whose name ends in a digest of both; a file for each prompt and seed.
Pictures are read when they are looked at, so that thousands of them need no memory.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inpo_fast.data.images import decode, png
from inpo_fast.data.pair import BadPair
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import read_regular, whole, write_text
from inpo_fast.runtime.record_store import digest

MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Stored(Sequence):
    """Pictures of files, (H, W, 3) uint8, read one at a time."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [read_picture(path) for path in self.files[index]]
        return read_picture(self.files[index])


def read_picture(path: Path) -> np.ndarray:
    try:
        return np.asarray(decode(read_regular(path), MAX_PIXELS))
    except (OSError, BadPair) as problem:
        raise UserError(f"{path}: cannot be read ({problem}); remove it, and it is drawn again") from problem


class PictureStore:
    """The pictures of one model. identity: plain values that decide what it draws for a prompt and a seed."""

    def __init__(self, folder: Path, name: str, identity: dict):
        secret = json.dumps(identity, sort_keys=True)
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:60]
        self.folder, self.identity = folder / f"{safe}-{digest(secret.encode())[:12]}", identity

    def start(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "identity.json", json.dumps(self.identity, indent=1))
        except OSError as problem:
            raise UserError(f"{self.folder} cannot be written ({problem.strerror}); name another --output") from problem

    def file(self, prompt: str, seed: int) -> Path:
        return self.folder / f"{digest(prompt.encode())[:20]}-{seed}.png"

    def all(self, prompts: Sequence[str], seeds: int) -> Stored:
        """Prompt-major."""
        return Stored(tuple(self.file(prompt, seed) for prompt in prompts for seed in range(seeds)))

    def missing(self, prompts: Sequence[str], seeds: int) -> list[tuple[str, int]]:
        jobs = dict.fromkeys((prompt, seed) for prompt in prompts for seed in range(seeds))
        return [job for job in jobs if not self.file(*job).exists()]

    def fill(
        self,
        jobs: Sequence[tuple[str, int]],
        draw: Callable[[Sequence[tuple[str, int]]], Sequence[np.ndarray]],
        batch: int,
        advance: Callable[[int], None],
    ) -> None:
        """Draws and saves a batch at a time."""
        for lo in range(0, len(jobs), batch):
            some = jobs[lo : lo + batch]
            for job, picture in zip(some, draw(some), strict=True):
                try:
                    with whole(self.file(*job)) as aside:
                        aside.write_bytes(png(picture))
                except OSError as problem:
                    raise UserError(
                        f"{self.folder}: a picture could not be written ({problem.strerror}); free some space and "
                        "repeat the command: it goes on where it stopped"
                    ) from problem
            advance(len(some))
