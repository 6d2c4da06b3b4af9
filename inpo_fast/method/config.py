"""What a configuration says of the inversion and the objective. A field's docstring is its --help."""

from dataclasses import dataclass, field
from typing import Literal

Grid = Literal["exact", "spread", "snap", "diffusers-0.20", "diffusers-0.22"]
EvaluateAt = Literal["source", "target"]
Estimator = Literal["ddim", "renoise", "fixed-point", "gradient", "random"]


@dataclass(frozen=True)
class InversionConfig:
    """How x_t is found from x_0 (paper section 4.2, Eq. 14-16)."""

    steps: int = 10
    """n, the number of global levels. Paper: 10 is the trade-off, 30 the best quality."""
    grid: Grid = "exact"
    """exact: global levels, the last step lands on t. spread: n levels round(t k / n) of each sample's own.
    snap: t itself is moved to a global level. diffusers-0.20 / -0.22: what the published script does under these
    versions, which is not to land on t: docs/methods.md says by how much."""
    evaluate_at: EvaluateAt = "source"
    """Which level the UNet is conditioned on: the one x is at (Eq. 15), or the one it goes to (diffusers >= 0.22)."""
    model: Literal["policy", "reference"] = "policy"
    """Who inverts. The paper: the current policy. reference is a variant and labelled so."""
    guidance: float = 0.0
    """w_inv: 0 empty prompt (the paper), 1 conditional, else classifier-free guidance (two evaluations)."""
    eta: float = 0.0
    """Noise added per step, eta * sigma_ddim. The paper: none; the published script: 0.1."""
    estimator: Estimator = "ddim"
    """How delta_t is estimated (S3): DDIM inversion; steps refined by ReNoise's average (method smpo), by fixed-point
    iteration, or by gradient descent on the residual; i.i.d. Gaussian noise (= Diffusion-DPO's choice)."""
    refinements: int = 1
    """Of each step, with renoise, fixed-point and gradient: that many more UNet evaluations (gradient: twice)."""
    refine_at: EvaluateAt = "target"
    """Which level those are conditioned on: the one that the step goes to, where x is by then, or (source) the one it
    comes from, as SmPO's published script does under the diffusers 0.20 that it pins."""
    fp8: bool = False
    """Linear layers of the inversion in fp8 (needs models.fast). x_t moves a little: a variant and labelled so."""
    batch: int = 64
    """Images per UNet evaluation. No effect on the result beyond rounding."""
    cache: str | None = None
    """Folder of trajectories; needs model=reference. Those in it are not computed, the others are added. No effect on
    the result beyond rounding. Runs that differ in seed (with data.vae_sample=false), beta, lr … share it."""
    frozen: bool = False
    """The cache also keeps x_t and the reference's prediction: t is then a function of the pair, the same in every
    epoch and for every seed. A variant and labelled so; only the policy's step is left of a cached run."""


@dataclass(frozen=True)
class Timesteps:
    """Uniform t in min..max. The paper trains all; training only the last 900, 800 … loses little (S9)."""

    min: int = 0
    max: int = 999
    per_pair: int = 1
    """How many of them a pair is trained at in its step, evenly spaced around min..max from a drawn one; the loss is
    their mean. On grids with global levels one inversion trajectory serves all. train.micro_batch counts a pair at
    one timestep."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised (Eq. 18)."""

    beta: float = 2000.0
    """Strength of the pull to the reference. Paper: 2000 (SD1.5), 5000 (SDXL)."""
    tau_norm: Literal["none", "rms", "orthogonal"] = "none"
    """none: the paper. rms: tau / rms(tau) for each image, x_t rebuilt from it; labelled `inpo-rms`. orthogonal: the
    same after tau's part along x_0 was taken away, as noise has none; labelled `inpo-orthogonal`."""
    winner_preserving: float | None = None
    """mu of Diffusion-SDPO (arXiv 2511.03317) in [0, 1]: scales the loser's gradient so that the winner's
    error falls to first order. None: off."""
    timesteps: Timesteps = field(default_factory=Timesteps)
    label_smoothing: float = 0.0
    """In 0..0.5: how probable it is that a pair's label is the wrong way round (cDPO). Label y becomes
    (1 - s) y + s (1 - y), also where y is soft already."""
    error_space: Literal["noise", "velocity"] = "noise"
    """Whose squared error e is. noise: the paper's, also of a model that predicts v, whose timesteps then weigh the
    less the noisier they are (docs/methods.md). velocity: of v itself, for models that predict it; labelled so."""
    gamma: float = 10.0
    """Of method smpo: its logit is (2 y - 1) gamma times that of inpo, y the pair's soft label. Published code: 10."""
