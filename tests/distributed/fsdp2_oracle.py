"""Run in several processes by test_fsdp2.py: split states against torch's own fully_shard, on the same pairs.

Each process has other pairs. Ours: whole working copies, one reduction, parts of masters. FSDP2: sharded parameters,
gathered for each forward, gradients reduced after each backward. Both then take a clipped AdamW step.
"""

import copy

import torch
import torch.distributed as dist
from tiny_world import one_level, tiny_pipeline
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from inpo_fast.config.run import OptimConfig
from inpo_fast.data.loader import DataConfig, PairLoader, open_data
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.models import Models
from inpo_fast.models.zero1 import Zero1Partition
from inpo_fast.runtime import distributed
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.optim import make_optimizer
from inpo_fast.training.step import micro_step, train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

PAIRS, CLIP = 6, 0.05


def check_split(rank: int, world: int) -> None:
    """Parts of a sum and wholes of parts, of sizes below, at and beyond the number of processes, and in bf16."""
    split = Zero1Partition(rank, world)
    shapes = [(1,), (2, 3), (world, 2), (7, 5, 2), (4 * world + 1,)]
    everybody = [
        [torch.randn(s, generator=torch.Generator().manual_seed(100 * r + i)) for i, s in enumerate(shapes)]
        for r in range(world)
    ]
    want = [sum(x[i].double() for x in everybody) for i in range(len(shapes))]
    parts = [split.part(w).float().clone().fill_(9) for w in want]
    split.reduce(everybody[rank], parts)
    for part, w in zip(parts, want, strict=True):
        assert part.shape == w[split.rows(len(w))].shape
        assert torch.allclose(part.double(), split.part(w), rtol=0, atol=1e-6)
    assert sum(len(range(*split.rows(7, r).indices(7))) for r in range(world)) == 7
    for dtype in (torch.float32, torch.bfloat16):
        whole = [torch.empty(s, dtype=dtype) for s in shapes]
        split.gather([split.part(x) for x in everybody[0]], whole)
        assert all(torch.equal(got, x.to(dtype)) for got, x in zip(whole, everybody[0], strict=True))


def main(pairs: str) -> None:
    rank, world, device = distributed.start(2)
    check_split(rank, world)
    models = Models(one_level(tiny_pipeline()), device, ModelsConfig(base="here"), Zero1Partition(rank, world))
    sharded = copy.deepcopy(models.policy)
    step_config = StepConfig(
        method="inpo",
        objective=ObjectiveConfig(beta=500.0),
        inversion=InversionConfig(steps=2, batch=8),
        micro_batch=1,
        vae_sample=False,
        seed=0,
    )
    data = DataConfig(source=pairs)
    loader = PairLoader(open_data(data), data, resolution=models.resolution, seed=0, rank=rank, world=world)
    step_batch = make_step_batch(next(loader.steps(0, 1, PAIRS)), models, step_config, models.encode_empty())
    with torch.no_grad():
        x_t, _ = noisy_latents(step_batch, models, step_config)

    metrics, _ = train_step(step_batch, models, step_config, PAIRS, CLIP)
    norm = metrics.values()["grad_norm"]
    optimizer = make_optimizer(models.parameters(), OptimConfig(lr=1e-3))
    optimizer.step()
    models.weights.refresh()

    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    models.policy = sharded
    for lo in range(0, len(step_batch.items), step_config.micro_batch):
        pairs = slice(lo, lo + step_config.micro_batch)
        weight = world / PAIRS  # it takes means over processes
        found = micro_step(step_batch, x_t, 0, pairs, models, step_config, weight)
        found.prediction.backward(found.objective.dpred)
    theirs = torch.nn.utils.clip_grad_norm_(sharded.parameters(), CLIP).full_tensor()
    assert norm > 2 * CLIP  # it was clipped
    assert abs(norm - theirs.item()) < 1e-5 * norm, (norm, theirs)
    torch.optim.AdamW(sharded.parameters(), lr=1e-3, weight_decay=0.01).step()
    moved = 0.0
    base = dict(models.reference.named_parameters())
    # of the largest gradient: sums of the same fp32 values in another order
    gradients = dict(zip(models.weights.names, models.weights.gradients, strict=True))
    for (name, ours), (_, p) in zip(models.weights.whole(), sharded.named_parameters(), strict=True):
        want, gradient = p.full_tensor().detach(), p.grad.to_local()
        # both cut along the first dimension in the same way
        assert gradients[name].shape == gradient.shape
        if gradient.numel():
            assert (gradients[name] - gradient).abs().max() <= 1e-6 * CLIP, name
        moved = max(moved, (want - base[name]).abs().max().item())
        # a gradient of rounding alone has a sign that rounding decides: it moves by lr one way or the other
        assert ((ours - want).abs() > 1e-5).float().mean() < 0.02, name
    assert moved > 5e-4
    dist.barrier()
    if rank == 0:
        print("equal")
    distributed.stop()
