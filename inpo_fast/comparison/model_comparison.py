"""What a comparison of several models found: the pictures, every judge's scores, and the tables made from them."""

from dataclasses import dataclass, field

import numpy as np

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.comparison.picture_store import Stored
from inpo_fast.comparison.prompts import PromptSet
from inpo_fast.comparison.published_scores import reference
from inpo_fast.comparison.win_rates import interval, points
from inpo_fast.judges import Judge, Scores, judge_id
from inpo_fast.runtime.masking import masked_tree
from inpo_fast.runtime.record_store import digest

BASE, NEGATIVE_CONTROL = "base", "control"  # names of models; a model of the user's cannot have them


@dataclass
class ModelComparison:
    """Who draws what, who judges it, and what came of it.

    pictures: by model, prompt-major, with one of the negative control. scores: judge -> model -> Scores of them.
    """

    prompts: PromptSet
    seeds: int
    models: dict[str, str]  # name -> where it is
    judges: list[Judge]
    pictures: dict[str, Stored] = field(default_factory=dict)
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)

    @property
    def captions(self) -> list[str]:
        return [prompt for prompt in self.prompts.prompts for _ in range(self.seeds)]


def summarise(comparison: ModelComparison, config: EvaluateConfig) -> dict:
    """The content of comparison.json."""
    names = list(comparison.pictures)
    scores = {
        judge.name: {name: _centre(comparison, comparison.scores[judge.name][name].total) for name in names}
        for judge in comparison.judges
    }
    pairs = [(b, a) for i, a in enumerate(names) for b in names[i + 1 :] if b != NEGATIVE_CONTROL or a == BASE]
    rates = {
        judge.name: [
            {"model": ours, "against": theirs} | _rates(comparison, judge, comparison.scores[judge.name], ours, theirs)
            for ours, theirs in pairs
        ]
        for judge in comparison.judges
    }
    base = comparison.models[BASE]
    kind, judges = comparison.prompts.kind, [judge.name for judge in comparison.judges]
    return {
        "prompts": {
            "kind": kind,
            "count": len(comparison.prompts.prompts),
            "repeated": comparison.prompts.repeated,
            "published_set": comparison.prompts.published,
            "digest": digest(*(prompt.encode() for prompt in comparison.prompts.prompts)),
        },
        "seeds": comparison.seeds,
        "sampler": {
            "name": "DDIM",
            "steps": config.sampler_steps,
            "guidance": config.guidance,
            "noise_seed": config.seed,
            "control_eps_scale": config.control_eps_scale,
        },
        "models": masked_tree(comparison.models),
        "judges": {judge.name: {"id": judge_id(judge), "tie": judge.tie} for judge in comparison.judges},
        "scores": scores,
        "win_rates": rates,
        "diversity": {name: _diversity(comparison, name) for name in names},
        "paper": reference(base, kind, comparison.prompts.published, config.guidance, judges),
    }


def _centre(comparison: ModelComparison, totals: np.ndarray) -> dict:
    by_prompt = totals.reshape(-1, comparison.seeds)
    return _middle(totals) | {
        "without_score": int(np.isnan(totals).sum()),
        "groups": {
            kind: {label: _middle(by_prompt[rows].ravel()) for label, rows in labels.items()}
            for kind, labels in comparison.prompts.groups.items()
        },
    }


def _middle(totals: np.ndarray) -> dict:
    """None where no picture has a score."""
    totals = totals[~np.isnan(totals)]
    mean, median = (float(totals.mean()), float(np.median(totals))) if len(totals) else (None, None)
    return {"mean": mean, "median": median}


def _rates(comparison: ModelComparison, judge: Judge, scores: dict[str, Scores], ours: str, theirs: str) -> dict:
    won = points(scores[ours].total, scores[theirs].total, judge.tie, comparison.seeds)
    return _interval(won) | {
        "groups": {
            kind: {label: _interval(won[rows]) for label, rows in labels.items()}
            for kind, labels in comparison.prompts.groups.items()
        },
    }


def _interval(won: np.ndarray) -> dict:
    """low, high: None where there are too few prompts for an interval. prompts: that the judge could judge."""
    return dict(zip(("win_rate", "low", "high", "prompts"), interval(won), strict=True))


def _diversity(comparison: ModelComparison, name: str, prompts: int = 200) -> float | None:
    """Root mean square difference of a prompt's pictures, pixels in [0, 1], first prompts only; None for one seed."""
    if comparison.seeds < 2:
        return None
    distances = []
    for row in range(min(prompts, len(comparison.prompts.prompts))):
        some = comparison.pictures[name][row * comparison.seeds : (row + 1) * comparison.seeds]
        flat = np.stack(some).reshape(comparison.seeds, -1).astype(np.float32) / 255
        first, second = np.triu_indices(comparison.seeds, 1)
        distances.append(np.sqrt(((flat[first] - flat[second]) ** 2).mean(-1)).mean())
    return float(np.mean(distances))
