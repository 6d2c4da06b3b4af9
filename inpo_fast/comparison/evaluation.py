"""What an evaluation found: the pictures of an aligned model and its base, the paired win-rate, the sanity checks.

Base is here what the model is compared with: the model that a run with models.init started from is one too.

A win-rate is wins plus half the ties, its 95 % interval one over prompts (all pictures of a prompt together), as
win_rates.py makes it.
Each sanity check catches one way to please a judge without drawing better. The negative control is the base with its
noise prediction scaled: no better model, so a judge that prefers it measures grain. The independent judge is one that
no reward was made from; docs/judges.md has its rule. `ok` of a check is None where it cannot decide.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.comparison.win_rates import Rate, win_rate
from inpo_fast.judges import Judge, Scores
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import write_text

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
    """result: what evaluation.json holds. galleries: base, aligned, control (the negative one), and where there are
    seen prompts base_seen and aligned_seen. scores: the judge's, by gallery. The report shows all three."""

    result: dict
    galleries: dict[str, Gallery] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "evaluation.json", json.dumps(self.result, indent=1))


def diversity(gallery: Gallery) -> float:
    """Mean distance between pictures of the same prompt, root mean square over pixels in [0, 1]."""
    if gallery.seeds < 2:
        return float("nan")
    pictures = np.stack(gallery.pictures).astype(np.float32) / 255
    groups = pictures.reshape(len(gallery.prompts), gallery.seeds, -1)
    first, second = np.triu_indices(gallery.seeds, 1)
    return float(np.sqrt(((groups[:, first] - groups[:, second]) ** 2).mean(-1)).mean())


def summarise(
    galleries: dict[str, Gallery],
    scores: dict[str, Scores],
    judge: Judge,
    independent: Judge | None,
    config: EvaluateConfig,
    variant: str,
    start: str | None = None,
) -> dict:
    """The content of evaluation.json. Its key for the sanity checks is `guards`.

    start: what the pictures called base are of where that is not the base, in words; then the key `compared_with`.
    """
    seeds = config.seeds

    def compare(ours: str, base: str, part: str | None = None) -> dict:
        a, b = (_part(scores[name], part) for name in (ours, base))
        found = win_rate(a, b, judge.tie, seeds)
        if not found.prompts:
            raise UserError(f"judge {judge.name}: no two of {len(a):,} pictures have scores; look at what it answers")
        return _interval(found) | {
            "mean": float(known(a).mean()),
            "median": float(np.median(known(a))),
            "base_mean": float(known(b).mean()),
            "base_median": float(np.median(known(b))),
        }

    main = compare("aligned", "base")
    parts = {name: compare("aligned", "base", name) for name in scores["base"].parts}
    checks: dict = {}
    if "alignment" in parts:
        checks["alignment"] = parts["alignment"] | {"ok": not clearly_below(parts["alignment"])}
    if seeds > 1:
        checks["diversity_ratio"] = _diversity_ratio(diversity(galleries["aligned"]), diversity(galleries["base"]))
    if independent is not None:
        checks["outside"] = _independently(independent, galleries)
    if "aligned_seen" in scores:
        on_seen = compare("aligned_seen", "base_seen")
        gap = on_seen["win_rate"] - main["win_rate"]
        checks["seen"] = on_seen | {"gap": gap, "ok": gap <= SEEN_GAP}
    control = compare("control", "base")
    checks["control"] = control | {"eps_scale": config.control_eps_scale, "ok": not clearly_above(control)}
    return {
        "variant": variant,
        **({"compared_with": start} if start else {}),
        "judge": judge.name,
        **{key: main[key] for key in ("win_rate", "win_rate_low", "win_rate_high")},
        "prompts": len(galleries["base"].prompts),
        "seeds": seeds,
        "without_score": {name: int(np.isnan(s.total).sum()) for name, s in scores.items() if np.isnan(s.total).any()},
        "gain": main["mean"] - main["base_mean"],
        "total": main,
        "parts": parts,
        "guards": checks,
        "sampler": {"name": "DDIM", "steps": config.sampler_steps, "guidance": config.guidance},
    }


def _independently(judge: Judge, galleries: dict[str, Gallery]) -> dict:
    """Win-rate by the independent judge; it fails when the base is clearly preferred, however slightly.

    shift says how large the change is: that of the mean, in units of what two pictures of one prompt differ by.
    control: what this judge says of the negative control, which is no better and no worse than the base; a judge that
    tells them apart is not fit to decide.
    """
    base, seeds = galleries["base"], galleries["base"].seeds
    ours, theirs, control = (
        judge.score(galleries[name].pictures, base.captions).total for name in ("aligned", "base", "control")
    )
    found = win_rate(ours, theirs, judge.tie, seeds)
    if not found.prompts:
        raise UserError(f"judge {judge.name}: no two of {len(ours):,} pictures have scores; look at what it answers")
    spread = known(theirs.reshape(-1, seeds).std(1)) if seeds > 1 else known(theirs).std()[None]
    spread = spread.mean() if len(spread) else 0.0
    shift = float((known(ours).mean() - known(theirs).mean()) / max(spread, 1e-9))
    control_found = win_rate(control, theirs, judge.tie, seeds)
    fit = not (control_found.above or control_found.below)
    told = found.low is not None and control_found.low is not None  # enough prompts for both
    return {
        "judge": judge.name,
        **_interval(found),
        "mean": float(known(ours).mean()),
        "base_mean": float(known(theirs).mean()),
        "shift": shift,
        "control": list(control_found[:3]),
        "fit": fit,
        "ok": not found.below if fit and told else None,
    }


def _diversity_ratio(ours: float, base: float) -> dict:
    """None where the base draws the same picture again and again itself."""
    if not base > 0:
        return {"value": None, "ok": None}
    return {"value": ours / base, "ok": ours / base >= DIVERSITY_FLOOR}


def _interval(found: Rate) -> dict:
    """low, high: None where there are too few prompts for an interval. prompts: that the judge could judge."""
    names = ("win_rate", "win_rate_low", "win_rate_high", "prompts")
    return dict(zip(names, found, strict=True))


def clearly_above(values: dict) -> bool:
    """Whether the whole interval lies above one half. Without an interval nothing is clear."""
    return values["win_rate_low"] is not None and values["win_rate_low"] > 0.5


def clearly_below(values: dict) -> bool:
    return values["win_rate_high"] is not None and values["win_rate_high"] < 0.5


def known(scores: np.ndarray) -> np.ndarray:
    """Without NaN: what a judge gave no score."""
    return scores[~np.isnan(scores)]


def _part(scores: Scores, part: str | None) -> np.ndarray:
    return scores.total if part is None else scores.parts[part]
