"""Trains the pocket world's independent judge (judges/pocket_reader.py) on renderings alone.

    python -m inpo_fast.pocket.build --only reader --only manifest

Its rule is in docs/judges.md and was fixed before it judged a picture of the base.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file

from inpo_fast.judges.pocket_reader import FILE, WORDS, Reader, ReaderJudge
from inpo_fast.judges.pocket_scenes import Scene
from inpo_fast.pocket.base_model import one_cycle
from inpo_fast.pocket.scenes import Finish, render

PICTURES, STEPS, BATCH, LR = 40_000, 3_000, 128, 2e-3
FRESH = 2_000  # renderings for the tie
WORST = Finish(dx=5.0, dy=5.0, saturation=0.3, edge=5.0, stain=0.12)
GRAIN = 0.04  # largest standard deviation of the pixel noise that it is to see past


def any_finish(rng: np.random.Generator) -> Finish:
    """Better and worse than the base's pictures: perfect and WORST are both within."""
    return Finish(
        dx=rng.uniform(-WORST.dx, WORST.dx),
        dy=rng.uniform(-WORST.dy, WORST.dy),
        saturation=rng.uniform(WORST.saturation, 1.0),
        edge=rng.uniform(1.0, WORST.edge),
        stain=rng.uniform(0.0, WORST.stain),
    )


def qualities(finish: Finish) -> list[float]:
    """Of QUALITIES, in [0, 1]: 1 for a perfect finish, 0 for WORST."""
    off = np.hypot(finish.dx, finish.dy) / np.hypot(WORST.dx, WORST.dy)
    pale = (1 - finish.saturation) / (1 - WORST.saturation)
    soft = (finish.edge - 1) / (WORST.edge - 1)
    return [1 - off, 1 - pale, 1 - soft, 1 - finish.stain / WORST.stain]


def train_reader(scenes: list[Scene], seed: int, folder: Path) -> None:
    """Writes reader.safetensors, its tie in the metadata."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([ord("r"), seed])
    chosen = [scenes[rng.integers(len(scenes))] for _ in range(PICTURES)]
    finishes = [any_finish(rng) for _ in chosen]
    drawn = track(zip(chosen, finishes, strict=True), description="render", total=PICTURES)
    pixels = _pixels([render(scene, finish, rng) for scene, finish in drawn])
    words = torch.tensor([[WORDS[name].index(getattr(scene, name)) for name in WORDS] for scene in chosen])
    wanted = torch.tensor([qualities(finish) for finish in finishes])
    reader, order = Reader(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, STEPS))
    for _ in track(range(STEPS), description="reader"):
        pick = torch.randint(len(pixels), (BATCH,), generator=order)
        grain = GRAIN * torch.rand(BATCH, 1, 1, 1, generator=order)
        seen = pixels[pick] + grain * torch.randn(BATCH, *pixels.shape[1:], generator=order)
        said, quality = reader(seen.clamp(0, 1))
        loss = 4 * torch.nn.functional.mse_loss(quality, wanted[pick])
        for column, logits in enumerate(said.values()):
            loss = loss + torch.nn.functional.cross_entropy(logits, words[pick, column])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in reader.state_dict().items()}
    save_file(state, folder / FILE, {"tie": "0"})
    tie = indifference(ReaderJudge(folder), scenes, rng)
    save_file(state, folder / FILE, {"tie": f"{tie:.4f}"})
    print(f"reader: tie {tie:.4f}; {report(ReaderJudge(folder), scenes, rng)}")


def indifference(judge: ReaderJudge, scenes: list[Scene], rng: np.random.Generator) -> float:
    """The 95 % quantile of the score's difference between renderings that differ in nothing that is a quality."""
    pairs = []
    for _ in range(FRESH):
        scene, finish = scenes[rng.integers(len(scenes))], any_finish(rng)
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.25)
        moved = replace(finish, dx=finish.dx + far * np.cos(angle), dy=finish.dy + far * np.sin(angle))
        pairs.append((scene.caption, render(scene, finish, rng), render(scene, moved, rng)))
    captions, ones, others = zip(*pairs, strict=True)
    difference = judge.score(ones, captions).total - judge.score(others, captions).total
    return float(np.quantile(np.abs(difference), 0.95))


def report(judge: ReaderJudge, scenes: list[Scene], rng: np.random.Generator) -> str:
    """How well it reads fresh renderings."""
    chosen = [scenes[rng.integers(len(scenes))] for _ in range(FRESH)]
    finishes = [any_finish(rng) for _ in chosen]
    pictures = [render(scene, finish, rng) for scene, finish in zip(chosen, finishes, strict=True)]
    parts = judge.score(pictures, [scene.caption for scene in chosen]).parts
    wanted = np.array([qualities(finish) for finish in finishes])
    right = ", ".join(f"{name} {100 * (parts[name] > 0.5).mean():.1f} %" for name in WORDS)
    close = np.corrcoef(parts["looks"], wanted.mean(1))[0, 1]
    return f"fresh renderings: words right {right}; its looks with the finish's: correlation {close:.3f}"


def _pixels(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
