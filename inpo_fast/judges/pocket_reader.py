"""The pocket world's independent judge: a small network that learned to read renderings, and nothing of the reward.

It says which words a picture shows and how well it is finished. docs/judges.md has the rule by which it decides,
written down before it was asked; pocket/reader.py trains it.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from inpo_fast.judges import Scores
from inpo_fast.judges.pocket_scenes import BACKGROUNDS, COLOURS, RADIUS, SHAPES, SIZE, parse_caption
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.fingerprint import fingerprint

WORDS = {"size": tuple(RADIUS), "colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}
QUALITIES = ("centring", "saturation", "edges", "cleanliness")
FILE = "reader.safetensors"
CHANNELS, HIDDEN = (24, 48, 64, 64), 96


class Reader(torch.nn.Module):
    """(N, 3, 32, 32) in [0, 1] -> logits of each group of words, and the qualities (N, 4), 1 for a perfect finish."""

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        for i, width in enumerate(CHANNELS):
            layers += [torch.nn.Conv2d(before, width, 3, stride=1 if i == 0 else 2, padding=1), torch.nn.SiLU()]
            before = width
        self.see = torch.nn.Sequential(*layers, torch.nn.Flatten())
        self.think = torch.nn.Sequential(torch.nn.Linear(before * (SIZE // 8) ** 2, HIDDEN), torch.nn.SiLU())
        self.say = torch.nn.Linear(HIDDEN, sum(map(len, WORDS.values())) + len(QUALITIES))

    def forward(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        *words, qualities = self.say(self.think(self.see(2 * pixels - 1))).split(
            [*map(len, WORDS.values()), len(QUALITIES)], 1
        )
        return dict(zip(WORDS, words, strict=True)), qualities


class ReaderJudge:
    def __init__(self, folder: Path, device: torch.device | str = "cpu", batch: int = 64):
        """folder: has reader.safetensors. UserError where that cannot be opened."""
        self.name, self.device, self.batch = "pocket-reader", torch.device(device), batch
        self.reader, path = Reader(), folder / FILE
        try:
            with safe_open(path, "pt") as file:
                self.reader.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
                self.tie = float((file.metadata() or {})["tie"])
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as problem:
            reason = str(problem).strip().splitlines()[0][:200]
            raise UserError(f"judge pocket-reader: {path} cannot be opened as a reader ({reason})") from problem
        self.reader.to(self.device).eval().requires_grad_(False)

    @cached_property
    def id(self) -> str:
        return f"{self.name} {fingerprint(self.reader)[:16]}"

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            parse_caption(prompt)

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        """images: (32, 32, 3) uint8 arrays, prompts: captions. Totals and parts, each (N,) in [0, 1]."""
        scenes = [parse_caption(prompt) for prompt in prompts]
        parts = {name: np.zeros(len(scenes)) for name in (*WORDS, *QUALITIES)}
        for lo in range(0, len(scenes), self.batch):
            part = slice(lo, lo + self.batch)
            pixels = torch.from_numpy(np.stack(images[part])).permute(0, 3, 1, 2).float().to(self.device) / 255
            words, qualities = self.reader(pixels)
            for name, logits in words.items():
                asked = torch.tensor([WORDS[name].index(getattr(scene, name)) for scene in scenes[part]])
                chance = logits.softmax(1).cpu().gather(1, asked[:, None])[:, 0]
                parts[name][part] = chance.double().numpy()
            for name, values in zip(QUALITIES, qualities.clamp(0, 1).cpu().double().T, strict=True):
                parts[name][part] = values.numpy()
        parts["alignment"] = np.mean([parts[name] for name in WORDS], axis=0)
        parts["looks"] = np.mean([parts[name] for name in QUALITIES], axis=0)
        return Scores((parts["alignment"] + parts["looks"]) / 2, parts)
