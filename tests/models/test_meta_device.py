"""What is counted with remembered results is what torch's own give, and no result is remembered that must not be."""

from contextlib import nullcontext

import pytest
import torch
from tiny_world import tiny_pipeline
from torch.utils._pytree import tree_leaves

from inpo_fast.cost.flops import network_passes
from inpo_fast.cost.memory_traffic import network_traffic
from inpo_fast.models import meta_device
from inpo_fast.models.families import denoiser_of
from inpo_fast.models.peak_memory import decoding_bytes, encoding_bytes


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(meta_device, "RESULTS", {})


def meta(*shape, **how):
    return torch.empty(*shape, device="meta", **how)


def test_counts_are_those_without_it(monkeypatch):
    pipeline = tiny_pipeline()
    unet, vae = pipeline.unet.to("meta", torch.bfloat16), pipeline.vae.to("meta")

    def counts():
        passes = [network_passes(unet, 8, *how) for how in ((16, False), (16, True), (7, False))]
        unet.disable_gradient_checkpointing()
        traffic, forward = network_traffic(unet, 8, 16), denoiser_of(unet).forward_bytes(unet, 8, 16)
        return passes, traffic, forward, encoding_bytes(vae, 32, 2), decoding_bytes(vae, 8, 2)

    first, again = counts(), counts()
    assert len(meta_device.RESULTS) > 50
    monkeypatch.setattr(meta_device, "_KnownResults", nullcontext)
    assert first == again == counts()


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x + 1,
        lambda x: x + 1.0,
        lambda x: x * True,
        lambda x: x.to(torch.float16),
        lambda x: x.mT.sum(0, keepdim=True),
        lambda x: torch.nn.functional.layer_norm(x.float(), x.shape[-1:]),
        lambda x: torch.cat([x, x.to(torch.float64)], 1),
        lambda x: x.float().sort(),
        lambda x: x.mT.reshape(-1),
    ],
    ids=["int", "float", "bool", "half", "transposed", "norm", "cat", "several", "copied"],
)
def test_results_are_torchs_own(run):
    """Asked in turn for tensors that differ in dtype, in strides or in shape alone."""
    given = [meta(4, 6, dtype=torch.int64), meta(4, 6), meta(6, 4).mT, meta(4, 1).expand(4, 6), meta(8, 6)[::2]]
    for _ in range(2):
        for x in given:
            with meta_device.counting():
                known = run(x)
            for y, own in zip(tree_leaves(known), tree_leaves(run(x)), strict=True):
                assert (y.shape, y.stride(), y.dtype, y.device) == (own.shape, own.stride(), own.dtype, own.device)


def test_views_and_what_writes_are_never_remembered():
    x = meta(4, 6)
    with meta_device.counting():
        for _ in range(2):
            for view in (
                x.view(24),
                x.mT,
                x.flatten(),
                x[1:],
                torch.ops.aten._unsafe_view(x, [24]),
                x.add_(1),
                x.detach(),
            ):
                assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
            made = (x + 1, x + 1)
            assert made[0].untyped_storage()._cdata != made[1].untyped_storage()._cdata


def test_the_cpu_computes_as_ever():
    with meta_device.counting():
        assert [(torch.ones(2) * k).tolist() for k in (2, 3, 2)] == [[2, 2], [3, 3], [2, 2]]
    assert not any(meta_device.RESULTS.values())
