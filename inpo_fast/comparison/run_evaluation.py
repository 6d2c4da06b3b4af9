"""An aligned model and its base draw the same prompts from the same initial noise; a judge compares the pictures."""

import numpy as np
import torch
from diffusers import DiffusionPipeline

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.comparison.drawing import draw, scaled_eps, use_ddim
from inpo_fast.comparison.evaluation import Evaluation, Gallery, summarise
from inpo_fast.comparison.prompts import read_prompts
from inpo_fast.judges import Judge
from inpo_fast.judges.registry import make_judge
from inpo_fast.models.families import denoiser_of
from inpo_fast.runtime import distributed
from inpo_fast.runtime.progress import picture_progress


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


def evaluate(base: DiffusionPipeline, network: torch.nn.Module, config: EvaluateConfig, variant: str) -> Evaluation:
    """Compares `network` with the base's own. Work is split over processes; every process gets the result."""
    rank, world = distributed.rank_and_world()
    prompts, seen, judge, independent = open_inputs(config, base.device)
    use_ddim(base)
    denoiser = denoiser_of(base)
    own = denoiser.module(base)
    total = (3 * len(prompts) + 2 * len(seen)) * config.seeds // world
    for each, pictures in ((judge, 3 * len(prompts) + 2 * len(seen)), (independent, 3 * len(prompts))):
        if rank == 0 and hasattr(each, "cost"):
            print(f"judge {each.name}: {each.cost(pictures * config.seeds)}")
    with picture_progress(total, "evaluate", shown=rank == 0) as advance:

        def gallery(name: str, model: torch.nn.Module, wanted: list[str], scale: float = 1.0) -> Gallery:
            advance(0, name)
            denoiser.put(base, model)
            jobs = [(prompt, ("evaluate", config.seed, prompt, s)) for prompt in wanted for s in range(config.seeds)]
            mine = jobs[rank::world]
            with scaled_eps(base, scale):
                drawn = draw(
                    base,
                    [p for p, _ in mine],
                    [key for _, key in mine],
                    steps=config.sampler_steps,
                    guidance=config.guidance,
                    batch=config.batch,
                    advance=lambda n: advance(n, name),
                )
            pictures: list[np.ndarray] = [None] * len(jobs)  # type: ignore[list-item]
            for other, part in enumerate(distributed.gather(drawn)):
                pictures[other::world] = part
            return Gallery(wanted, config.seeds, pictures)

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
    return Evaluation(summarise(galleries, scores, judge, independent, config, variant), galleries, scores)
