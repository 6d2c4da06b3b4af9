"""One cell and training seed of a study: train, draw the prompts of the split, judge them against the base's.

The base and the negative control (its noise prediction times 1.01) are drawn once for all cells, from the same noise.
"""

import functools
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from bench.results import ROOT, provenance
from bench.study.cells import OUTSIDE, RECIPE, Cell, Study, config_of, first_of, result_name, settings_of, split_prompts
from bench.study.measures import MEASURES
from inpo_fast.comparison.drawing import draw, scaled_eps, use_deterministic_sampler
from inpo_fast.comparison.evaluation import Gallery, diversity
from inpo_fast.comparison.prompts import read_prompts
from inpo_fast.comparison.win_rates import points
from inpo_fast.config import EvaluateConfig, RunConfig, parse
from inpo_fast.judges.registry import make_judge
from inpo_fast.models.loading import load_pipeline, quiet_libraries
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import whole
from inpo_fast.runtime.preemption import Preempted
from inpo_fast.training import loop
from inpo_fast.training.set_up import prepare

RECIPE_WORDS = ["--config", RECIPE, f"--evaluate.outside_judge={OUTSIDE}"]
SCALARS = ("loss", "implicit_accuracy", "winner_delta", "loser_delta", "eps_scale", "tau_rms_winner", "tau_rms_loser")
LAST = 10  # steps that they are averaged over
PICTURES = ROOT / "build" / "study" / "pictures"


@dataclass
class Trained:
    unet: torch.nn.Module
    variant: str
    metrics: list[dict]  # of each step
    seconds: float
    cpu_seconds: float

    @property
    def unet_evaluations(self) -> int:
        return sum(line["unet_evaluations"] for line in self.metrics)


def run_cell(study: Study, cell: Cell, seed: int) -> dict:
    """What is kept of a run, in plain values. points, gain: of each prompt, over its pictures."""
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="study-") as folder:
        config, runs = config_of(study, cell, seed, f"{folder}/run"), []
        if cell.first:
            runs.append(trained(config_of(study, first_of(cell), seed, f"{folder}/first")))
            config = replace(config, models=replace(config.models, base=f"{folder}/first/model"))
        runs.append(trained(config))
    last, lines = runs[-1], runs[-1].metrics[-LAST:]
    values = {name: float(np.mean([line[name] for line in lines if name in line] or [np.nan])) for name in SCALARS}
    return {
        "settings": settings_of(config_of(study, cell, seed)),
        **({"first": settings_of(config_of(study, first_of(cell), seed))} if cell.first else {}),
        "seed": seed,
        "variant": ", then ".join(run.variant for run in runs),
        "split": study.split,
        "pictures": study.pictures,
        "unet_evaluations": sum(run.unet_evaluations for run in runs),
        "seconds": sum(run.seconds for run in runs),
        "cpu_seconds": sum(run.cpu_seconds for run in runs),
        "training": {name: value for name, value in values.items() if np.isfinite(value)},
        **judged(study, last.unet, result_name(study, cell, seed)),
        **provenance(),
    }


def trained(config: RunConfig, console: Console | None = None) -> Trained:
    """One run from its first step to its model, in this process. console: where its progress is shown, if anywhere.
    UserError where it is asked to stop."""
    config = replace(config, train=replace(config.train, checkpoint_every=config.train.steps))
    begun, cpu = time.perf_counter(), time.process_time()
    run = prepare(config, 0, 1, torch.device("cpu"))
    try:
        loop.train(run, console or Console(file=io.StringIO()))
        lines = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        return Trained(loop.finish(run), run.variant, lines, seconds, cpu)
    except Preempted as asked:
        raise UserError(f"stopped by {asked}; the same command goes on") from asked
    finally:
        run.folder.release()


def run_base(study: Study, scale: float) -> dict:
    """The base with its noise prediction scaled, against the base itself: 1.01 is the negative control."""
    quiet_libraries()
    torch.set_num_threads(1)
    name = f"control-{scale:g}-{study.split}-{study.pictures}"
    return {"control": f"base, eps x {scale:g}", "seed": 0, **judged(study, None, name, scale), **provenance()}


@functools.cache
def evaluation() -> EvaluateConfig:
    return parse("python -m bench.study", RECIPE_WORDS).evaluate


def judged(study: Study, unet: torch.nn.Module | None, name: str, scale: float = 1.0) -> dict:
    """Points, gain and measures of each prompt, against the base's pictures."""
    how = evaluation()
    ours, theirs = gallery(study, unet, scale), base_gallery(study)
    keep(ours, name)
    judge, outside = make_judge(how.judge), make_judge(how.outside_judge)
    a, b = (judge.score(g.pictures, g.captions) for g in (ours, theirs))
    n = study.pictures
    out = {
        "prompts": ours.prompts,
        "points": points(a.total, b.total, judge.tie, n).tolist(),
        "gain": _plain((a.total - b.total).reshape(-1, n).mean(1)),
        "parts": {p: points(a.parts[p], b.parts[p], judge.tie, n).tolist() for p in ("alignment", "looks")},
        "measures": {name: _plain(of(ours).mean(1) - of(theirs).mean(1)) for name, of in measures(n).items()},
        "diversity": diversity(ours) / diversity(theirs) if n > 1 else None,
    }
    a, b = (outside.score(g.pictures, g.captions).total for g in (ours, theirs))
    return out | {"outside": points(a, b, outside.tie, n).tolist()}


def measures(n: int) -> dict[str, Callable[[Gallery], np.ndarray]]:
    """Each gives (prompts, n)."""
    return {name: lambda g, of=of: of(g.pictures, g.captions).reshape(-1, n) for name, of in MEASURES.items()}


def _plain(values: np.ndarray) -> list[float]:
    return values.round(6).tolist()


def keep(drawn: Gallery, name: str) -> None:
    """In build/, not in git: another judge can be asked later without training again."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with whole(PICTURES / f"{Path(name).stem}.npz") as aside, aside.open("wb") as file:
        np.savez_compressed(file, pictures=np.stack(drawn.pictures), captions=drawn.captions)


def gallery(study: Study, unet: torch.nn.Module | None, scale: float = 1.0) -> Gallery:
    how, pipeline = evaluation(), pipeline_of_base()
    prompts = split_prompts(read_prompts(how.prompts), study.split)
    jobs = [(prompt, ("evaluate", how.seed, prompt, s)) for prompt in prompts for s in range(study.pictures)]
    own = pipeline.unet
    pipeline.unet = own if unet is None else unet
    try:
        with scaled_eps(pipeline, scale):
            drawn = draw(
                pipeline,
                [prompt for prompt, _ in jobs],
                [key for _, key in jobs],
                steps=how.sampler_steps,
                guidance=how.guidance,
                batch=how.batch,
            )
    finally:
        pipeline.unet = own
    return Gallery(prompts, study.pictures, drawn)


@functools.cache
def pipeline_of_base():
    pipeline = load_pipeline(parse("python -m bench.study", RECIPE_WORDS).models.base)
    use_deterministic_sampler(pipeline)
    return pipeline


_bases: dict[tuple[str, int], Gallery] = {}  # of this process


def base_gallery(study: Study) -> Gallery:
    key = (study.split, study.pictures)
    if key not in _bases:
        _bases[key] = gallery(study, None)
    return _bases[key]
