"""What a run shows of itself while it trains: pictures of fixed prompts, and how it does on pairs it never sees.

Both are functions of the weights alone: the same prompts from the same noise, the same pairs at the same timesteps with
the same noise, so that values of different steps can be compared. Nothing of the training is touched by looking.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from inpo_fast.comparison.drawing import draw, drawing_with
from inpo_fast.comparison.prompts import read_prompt_set
from inpo_fast.config import RunConfig
from inpo_fast.data.images import png
from inpo_fast.data.loader import Item, PairLoader
from inpo_fast.data.order import step_positions
from inpo_fast.data.pair import BadPair, Source
from inpo_fast.data.sources import open_source
from inpo_fast.models.denoiser import Text
from inpo_fast.models.models import Models
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import write_bytes
from inpo_fast.runtime.memory import HELD_OUT, fits
from inpo_fast.runtime.preemption import Preempted, Preemption
from inpo_fast.training.metrics import BUCKETS, MetricAccumulator
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import add_metrics, micro_batches, micro_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch
from inpo_fast.training.trackers import Tracker

FOLDER = "images"  # of the run: a strip of pictures for each time
SEEN = ("implicit_accuracy", "margin", "winner_delta", "loser_delta")
SEEN += tuple(f"{name}_t{b}" for name in ("margin", "winner_delta", "loser_delta") for b in range(BUCKETS))


class Validation:
    """`step(done, tracker, step_config, preemption)` after each optimizer step, on every process; gives more metrics of
    that step.

    TooLarge where the batches of step_config do not fit: nothing was shown yet."""

    def __init__(self, config: RunConfig, models: Models, empty: Text, folder: Path, done: int):
        self.config, self.models, self.empty, self.folder = config, models, empty, folder / FOLDER
        self.rank, self.world = distributed.rank_and_world()
        how = config.observe
        self.prompts = prompts_of(config)
        if self.rank == 0:  # pictures of steps past the checkpoint; others are not ours
            for path in self.folder.glob("*.png"):
                if path.stem.isdigit() and int(path.stem) > done:
                    self._remove_picture(int(path.stem))
        self.items = [] if how.held_out is None else self._held_out(open_held_out(config))

    def step(
        self, done: int, tracker: Tracker | None, step_config: StepConfig, preemption: Preemption
    ) -> dict[str, float]:
        last = done == self.config.train.steps
        at_pairs, _ = self._regular(done)
        values: dict[str, float] = {}
        if self.config.observe.held_out is not None and (at_pairs or last):
            values = self.held_out_metrics(step_config)
        self.draw(done, tracker, preemption)
        return values

    def draw(self, done: int, tracker: Tracker | None, preemption: Preemption) -> None:
        """The pictures after so many steps, where they are due and not there: a run that was asked to stop meanwhile
        draws them when it is continued."""
        due = self.prompts and done and (self._regular(done)[1] or done == self.config.train.steps)
        path = self._picture(done)
        if not due or any(distributed.gather(path.exists(), "pictures")):
            return
        strip = self.draw_strip(preemption)
        if strip is not None and self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(path, png(strip))
            if tracker is not None:
                tracker.picture(done, strip)

    def _regular(self, done: int) -> tuple[bool, bool]:
        """Whether held-out pairs and pictures are looked at after this step, be it the last one or not."""
        how = self.config.observe
        at_pairs = how.held_out is not None and (done % how.held_out_every == 0 or done == 1)
        return at_pairs, bool(how.images_every) and done % how.images_every == 0

    def forget_last_look(self, done: int, values: dict) -> dict:
        """What a step's metrics are where it is not the last one any more; its picture goes too."""
        at_pairs, at_pictures = self._regular(done)
        if not at_pictures:
            self._remove_picture(done)
        return values if at_pairs else {k: v for k, v in values.items() if not k.startswith("held_out_")}

    def lacks_last_look(self, done: int, values: dict) -> bool:
        """Whether a step that was not meant to be the last one was not looked at."""
        lacks_pairs = self.config.observe.held_out is not None and not any(k.startswith("held_out_") for k in values)
        return lacks_pairs or (bool(self.prompts) and not self._picture(done).exists())

    def _picture(self, done: int) -> Path:
        return self.folder / f"{done:06d}.png"

    def _remove_picture(self, done: int) -> None:
        self._picture(done).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    @torch.no_grad()
    def held_out_metrics(self, step_config: StepConfig) -> dict[str, float]:
        """Each pair at one timestep, without caches."""
        metrics, models = MetricAccumulator(self.models.device), self.models
        config = replace(
            step_config,
            trajectory_cache=None,
            latent_cache=None,
            inversion=replace(step_config.inversion, cache=None, frozen=False),
            objective=replace(step_config.objective, timesteps=replace(step_config.objective.timesteps, per_pair=1)),
        )
        if self.items:
            batch = make_step_batch(self.items, models, config, self.empty)
            x_t, _ = noisy_latents(batch, models, config)
            # without a graph more of them fit than of those that are trained on: a size of their own
            config = replace(config, micro_batch=models.at_once.of(HELD_OUT, min(config.micro_batch, len(self.items))))
            for k, pairs in micro_batches(batch, config):
                with fits(HELD_OUT, config.micro_batch):
                    add_metrics(metrics, micro_step(batch, x_t, k, pairs, models, config), config)
        metrics.reduce()
        found = metrics.values()
        return {f"held_out_{name}": found[name] for name in SEEN if name in found}

    @torch.no_grad()
    def draw_strip(self, preemption: Preemption) -> np.ndarray | None:
        """(H, images * W, 3) uint8 by the policy as it is; every process draws its share. None where one of them is
        asked to stop on the way."""
        how, pipeline = self.config.evaluate, self.models.pipeline
        mine = self.prompts[self.rank :: self.world]
        settings = {"steps": how.sampler_steps, "guidance": how.guidance, "batch": how.batch}
        settings["advance"] = lambda _: preemption.check()
        pictures = None
        with contextlib.suppress(Preempted), drawing_with(pipeline, self.models.policy):
            pictures = draw(pipeline, mine, [("evaluate", how.seed, prompt, 0) for prompt in mine], **settings)
        strip: list = [None] * len(self.prompts)
        parts = distributed.gather(pictures, "pictures")
        if any(part is None for part in parts):
            return None
        for other, part in enumerate(parts):
            strip[other :: self.world] = part
        return np.concatenate(strip, axis=1)

    def _held_out(self, source: Source) -> list[Item]:
        config = self.config
        resolution = config.data.resolution or self.models.resolution
        data = replace(config.data, prompt_dropout=0.0)
        loader = PairLoader(source, data, resolution=resolution, seed=0, rank=self.rank, world=self.world)
        count = min(config.observe.held_out_pairs, len(source))
        count -= count % self.world if count >= self.world else 0
        items = []
        for position in step_positions(0, count, self.rank, self.world):
            try:
                items.append(loader.load(position))
            except BadPair:
                continue
        return items


def check_validation(config: RunConfig) -> Source | None:
    """The held-out pairs. UserError, before a model is loaded, of what could not be shown later."""
    prompts_of(config)
    return None if config.observe.held_out is None else open_held_out(config)


def open_held_out(config: RunConfig) -> Source:
    """UserError where it is the training source itself."""
    how = config.observe
    if how.held_out == config.data.source:
        raise UserError("observe.held_out is data.source: pairs that are trained on tell nothing; name others")
    try:
        return open_source(how.held_out)
    except UserError as problem:
        raise UserError(f"observe.held_out: {str(problem).removeprefix('data.source: ')}") from problem


def prompts_of(config: RunConfig) -> list[str]:
    """The fixed prompts of the pictures, none where none are asked for. UserError where they cannot be had."""
    how = config.observe
    if not how.images_every:
        return []
    path = how.prompts or config.evaluate.prompts
    if path is None:
        raise UserError("observe.images_every needs prompts; give observe.prompts or evaluate.prompts")
    return read_prompt_set(path, how.images).prompts
