"""Did the model get better? Paired win-rate of an aligned model against its base, with guards and a control.

    python -m inpo_fast.evaluate --model runs/pocket/model --base <folder or hub id> --output runs/pocket \\
        --config configs/pocket.yaml

Both models draw the same prompts from the same initial noise. A judge compares the two pictures; a win-rate
is wins plus half the ties, its 95 % interval a bootstrap over prompts (all pictures of a prompt together).

Several models, or several judges, are compared in a table (comparison.md, .json and .html), which goes on where it was
interrupted, also on several processes (torchrun):

    python -m inpo_fast.evaluate --base BASE --model ours=runs/sd15/model --model lora=runs/sd15-lora/lora \\
        --output runs/compare --evaluate.prompts=PartiPrompts.tsv --evaluate.judges='[pickscore, hps-v2.0, clip-h]'
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import DiffusionPipeline

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.comparison.drawing import draw, scaled_eps, use_ddim
from inpo_fast.comparison.prompts import read_prompt_set
from inpo_fast.comparison.win_rates import win_rate
from inpo_fast.judges import Judge, Scores
from inpo_fast.judges.registry import make_judge
from inpo_fast.models.families import denoiser_of
from inpo_fast.runtime import distributed
from inpo_fast.runtime.progress import picture_progress

DIVERSITY_FLOOR = 0.8  # of the base's
SEEN_GAP = 0.15  # how much more often a model may win on seen prompts than on held-out ones


@dataclass(frozen=True)
class Gallery:
    """The pictures of one model: prompts x seeds, prompt-major."""

    prompts: list[str]
    seeds: int
    pictures: list[np.ndarray]

    @property
    def captions(self) -> list[str]:
        return [prompt for prompt in self.prompts for _ in range(self.seeds)]


@dataclass
class Evaluation:
    """What evaluation.json holds, and the galleries that the report shows."""

    result: dict
    galleries: dict[str, Gallery] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)  # by gallery


def diversity(gallery: Gallery) -> float:
    """Mean distance between pictures of the same prompt, root mean square over pixels in [0, 1]."""
    if gallery.seeds < 2:
        return float("nan")
    pictures = np.stack(gallery.pictures).astype(np.float32) / 255
    groups = pictures.reshape(len(gallery.prompts), gallery.seeds, -1)
    first, second = np.triu_indices(gallery.seeds, 1)
    return float(np.sqrt(((groups[:, first] - groups[:, second]) ** 2).mean(-1)).mean())


def read_prompts(path: str) -> list[str]:
    return read_prompt_set(path).prompts


def open_inputs(config: EvaluateConfig, device: torch.device) -> tuple[list[str], list[str], Judge, Judge | None]:
    """Prompts, seen prompts, judge, outside judge. UserError when one of them cannot be had: called before a training
    starts, so that it does not fail after it."""
    prompts = read_prompts(config.prompts)
    seen = read_prompts(config.seen_prompts) if config.seen_prompts else []
    outside = make_judge(config.outside_judge, device) if config.outside_judge else None
    judge = make_judge(config.judge, device)
    for each in (judge, outside):
        if each is not None:
            each.check([*prompts, *seen])
    return prompts, seen, judge, outside


def evaluate(base: DiffusionPipeline, network: torch.nn.Module, config: EvaluateConfig, variant: str) -> Evaluation:
    """Compares `network` with the base's own. Work is split over processes; every process gets the result."""
    rank, world = distributed.rank_and_world()
    prompts, seen, judge, outside = open_inputs(config, base.device)
    use_ddim(base)
    denoiser = denoiser_of(base)
    own = denoiser.module(base)
    total = (3 * len(prompts) + 2 * len(seen)) * config.seeds // world
    for each, pictures in ((judge, 3 * len(prompts) + 2 * len(seen)), (outside, 3 * len(prompts))):
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
            "control": gallery("control", own, prompts, config.control_eps_scale),
        }
        if seen:
            galleries["base_seen"] = gallery("base, seen prompts", own, seen)
            galleries["aligned_seen"] = gallery("aligned, seen prompts", network, seen)
    denoiser.put(base, own)
    scores = {name: judge.score(g.pictures, g.captions) for name, g in galleries.items()}
    return Evaluation(summarise(galleries, scores, judge, outside, config, variant), galleries, scores)


