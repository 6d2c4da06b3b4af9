"""What Diffusion-KTO measures an image's gain against: how far the policy is from the reference, over a whole step."""

import torch

from inpo_fast.runtime import distributed


def reference_point(gains: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Diffusion-KTO's estimate of the divergence from the reference (arXiv 2404.04465, Eq. 8): the mean of r - e over
    all images of the step and processes, weighted as the pairs are, at least 0; a scalar, fp32.

    gains: of each micro-batch, r - e (2, B) and the pairs' weights (B,). All processes call it.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for gain, weight in gains:
        sums += torch.stack([(weight * gain.double()).sum(), 2 * weight.double().sum()])
    distributed.sum_([sums], "reference point")
    return (sums[0] / sums[1].clamp_min(1e-12)).clamp_min(0).float()
