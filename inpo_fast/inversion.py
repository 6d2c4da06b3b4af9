"""x_0 -> x_t for all images of an optimizer step at once: the wavefront.

Inside one optimizer step the weights do not change, so inverting the whole window first, in large
batches of mixed timesteps, is the same computation as inverting one pair at a time. Samples are
sorted by how many evaluations they need; step j advances the first of them that need more than j.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from inpo_kernels.ddim_step import ddim_step_

from inpo_fast.schedule import Climb, EvaluateAt, Grid

# eps(x, time, rows): noise prediction for samples x (B, C, H, W) told time (B,), with the conditioning of
# the window's rows (B,) int64.
Eps = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class InversionConfig:
    """How x_t is found from x_0 (paper section 4.2, Eq. 14-16)."""

    steps: int = 10
    """n, the number of global levels. Paper: 10 is the trade-off, 30 the best quality."""
    grid: Grid = "exact"
    """exact: global levels, the last step lands on t. spread: n levels round(t k / n) of each sample's own.
    snap: t itself is moved to a global level. diffusers-0.20 / -0.22: the published script's two behaviours."""
    evaluate_at: EvaluateAt = "source"
    """Which time the UNet is told: the level it is at (Eq. 15), or the one it goes to (diffusers >= 0.22)."""
    model: Literal["policy", "reference"] = "policy"
    """Who inverts. The paper: the current policy. reference is a variant and labelled so."""
    guidance: float = 0.0
    """w_inv: 0 empty prompt (the paper), 1 conditional, else classifier-free guidance (two evaluations)."""
    eta: float = 0.0
    """Noise added per step, eta * sigma_ddim. The paper: none; the published script: 0.1."""
    estimator: Literal["ddim", "random"] = "ddim"
    """How delta_t is estimated: DDIM inversion, or i.i.d. Gaussian noise (= Diffusion-DPO's choice)."""
    batch: int = 64
    """Images per UNet evaluation. No effect on the result beyond rounding."""
    cache: str | None = None
    """Folder of trajectories; needs model=reference. Those in it are not computed, the others are added. No effect on
    the result beyond rounding. Runs that differ in seed (with data.vae_sample=false), beta, lr … share it."""
    frozen: bool = False
    """The cache also keeps x_t and the reference's prediction: t is then a function of the pair, the same in every
    epoch and for every seed. A variant and labelled so; only the policy's step is left of a cached run."""


@torch.no_grad()
def invert(
    eps: Eps,
    x_0: torch.Tensor,
    climb: Climb,
    *,
    batch: int,
    conditional: Eps | None = None,
    guidance: float = 0.0,
    noise_keys: list[int] | None = None,
) -> tuple[torch.Tensor, int]:
    """All samples of a window to their own level.

    guidance 0 asks eps (the empty prompt), 1 asks conditional, anything else both.
    x_0: (M, C, H, W), any float dtype; the climb's coefficients are applied in fp32 (float64 stays float64).
    noise_keys: (M,) 63-bit keys of the per-step noise, required when the climb has sigma > 0.
    Returns x_t (M, C, H, W) in fp32 or float64, and the number of image evaluations spent.
    """
    noisy = bool(climb.sigma.any())
    if noisy and noise_keys is None:
        raise ValueError("inversion with eta > 0 needs noise_keys, one for each sample")
    both = guidance not in (0.0, 1.0)
    first = conditional if guidance == 1.0 else eps
    device = x_0.device
    order = torch.argsort(climb.evaluations, descending=True, stable=True)  # on the CPU: costs no device sync
    needed = climb.evaluations[order]
    wide = torch.float64 if x_0.dtype == torch.float64 else torch.float32
    x = x_0.to(wide)[order.to(device)].contiguous()  # latents may be channels_last
    p, q, sigma = (c[order].to(device, wide) for c in (climb.p, climb.q, climb.sigma))
    times, rows = climb.times[order].to(device), order.to(device)
    keys = torch.tensor(noise_keys)[order].to(device) if noisy else None

    spent = 0
    for j in range(int(needed.max()) if len(needed) else 0):
        active = int((needed > j).sum())
        for lo in range(0, active, batch):
            part = slice(lo, min(lo + batch, active))
            asked = x[part], times[part, j], rows[part]
            options = {}
            if both:
                options |= {"conditional": conditional(*asked), "guidance": guidance}
            if noisy:
                options |= {"sigma": sigma[part, j], "keys": keys[part], "steps": torch.full_like(keys[part], j)}
            ddim_step_(x[part], first(*asked), p[part, j], q[part, j], **options)
        spent += active * (2 if both else 1)
    x_t = torch.empty_like(x)
    x_t[rows] = x
    return x_t, spent
