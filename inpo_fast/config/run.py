"""What a run is told: a dataclass for each group of keys. A field's docstring is its --help."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Literal

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.data.config import DataConfig
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.methods import MethodName, variant_name
from inpo_fast.models.config import ModelsConfig
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.yaml_text import to_text

Kind = Literal["adamw", "adamw-bf16", "adamw-8bit", "adafactor"]


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how much at once, how often saved."""

    steps: int = 400
    """Optimizer steps."""
    pairs_per_step: int = 1024
    """The global batch: pairs of one optimizer step over all processes."""
    micro_batch: int = 8
    """Pairs per forward and backward pass of one process. No effect on the result beyond rounding."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    milestone_every: int = 0
    """Checkpoints of every so many steps stay on disk as well (a multiple of checkpoint_every). 0: none."""
    shard_states: bool = False
    """Several processes: each keeps only its part of the fp32 masters and of the optimizer's state (for SDXL). The
    same result, to rounding."""
    patience_minutes: float = 30.0
    """How long processes wait for one that makes no progress before they name it and stop, from set-up to report.
    Longer than what makes none on the way: compiling, opening a model."""
    threads: int | None = None
    """CPU threads per process. None: torch's choice."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its learning rate over time, averaged weights."""

    kind: Kind = "adamw"
    """adamw: 8 bytes of state a parameter. adamw-bf16: 4, stochastically rounded. adamw-8bit: 2 (bitsandbytes).
    adafactor: almost none (arXiv 1804.04235; no relative step, no scale parameter: the paper's choice for SDXL)."""
    lr: float = 1.024e-5
    """Published value for SD1.5 and SDXL alike (1e-8 x 1024 pairs). Does not depend on the number of GPUs."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; linear and cosine end at 0 with the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    """AdamW's; Adafactor has its own."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    average: Literal["none", "last-half", "ema"] = "none"
    """Averaged weights become the output model: running mean over the last half of the steps, or EMA."""
    ema_decay: float = 0.99


@dataclass(frozen=True)
class ObserveConfig:
    """Looking at a run while it trains: pictures, held-out pairs, Weights & Biases."""

    images_every: int = 0
    """Steps between pictures of fixed prompts, drawn as evaluate.* says (one seed). 0: none."""
    images: int = 8
    """How many prompts, spread evenly over them."""
    prompts: str | None = None
    """Where they come from, as evaluate.prompts. None: evaluate.prompts."""
    held_out: str | None = None
    """Preference pairs that are not trained on, as data.source: accuracy, margins and errors on them. None: none."""
    held_out_every: int = 50
    """Steps between two looks at them; the first step and the last have one."""
    held_out_pairs: int = 256
    """How many of them, the same each time."""
    fine_inversion: int = 200
    """Before the first step, x_t of a few images is compared with that of so many inversion.steps on the exact path,
    for at most 1 % of the run's UNet evaluations; a warning where it holds much less or more noise. 0: never."""
    wandb: str | None = None
    """Project of Weights & Biases that metrics and pictures go to (WANDB_MODE=offline keeps them here). None: none."""


@dataclass(frozen=True)
class OnlineConfig:
    """Pairs drawn from the policy while it trains and judged at once (online InPO; with method=dpo online DPO …)."""

    every: int = 0
    """Steps of a round: before its first one new pairs are drawn from the policy as it is. 0: none."""
    start: int = 0
    """The first step that has drawn pairs."""
    mix: float = 0.5
    """Share of the pairs that are drawn instead of read; each keeps the prompt of the pair whose place it takes."""
    judge: str | None = None
    """Who says which picture is better, as evaluate.judge."""
    candidates: int = 2
    """Pictures drawn for a prompt; the best and the worst of them make the pair."""
    sampler_steps: int = 50
    """DDIM steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale (7.5 SD1.5, 5 SDXL)."""
    batch: int = 16
    """Pictures drawn at once."""
    keep: bool = False
    """Keep the pictures of rounds that no checkpoint needs any more; they can be read as data.source."""

    @property
    def evaluations_a_pair(self) -> int:
        """UNet evaluations that drawing one pair takes."""
        return self.candidates * self.sampler_steps * (2 if self.guidance > 1 else 1)


@dataclass(frozen=True)
class PlanConfig:
    """The machine that --dry-run plans for."""

    gpus: int | None = None
    """None: as many as there are processes."""
    memory: float = 80.0
    """GiB of one GPU."""
    tflops: float = 400.0
    """TFLOP/s that one GPU is expected to reach, for the GPU-hours. A guess of yours, not a measurement."""


@dataclass(frozen=True)
class RunConfig:
    """Align a diffusion model with preference pairs (DDIM-InPO, arXiv 2503.18454)."""

    method: MethodName = "inpo"
    """inpo: inversion preference optimization. smpo: SmPO-Diffusion (with inversion.estimator=renoise). dpo:
    Diffusion-DPO. kto: Diffusion-KTO. sft: winners only. docs/methods.md has the formulas."""
    seed: int = 0
    """Everything random is a function of it and of the pair's position."""
    output: str | None = None
    """Folder of the run. Default: runs/<name of the config file>."""
    resume: bool = False
    """Continue from the newest checkpoint in the output folder; where there is none, from step 0. A run can be made
    longer (train.steps) where that changes nothing of the steps done."""
    overwrite: bool = False
    """Replace the run in the output folder. It is kept aside there until the new one has its first checkpoint, so there
    must be room for both."""
    accept_changed_inputs: bool = False
    """With --resume: go on although pairs, labels or the model's files are not those that the run began with.
    manifest.json keeps what they were and what they are."""
    dry_run: bool = False
    """Print what the run needs (memory, work, the step batch's arithmetic) and stop. Loads no weights."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    inversion: InversionConfig = field(default_factory=InversionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def variant_of(config: RunConfig) -> str:
    """The honest name of what is trained."""
    name = variant_name(config.method, config.objective, config.inversion)
    return f"{name}-online" if config.online.every else name


def split_batch(config: TrainConfig, world: int) -> int:
    """Micro-batches per step and process. UserError, before anything is loaded, when the arithmetic does not divide."""
    if config.pairs_per_step % world:
        near = max(world, config.pairs_per_step // world * world)
        raise UserError(
            f"train.pairs_per_step={config.pairs_per_step} does not divide over {world} processes; "
            f"take a multiple of {world} such as {near}"
        )
    own = config.pairs_per_step // world
    if own % config.micro_batch:
        fits = max(d for d in range(1, min(own, config.micro_batch) + 1) if own % d == 0)
        raise UserError(
            f"train.micro_batch={config.micro_batch} does not divide the {own} pairs that each of {world} processes "
            f"has per step; take a divisor such as {fits}"
        )
    return own // config.micro_batch


def to_dict(config) -> dict:
    """Nested plain values, in the order of the fields."""
    out = {}
    for f in fields(config):
        value = getattr(config, f.name)
        out[f.name] = to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
    return out


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested groups of a configuration as one, keys joined by dots."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def to_yaml(config: RunConfig) -> str:
    return to_text(to_dict(config))
