"""Scores on disk under (image hash, prompt, judge id): nothing is judged twice, and an interrupted judging goes on.

Lines of JSON, a file for each process: a line that a crash cut short costs its own score. Numbers come back as they
went in, bit for bit.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from inpo_fast.judges import Judge, Scores, judge_id
from inpo_fast.runtime import watch
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import parse_json, read_text
from inpo_fast.runtime.record_store import digest

CHUNK = 256  # pictures that are judged between two writes


def image_hash(image: np.ndarray) -> str:
    """32 hexadecimal digits of an (H, W, 3) uint8 array: of the pixels, however the file was encoded."""
    image = np.ascontiguousarray(image)
    return digest(str(image.shape).encode(), image.tobytes())


class ScoreCache:
    """An open folder. Several processes may read and add at the same time; each sees what was there when it opened."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, tuple[float, dict[str, float]]] = {}
        self._file = None
        for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
            try:
                lines = read_text(path, errors="replace").splitlines()
            except OSError as problem:
                raise UserError(
                    f"{path} cannot be read ({problem.strerror}); remove it: its scores are judged again"
                ) from problem
            for line in lines:
                try:
                    key, total, parts = parse_json(line)
                    self.known[key] = float(total), dict(parts)
                except (ValueError, TypeError):
                    continue  # cut short by a crash

    def missing(self, judge: Judge, images: Sequence[np.ndarray], prompts: Sequence[str]) -> int:
        return sum(key not in self.known for key in self._keys(judge, images, prompts))

    def score(
        self,
        judge: Judge,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        advance: Callable[[int], None] = lambda n: None,
    ) -> Scores:
        """As `judge.score`, CHUNK pictures at a time; what is known is not judged again, equal pictures once."""
        out: list[Scores] = []
        for lo in range(0, len(images), CHUNK):
            some, texts = list(images[lo : lo + CHUNK]), list(prompts[lo : lo + CHUNK])
            keys = self._keys(judge, some, texts)
            new = list({key: i for i, key in enumerate(keys) if key not in self.known}.values())
            if new:
                found = judge.score([some[i] for i in new], [texts[i] for i in new])
                self._add([keys[i] for i in new], found)
            rows = [self.known[key] for key in keys]
            parts = {name: np.array([parts[name] for _, parts in rows]) for name in rows[0][1]}
            out.append(Scores(np.array([total for total, _ in rows]), parts))
            advance(len(some))
            watch.progress()
        return Scores.joined(out)

    def _keys(self, judge: Judge, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[str]:
        who = judge_id(judge).encode()
        return [digest(who, image_hash(i).encode(), p.encode()) for i, p in zip(images, prompts, strict=True)]

    def _add(self, keys: list[str], found: Scores) -> None:
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = (self.folder / f"{uuid.uuid4().hex}.jsonl").open("a", encoding="utf-8")
            for i, key in enumerate(keys):
                parts = {name: float(part[i]) for name, part in found.parts.items()}
                self.known[key] = float(found.total[i]), parts
                self._file.write(json.dumps([key, *self.known[key]]) + "\n")
            self._file.flush()
        except OSError as problem:
            raise UserError(
                f"{self.folder}: scores cannot be written ({problem.strerror}); free some space and repeat: earlier "
                "ones are kept"
            ) from problem
