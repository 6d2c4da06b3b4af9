"""The traps that made others' trainers slow or wrong, one test each.

Elsewhere: gradients of micro-batches (test_step), strides at every convolution (test_fast_unet), waits of the host
(test_syncs), the schedule in bf16 (test_schedule).
"""

import torch
import torch.nn.functional as F
from tiny_world import tiny_xl

from inpo_fast.models import Models, ModelsConfig


def test_policy_and_reference_take_the_same_matrix_product():
    """For a strided input F.linear calls mm where the weight wants a gradient and bmm where not, even without grad;
    1280 wide, as SDXL's proj_in, the two round differently in bf16, and step 0's logit is not 0 any more."""
    models = Models(tiny_xl(), torch.device("cpu"), ModelsConfig(precision="bf16"))
    generator = torch.Generator().manual_seed(0)
    image, weight = (torch.randn(n, 1280, 4, 4, generator=generator).bfloat16() for n in (2, 80))
    tokens = image.permute(0, 2, 3, 1).reshape(2, 16, 1280)  # a view, as diffusers makes it
    weight = weight.flatten()[: 1280 * 1280].view(1280, 1280)
    flags = [next(unet.parameters()).requires_grad for unet in (models.policy, models.reference)]
    with torch.no_grad():
        policy, reference = (F.linear(tokens, weight.clone().requires_grad_(flag), weight[0]) for flag in flags)
    assert torch.equal(policy, reference)
    assert all(p.requires_grad for p in models.reference.parameters())
