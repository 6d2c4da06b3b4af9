"""The methods, one entry each: which images they take, their loss, and what their name says of a run.

A new method is an entry of METHODS and its loss in losses.py. `docs/methods.md` has the formulas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.losses import pair_utility_loss, preference_loss, smoothed_preference_loss
from inpo_fast.runtime.errors import UserError


class Terms(NamedTuple):
    """What a loss is made of. error, reference_error: (S B,) of policy and reference, S sides, winners first; logit,
    label: (B,) of the pairs; reference_point: a scalar without gradient, 0 where the method has none."""

    error: torch.Tensor
    reference_error: torch.Tensor
    logit: torch.Tensor
    label: torch.Tensor
    reference_point: torch.Tensor


@dataclass(frozen=True)
class Method:
    """title, paper: for people; paper is an arXiv number.

    loss: of each pair, (B,). sides: images of a pair that are trained on, winner and loser or the winner alone.
    inverts: x_t comes from inversion, with the `estimator` that the paper has; else x_0 gets a Gaussian draw.
    without_inversion: what it is called where inversion.estimator=random takes the inversion away.
    fused: `inpo_kernels.inpo_loss` is its loss. uses_reference: the loss looks at the reference's error.
    reference_point: the step has to provide that, of all its images, before the first gradient.
    uses_gamma: objective.gamma is a part of it. refuses: other fields of ObjectiveConfig that mean nothing to it, and
    why.
    """

    title: str
    paper: str | None
    loss: Callable[[Terms, ObjectiveConfig], torch.Tensor]
    sides: int = 2
    inverts: bool = False
    estimator: str | None = None
    without_inversion: str | None = None
    fused: bool = False
    uses_reference: bool = True
    reference_point: bool = False
    uses_gamma: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)


def _preference(terms: Terms, config: ObjectiveConfig) -> torch.Tensor:
    return preference_loss(terms.logit, terms.label)


def _smoothed_preference(terms: Terms, config: ObjectiveConfig) -> torch.Tensor:
    return smoothed_preference_loss(terms.logit, terms.label, config.gamma)


def _utility(terms: Terms, config: ObjectiveConfig) -> torch.Tensor:
    return pair_utility_loss(terms.error, terms.reference_error, terms.reference_point, terms.label, config.beta)


def _winners_error(terms: Terms, config: ObjectiveConfig) -> torch.Tensor:
    return terms.error


ESTIMATORS = {
    "ddim": "the inversion is DDIM's, in one evaluation a step",
    "renoise": "steps of the inversion are refined by ReNoise's average",
    "fixed-point": "steps of the inversion are refined by fixed-point iteration",
    "gradient": "steps of the inversion are refined by gradient descent",
}
METHODS = {
    "inpo": Method(
        "DDIM-InPO", "2503.18454", _preference, inverts=True, estimator="ddim", without_inversion="dpo", fused=True
    ),
    "smpo": Method(
        "SmPO-Diffusion",
        "2506.02698",
        _smoothed_preference,
        inverts=True,
        estimator="renoise",
        without_inversion="smpo-random",
        uses_gamma=True,
    ),
    "dpo": Method("Diffusion-DPO", "2311.12908", _preference, fused=True),
    "kto": Method(
        "Diffusion-KTO",
        "2404.04465",
        _utility,
        reference_point=True,
        refuses={"winner_preserving": "weighs a loser against its winner; method=kto takes images alone"},
    ),
    "sft": Method(
        "fine-tuning on the preferred images only",
        None,
        _winners_error,
        sides=1,
        uses_reference=False,
        refuses={
            "winner_preserving": "needs a loser; method=sft has none",
            "label_smoothing": "needs a label; method=sft takes the winners as they are",
        },
    ),
}
MethodName = Literal[tuple(METHODS)]


def method_of(name: str) -> Method:
    """UserError for a name that the table does not have."""
    if name not in METHODS:
        raise UserError(f"method={name}: unknown; take one of {', '.join(METHODS)}")
    return METHODS[name]


def uses_inversion(name: str, inversion: InversionConfig) -> bool:
    return method_of(name).inverts and inversion.estimator != "random"


def variant_name(name: str, objective: ObjectiveConfig, inversion: InversionConfig) -> str:
    """The honest name of what is trained: a paper's method only where nothing deviates from it."""
    return "-".join([family_of(name, inversion), *deviations(name, objective, inversion)])


def family_of(name: str, inversion: InversionConfig) -> str:
    """The entry of METHODS that describes what is trained; without its inversion inpo is dpo."""
    method = method_of(name)
    return method.without_inversion.partition("-")[0] if _without_inversion(method, inversion) else name


def deviations(name: str, objective: ObjectiveConfig, inversion: InversionConfig) -> dict[str, str]:
    """Each deviation from the publication: its part of the name, and what it is."""
    method, found = method_of(name), {}
    if uses_inversion(name, inversion):
        found |= _deviations_of_inversion(method, objective, inversion)
    elif _without_inversion(method, inversion):
        rest = method.without_inversion.partition("-")[2]
        found |= {rest: "x_t is x_0 with Gaussian noise, no inversion"} if rest else {}
    if objective.error_space == "velocity":
        found["velocity"] = "errors are those of the velocity, not of the noise"
    if method.uses_gamma and objective.gamma != ObjectiveConfig.gamma:
        found[f"gamma{objective.gamma:g}"] = f"gamma {objective.gamma:g} instead of {ObjectiveConfig.gamma:g}"
    if objective.label_smoothing and "label_smoothing" not in method.refuses:
        found[f"ls{objective.label_smoothing:g}"] = f"a label counts as wrong with chance {objective.label_smoothing:g}"
    if objective.winner_preserving is not None and "winner_preserving" not in method.refuses:
        found["wp"] = f"the loser's gradient is held back for the winner's sake, mu {objective.winner_preserving:g}"
    return found


def _without_inversion(method: Method, inversion: InversionConfig) -> bool:
    return method.inverts and inversion.estimator == "random"


def _deviations_of_inversion(method: Method, objective: ObjectiveConfig, inversion: InversionConfig) -> dict[str, str]:
    found = {}
    if objective.tau_norm != "none":
        along = ", without its part along the image" if objective.tau_norm == "orthogonal" else ""
        found[objective.tau_norm] = f"the inverted noise{along} is scaled to a root mean square of 1"
    if inversion.estimator != method.estimator:
        found[inversion.estimator] = ESTIMATORS[inversion.estimator]
    if inversion.estimator != "ddim" and inversion.refinements != 1:
        found[f"k{inversion.refinements}"] = f"each step of the inversion is refined {inversion.refinements} times"
    if inversion.refine_at != "target":
        found["refined-at-source"] = "refinements of a step are told the level that it comes from"
    if inversion.model != "policy":
        found["ref"] = "the frozen base inverts, not the trained model"
    if inversion.model != "policy" and inversion.frozen:
        found["frozen"] = "each pair keeps one timestep and one inversion"
    if inversion.grid != "exact":
        found[inversion.grid] = f"the levels of the inversion are those of inversion.grid={inversion.grid}"
    if inversion.evaluate_at != "source":
        found["target"] = "each step of the inversion is told the level that it goes to"
    if inversion.guidance != 0:
        found[f"w{inversion.guidance:g}"] = f"the inversion is guided by the prompt, scale {inversion.guidance:g}"
    if inversion.eta != 0:
        found[f"eta{inversion.eta:g}"] = f"noise is added in each step of the inversion, eta {inversion.eta:g}"
    if inversion.fp8:
        found["fp8"] = "the inversion computes in fp8"
    return found
