"""An aligned model and its base draw the same prompts from the same initial noise; a judge compares the pictures.

Until the result is written, pictures and scores are kept on disk as they are made: an evaluation that was stopped
makes only what is missing.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.comparison.drawing import draw, scaled_eps, use_deterministic_sampler
from inpo_fast.comparison.evaluation import Evaluation, Gallery, summarise
from inpo_fast.comparison.picture_store import PictureStore, read_picture
from inpo_fast.comparison.prompts import read_prompts
from inpo_fast.judges import Judge, Scores, judge_id
from inpo_fast.judges.cache import ScoreCache
from inpo_fast.judges.registry import make_judge
from inpo_fast.models.families import denoiser_of
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.fingerprint import fingerprint
from inpo_fast.runtime.progress import picture_progress

KEPT = ".evaluation"  # in the output folder, while an evaluation is under way


def open_inputs(config: EvaluateConfig, device: torch.device) -> tuple[list[str], list[str], Judge, Judge | None]:
    """Prompts, seen prompts, judge, independent judge. UserError when one of them cannot be had: called before a
    training starts, so that it does not fail after it."""
    prompts = read_prompts(config.prompts)
    seen = read_prompts(config.seen_prompts) if config.seen_prompts else []
    independent = make_judge(config.outside_judge, device) if config.outside_judge else None
    judge = make_judge(config.judge, device)
    for each in (judge, independent):
        if each is not None:
            each.check([*prompts, *seen])
    return prompts, seen, judge, independent


def evaluate(
    base: DiffusionPipeline,
    network: torch.nn.Module,
    config: EvaluateConfig,
    variant: str,
    folder: Path,
    start: str | None = None,
) -> Evaluation:
    """Compares `network` with the base's own. Work is split over processes; every process gets the result.

    folder: pictures and scores are kept in it, and taken from it where it was stopped, until `forget(folder)`.
    start: as `summarise`.
    """
    rank, world = distributed.rank_and_world()
    prompts, seen, judge, independent = open_inputs(config, base.device)
    use_deterministic_sampler(base)
    denoiser = denoiser_of(base)
    own = denoiser.module(base)
    kept = ScoreCache(folder / KEPT / "scores")
    judge, independent = _Kept(judge, kept), None if independent is None else _Kept(independent, kept)
    common = _identity(base, config)
    total = (3 * len(prompts) + 2 * len(seen)) * config.seeds // world
    for each, pictures in ((judge, 3 * len(prompts) + 2 * len(seen)), (independent, 3 * len(prompts))):
        if rank == 0 and each is not None and hasattr(each.judge, "cost"):
            each = each.judge
            print(f"judge {each.name}: {each.cost(pictures * config.seeds)}")
    with picture_progress(total, "evaluate", shown=rank == 0) as advance:

        def gallery(name: str, model: torch.nn.Module, wanted: list[str], scale: float = 1.0) -> Gallery:
            advance(0, name)
            denoiser.put(base, model)
            store = PictureStore(folder / KEPT / "pictures", name, common | {"network": weights[model], "scale": scale})
            jobs = [(prompt, s) for prompt in wanted for s in range(config.seeds)]
            mine = jobs[rank::world]
            missing = [job for job in dict.fromkeys(mine) if not store.file(*job).exists()]
            advance(len(mine) - len(missing), name)

            def some_pictures(some):
                keys = [("evaluate", config.seed, *job) for job in some]
                how = {"steps": config.sampler_steps, "guidance": config.guidance, "batch": config.batch}
                with scaled_eps(base, scale):
                    return draw(base, [prompt for prompt, _ in some], keys, **how)

            if missing:
                _make_folder(store.folder)
                store.fill(missing, some_pictures, config.batch, lambda n: advance(n, name))
            drawn = [read_picture(store.file(*job)) for job in mine]
            pictures: list[np.ndarray] = [None] * len(jobs)  # type: ignore[list-item]
            for other, part in enumerate(distributed.gather(drawn, f"pictures, {name}")):
                pictures[other::world] = part
            return Gallery(wanted, config.seeds, pictures)

        weights = {own: fingerprint(own), network: fingerprint(network)}
        galleries = {
            "base": gallery("base", own, prompts),
            "aligned": gallery("aligned", network, prompts),
            "control": gallery("negative control", own, prompts, config.control_eps_scale),
        }
        if seen:
            galleries["base_seen"] = gallery("base, seen prompts", own, seen)
            galleries["aligned_seen"] = gallery("aligned, seen prompts", network, seen)
    denoiser.put(base, own)
    scores = {name: judge.score(g.pictures, g.captions) for name, g in galleries.items()}
    result = summarise(galleries, scores, judge, independent, config, variant, start)
    return Evaluation(result, galleries, scores)


def forget(folder: Path) -> None:
    """What an evaluation kept, when its result is written."""
    shutil.rmtree(folder / KEPT, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f"{folder} cannot be written ({problem.strerror}); free some space, or mend its rights"
        ) from problem


def _identity(pipeline: DiffusionPipeline, config: EvaluateConfig) -> dict:
    """What decides a picture beside the network, its prompt and its seed."""
    frozen = [pipeline.vae, *denoiser_of(pipeline).encoders(pipeline)]
    settings = {"steps": config.sampler_steps, "guidance": config.guidance, "seed": config.seed}
    schedule = {key: value for key, value in sorted(pipeline.scheduler.config.items()) if not key.startswith("_")}
    return {"frozen": [fingerprint(part) for part in frozen], "schedule": str(schedule), **settings}


class _Kept:
    """A judge whose scores are kept."""

    def __init__(self, judge: Judge, cache: ScoreCache):
        self.judge, self.cache = judge, cache
        self.name, self.tie, self.id = judge.name, judge.tie, judge_id(judge)

    def check(self, prompts: list[str]) -> None:
        self.judge.check(prompts)

    def score(self, images: list[np.ndarray], prompts: list[str]) -> Scores:
        return self.cache.score(self.judge, images, prompts)
