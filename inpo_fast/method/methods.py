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
    method = method_of(name)
    if uses_inversion(name, inversion):
        name += "" if objective.tau_norm == "none" else f"-{objective.tau_norm}"
        name += "" if inversion.estimator == method.estimator else f"-{inversion.estimator}"
        if inversion.estimator != "ddim" and inversion.refinements != 1:
            name += f"-k{inversion.refinements}"
        name += "" if inversion.refine_at == "target" else "-refined-at-source"
        name += "" if inversion.model == "policy" else "-ref-frozen" if inversion.frozen else "-ref"
        name += "" if inversion.grid == "exact" else f"-{inversion.grid}"
        name += "" if inversion.evaluate_at == "source" else "-target"
        name += "" if inversion.guidance == 0 else f"-w{inversion.guidance:g}"
        name += "" if inversion.eta == 0 else f"-eta{inversion.eta:g}"
        name += "-fp8" if inversion.fp8 else ""
    elif method.inverts:
        name = method.without_inversion
    name += "-velocity" if objective.error_space == "velocity" else ""
    if method.uses_gamma and objective.gamma != ObjectiveConfig.gamma:
        name += f"-gamma{objective.gamma:g}"
    if objective.label_smoothing and "label_smoothing" not in method.refuses:
        name += f"-ls{objective.label_smoothing:g}"
    return name + (
        "-wp" if objective.winner_preserving is not None and "winner_preserving" not in method.refuses else ""
    )
