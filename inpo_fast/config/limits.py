"""Between what a number of the configuration may lie: one line for each key with a number, and none without.

The upper limits are far above what anybody runs: they catch slips of the keyboard before memory, threads or whole
numbers of 64 bits run out.
"""

from dataclasses import dataclass

from inpo_fast.runtime.arguments import MANY, SEEDS
from inpo_fast.runtime.errors import UserError


@dataclass(frozen=True)
class Limits:
    """least..most, both allowed unless least is excluded (`above`) or most is (`below`). need: in the user's words,
    None: from the numbers."""

    least: float
    most: float = MANY
    above: bool = False
    below: bool = False
    need: str | None = None

    def hold(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def said(self, value: float) -> str:
        if self.need is not None:
            return self.need
        if value > self.most or (self.below and value == self.most):
            return f"{'below' if self.below else 'at most'} {self.most:,}"
        if self.least == 0:
            return "positive" if self.above else "not negative"
        return f"at least {self.least:,}"


POSITIVE, NOT_NEGATIVE, COUNT, COUNT_OR_NONE = Limits(0, above=True), Limits(0), Limits(1), Limits(0)
# of a sampler: no more than noise levels, less one, as diffusers' DDIM has no 1000th step with steps_offset=1
STEPS = Limits(1, 999)
GUIDANCE = Limits(0, 1000)
PICTURES = Limits(1, 100_000)  # at once
LIMITS = {
    "seed": Limits(0, SEEDS),
    "models.lora.rank": Limits(0, 10_000),
    "models.lora.alpha": Limits(0, 1e6, above=True),
    "data.filters.min_score": Limits(-1e30, 1e30),
    "data.filters.min_side": COUNT_OR_NONE,
    "data.resolution": Limits(1, 16_384),
    "data.prompt_dropout": Limits(0, 1, need="in 0..1"),
    "data.vae_batch": PICTURES,
    "data.max_pixels": Limits(1, 10**12),
    "data.bad_pair_limit": NOT_NEGATIVE,
    "data.workers": Limits(1, 1024),
    "data.prefetch_mb": COUNT_OR_NONE,
    "data.cache_mb": COUNT,
    "inversion.steps": COUNT,
    "inversion.guidance": GUIDANCE,
    "inversion.eta": Limits(0, 1),
    "inversion.refinements": Limits(1, 1000),
    "inversion.batch": PICTURES,
    "objective.beta": POSITIVE,
    "objective.winner_preserving": Limits(0, 1, need="in 0..1, or null"),
    "objective.timesteps.min": Limits(0, 999, need="within 0..999"),
    "objective.timesteps.max": Limits(0, 999, need="within 0..999"),
    "objective.timesteps.per_pair": Limits(1, 1000, need="in 1..1000, the number of different ones"),
    "objective.label_smoothing": Limits(0, 0.5, below=True, need="in 0..0.5, 0.5 excluded"),
    "objective.gamma": POSITIVE,
    "online.every": COUNT_OR_NONE,
    "online.start": COUNT_OR_NONE,
    "online.mix": Limits(0, 1, above=True, need="in 0..1, 0 excluded"),
    "online.candidates": Limits(2, 10_000),
    "online.sampler_steps": STEPS,
    "online.guidance": GUIDANCE,
    "online.batch": PICTURES,
    "train.steps": COUNT,
    "train.pairs_per_step": Limits(1, 1_000_000),
    "train.micro_batch": Limits(1, 1_000_000),
    "train.checkpoint_every": COUNT,
    "train.keep_checkpoints": COUNT,
    "train.milestone_every": COUNT_OR_NONE,
    "train.patience_minutes": Limits(0, 1e6, above=True),
    "train.threads": Limits(1, 1024),
    "optim.lr": POSITIVE,
    "optim.warmup_steps": COUNT_OR_NONE,
    "optim.betas": Limits(0, 1, below=True, need="in 0..1, 1 excluded"),
    "optim.eps": NOT_NEGATIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.clip": Limits(0, 1e30, above=True),
    "optim.ema_decay": Limits(0, 1, above=True, below=True, need="between 0 and 1"),
    "evaluate.seeds": Limits(1, 10_000),
    "evaluate.sampler_steps": STEPS,
    "evaluate.guidance": GUIDANCE,
    "evaluate.batch": PICTURES,
    "evaluate.control_eps_scale": Limits(0, 1000, above=True),
    "evaluate.seed": Limits(0, SEEDS),
    "observe.fine_inversion": COUNT_OR_NONE,
    "observe.images_every": COUNT_OR_NONE,
    "observe.images": Limits(1, 10_000),
    "observe.held_out_every": COUNT,
    "observe.held_out_pairs": COUNT,
    "plan.gpus": Limits(1, 1_000_000),
    "plan.memory": Limits(0, 1e6, above=True),
    "plan.tflops": Limits(0, 1e9, above=True),
}


def check_limits(settings: dict[str, object]) -> None:
    """UserError that names the first key whose number lies outside. settings: dotted key -> value."""
    for key, value in settings.items():
        values = value if isinstance(value, tuple | list) else [value]
        for number in values:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            limits = LIMITS.get(key)
            if limits is not None and not limits.hold(number):
                shown = list(value) if isinstance(value, tuple) else value
                raise UserError(f"{key}={shown}: must be {limits.said(number)}")
