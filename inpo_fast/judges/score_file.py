"""Scores that were made elsewhere, one JSON object a line:

    {"image": "9f3c…", "prompt": "a red cube", "score": 6.5}         image: the picture's hash
    {"file": "pictures/a.png", "prompt": "a red cube", "score": 6.5}  file: its path below the JSONL's folder

`pictures.jsonl`, which an evaluation leaves, has hash, file, prompt and model of every picture: add `score` to each
line. `parts` (name -> number) where there are any; all lines then have the same.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inpo_fast.data import records
from inpo_fast.data.images import decode
from inpo_fast.data.pair import BadPair
from inpo_fast.judges import Scores
from inpo_fast.judges.cache import image_hash
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import inside, read_regular
from inpo_fast.runtime.record_store import digest

MAX_PIXELS = 50_000_000


class ScoreFileJudge:
    tie = 1e-6

    def __init__(self, path: Path):
        self.name, self.path = f"scores:{path.name}", path
        if not path.is_file():
            raise UserError(f"judge {self.name}: no such file: {path}")
        self.scores: dict[tuple[str, str], tuple[float, dict[str, float]]] = {}
        self.parts: tuple[str, ...] | None = None
        for number, _, _, record in records.lines(path):
            self._add(record, f"{path}:{number}")
        self.id = f"{self.name} {digest(read_regular(path))}"

    def _add(self, record: dict, where: str) -> None:
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f"{where}: no text under `prompt`")
        score, parts = record.get("score"), record.get("parts") or {}
        if not _number(score) or not isinstance(parts, dict) or not all(map(_number, parts.values())):
            raise UserError(f"{where}: score {json.dumps(score)}; expected a number, and numbers in `parts`")
        if self.parts not in (None, tuple(sorted(parts))):
            raise UserError(f"{where}: parts {sorted(parts)}; the lines before have {list(self.parts)}")
        self.parts = tuple(sorted(parts))
        image = record.get("image")
        if image is None and isinstance(record.get("file"), str):
            try:
                encoded = read_regular(inside(self.path.parent, record["file"]))
                image = image_hash(np.asarray(decode(encoded, MAX_PIXELS)))
            except (OSError, ValueError, BadPair) as problem:
                raise UserError(f"{where}: {record['file']!r} cannot be read ({problem})") from problem
        if not isinstance(image, str):
            raise UserError(f"{where}: neither `image` (a hash) nor `file` (a path)")
        self.scores[image, record["prompt"]] = float(score), parts

    def check(self, prompts: Sequence[str]) -> None:
        known = {prompt for _, prompt in self.scores}
        missing = [prompt for prompt in prompts if prompt not in known]
        if missing:
            raise UserError(
                f"judge {self.name}: {self.path} has no score for {len(missing)} of {len(prompts)} prompts, such as "
                f"{missing[0]!r}; score these pictures too"
            )

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            if (said := self.scores.get((image_hash(image), prompt))) is None:
                raise UserError(
                    f"judge {self.name}: {self.path} has no score for picture {image_hash(image)} of {prompt!r}; score "
                    "it and add the line (pictures.jsonl of the evaluation names its file)"
                )
            found.append(said)
        parts = {name: np.array([parts[name] for _, parts in found]) for name in self.parts or ()}
        return Scores(np.array([total for total, _ in found], dtype=np.float64), parts)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