def summarise(
    galleries: dict[str, Gallery],
    scores: dict[str, Scores],
    judge: Judge,
    outside: Judge | None,
    config: EvaluateConfig,
    variant: str,
) -> dict:
    """The content of evaluation.json."""
    seeds = config.seeds

    def compare(ours: str, base: str, part: str | None = None) -> dict:
        a, b = (_part(scores[name], part) for name in (ours, base))
        rate, low, high = win_rate(a, b, judge.tie, seeds)
        return {
            "win_rate": rate,
            "win_rate_low": low,
            "win_rate_high": high,
            "mean": float(a.mean()),
            "median": float(np.median(a)),
            "base_mean": float(b.mean()),
            "base_median": float(np.median(b)),
        }

    main = compare("aligned", "base")
    parts = {name: compare("aligned", "base", name) for name in scores["base"].parts}
    guards: dict = {}
    if "alignment" in parts:
        guards["alignment"] = parts["alignment"] | {"ok": parts["alignment"]["win_rate_high"] >= 0.5}
    if seeds > 1:
        ratio = diversity(galleries["aligned"]) / max(diversity(galleries["base"]), 1e-9)
        guards["diversity_ratio"] = {"value": ratio, "ok": ratio >= DIVERSITY_FLOOR}
    if outside is not None:
        guards["outside"] = _outside_guard(outside, galleries)
    if "aligned_seen" in scores:
        on_seen = compare("aligned_seen", "base_seen")
        gap = on_seen["win_rate"] - main["win_rate"]
        guards["seen"] = on_seen | {"gap": gap, "ok": gap <= SEEN_GAP}
    control = compare("control", "base")
    guards["control"] = control | {"eps_scale": config.control_eps_scale, "ok": control["win_rate_low"] <= 0.5}
    return {
        "variant": variant,
        "judge": judge.name,
        **{key: main[key] for key in ("win_rate", "win_rate_low", "win_rate_high")},
        "prompts": len(galleries["base"].prompts),
        "seeds": seeds,
        "gain": main["mean"] - main["base_mean"],
        "total": main,
        "parts": parts,
        "guards": guards,
        "sampler": {"name": "DDIM", "steps": config.sampler_steps, "guidance": config.guidance},
    }


def _outside_guard(judge: Judge, galleries: dict[str, Gallery]) -> dict:
    """Win-rate by a judge outside the reward; it fails when the base is clearly preferred, however slightly.

    shift says how large the change is: that of the mean, in units of what two pictures of one prompt differ by.
    control: what this judge says of the control, which is no better and no worse than the base.
    """
    base, seeds = galleries["base"], galleries["base"].seeds
    ours, theirs, control = (
        judge.score(galleries[name].pictures, base.captions).total for name in ("aligned", "base", "control")
    )
    rate, low, high = win_rate(ours, theirs, judge.tie, seeds)
    spread = theirs.reshape(-1, seeds).std(1).mean() if seeds > 1 else theirs.std()
    shift = float((ours.mean() - theirs.mean()) / max(spread, 1e-9))
    return {
        "judge": judge.name,
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "mean": float(ours.mean()),
        "base_mean": float(theirs.mean()),
        "shift": shift,
        "control": list(win_rate(control, theirs, judge.tie, seeds)),
        "ok": high >= 0.5,
    }


def verdict(result: dict) -> str:
    """The result in words and numbers."""
    rate, low, high = (100 * result[key] for key in ("win_rate", "win_rate_low", "win_rate_high"))
    failed = [name for name, guard in result["guards"].items() if not guard["ok"]]
    if low > 50:
        word = f"The aligned model is better than its base{'' if not failed else ' for this judge'}"
    elif high < 50:
        word = "The aligned model is WORSE than its base"
    else:
        word = "No difference from the base can be shown"
    guards = "all guards hold" if not failed else "BUT these guards fail: " + ", ".join(failed)
    return (
        f"{word}: it wins {rate:.1f} % of paired comparisons (95 % interval {low:.1f} to {high:.1f}) on "
        f"{result['prompts']} prompts x {result['seeds']} pictures, judged by {result['judge']} "
        f"[{result['variant']}]; {guards}."
    )


def _part(scores: Scores, part: str | None) -> np.ndarray:
    return scores.total if part is None else scores.parts[part]
