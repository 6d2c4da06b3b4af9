"""models.fast=compiled: one graph a kind of block, for policy, reference and inversion. Tracing alone, without the C++
compiler; test_compiled_inductor.py has that."""

import copy
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from test_fast_inversion import ROUNDED, STEP_CONFIG, distance, inverted, move, small, world
from test_fast_unet import check_same, inputs, make
from tiny_world import one_level, tiny_pipeline, tiny_xl
from torch._dynamo.utils import counters

from inpo_fast.comparison.drawing import draw, drawing_with
from inpo_fast.config import RunConfig
from inpo_fast.config.rules import check
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.fast import compiled_blocks, fast_unet
from inpo_fast.models.fast.fast_unet import inverting, make_fast
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import make_step_batch

KINDS = ("sd", "xl")
LORA = LoraSettings(rank=2, targets=("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj"))


def small_xl():
    return one_level(tiny_xl(), width=16)


def pair(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A fused and a compiled UNet of the same weights."""
    unets = make(kind), make(kind)
    for unet, how in zip(unets, ("fused", "compiled"), strict=True):
        make_fast(unet, how)
    return unets


def kinds_of_blocks(unet, monkeypatch) -> list[tuple]:
    """What a graph is made for, of each in order: the function, the shapes of the block's own weights, and those that
    reach it, whatever the batch."""
    seen, graph_of = {}, compiled_blocks.graph_of

    def watched(function):
        def run(block, *args, **kwargs):
            shapes = [tuple(x.shape[1:]) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            parts = {fast_unet._enter: ("norm.", "proj_in."), fast_unet._leave: ("proj_out.",)}.get(function, ("",))
            weights = tuple((n, tuple(p.shape)) for n, p in block.named_parameters() if n.startswith(parts))
            seen[function, tuple(shapes), weights] = None
            return graph_of(function)(block, *args, **kwargs)

        return run

    args, more = inputs(unet)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(compiled_blocks, "graph_of", watched)
        unet(*args, **more)
    return list(seen)


@pytest.mark.parametrize("kind", KINDS, scope="module")
def test_one_graph_a_kind_of_block(traced, kind, monkeypatch):
    """Policy with a gradient, a copy of it without one, the inversion, other batches: all on the first one's graphs."""
    _, policy = pair(kind)
    reference = copy.deepcopy(policy)
    args, more = inputs(policy, 3)
    policy(*args, **more).sample.sum().backward()
    graphs = len(traced)
    kinds = kinds_of_blocks(policy, monkeypatch)
    assert graphs == len(kinds) == {"sd": 10, "xl": 10}[kind]
    with torch.no_grad():
        for unet, batch in ((reference, 3), (policy, 5), (reference, 2)):
            args, more = inputs(unet, batch)
            unet(*args, **more)
            with inverting(unet):
                unet(*args, **more)
    assert len(traced) == graphs
    texts = args[0], args[1], args[2][:1]
    with torch.no_grad(), inverting(policy):
        policy(*texts, **more)  # one text for all images: the transformers' blocks see another shape
    transformers = [function for function, _, _ in kinds if function is fast_unet._block]
    assert len(traced) == graphs + len(transformers) > graphs


@pytest.mark.parametrize("kind", KINDS, scope="module")
def test_compiled_is_fused(traced, kind):
    """Forward and every parameter's gradient; without gradient the same bits, and nothing that asks for one."""
    fused, fast = pair(kind)
    check_same(fast, fused)
    args, more = inputs(fast)
    with_gradient = fast(*args, **more).sample
    with torch.no_grad():
        without = fast(*args, **more).sample
        (bare,) = fast(*args, **more, return_dict=False)
    assert torch.equal(with_gradient, without) and torch.equal(without, bare)
    assert with_gradient.requires_grad and not without.requires_grad and not bare.requires_grad
    check_same(fast, fused)


def test_inference_mode_changes_no_bit(traced):
    unet = small().unet.eval()
    make_fast(unet, "compiled")
    args, _ = inputs(unet)
    with torch.no_grad():
        without = unet(*args).sample
    with torch.inference_mode():
        assert torch.equal(unet(*args).sample, without)


@torch.no_grad()
def unsettle(models: Models) -> None:
    """New weights, those too that begin at zero."""
    for i, p in enumerate(models.parameters()):
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.device))
    models.weights.refresh()


# SDXL without an adapter is held to the fused gradients above, SD1.5 with one in the next test but one; bf16 without an
# adapter is test_fast_unet.py's
SHORT = {(small, 0, "fp32"), (small_xl, 2, "bf16")}


@pytest.mark.parametrize(
    ("pipeline", "lora", "precision"),
    [
        pytest.param(*how, id=f"{how[0].__name__}-{how[1]}-{how[2]}", marks=[pytest.mark.slow] * (how not in SHORT))
        for how in product((small, small_xl), (0, 2), ("fp32", "bf16"))
    ],
)
def test_step_zero_is_exact(traced, items, pipeline, lora, precision):
    """One set of graphs, and logits that are exactly 0; the policy's gradient is the fused one's."""
    gradients = []
    for how in ("fused", "compiled"):
        config = ModelsConfig(base="x", fast=how, precision=precision, lora=replace(LORA, rank=lora))
        models = Models(pipeline(), torch.device("cpu"), config)
        step_batch = make_step_batch(items, models, STEP_CONFIG, models.encode_empty())
        _, logits = train_step(step_batch, models, STEP_CONFIG, len(items), 1e9)
        assert not logits.any()
        gradients.append(torch.cat([g.flatten() for g in models.weights.gradients]))
        if how == "compiled":
            graphs = len(traced)
            unsettle(models)
            _, logits = train_step(step_batch, models, STEP_CONFIG, len(items), 1e9)
            assert logits.all() and len(traced) == graphs
    assert distance(gradients[1], gradients[0]) < {"fp32": 20 * ROUNDED, "bf16": 0.1}[precision]


def test_pictures_are_drawn_on_the_same_graphs(traced, items):
    """Drawing in the middle of a run, or at its end, compiles nothing."""
    models = world(small, fast="compiled")
    step_batch = make_step_batch(items, models, STEP_CONFIG, models.encode_empty())
    train_step(step_batch, models, STEP_CONFIG, len(items), 1e9)
    graphs = len(traced)
    with drawing_with(models.pipeline, models.policy):
        pictures = draw(models.pipeline, ["a", "b", "c"], [(1,), (2,), (3,)], steps=2, guidance=3.0, batch=2)
    assert len(pictures) == 3 and len(traced) == graphs > 0


def test_the_reference_of_an_adapter_is_the_base(traced, items):
    """Its adapter adds zeros, and is back afterwards."""
    args = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    answers = []
    for how in ("off", "compiled"):
        models = world(small, fast=how, lora=LORA)
        more = {"encoder_hidden_states": models.encode_prompts(["a", "b"]).hidden}
        with torch.no_grad():
            unsettle(models)
            before, graphs = models.predict("policy", *args, more), len(traced)
            answers.append(models.predict("reference", *args, more))
            assert len(traced) == graphs
            assert torch.equal(models.predict("policy", *args, more), before)
        assert distance(answers[-1], before) > 1e-3
    assert distance(answers[1], answers[0]) < ROUNDED


@pytest.mark.parametrize("kind", KINDS, scope="module")
def test_weights_are_inputs(traced, kind):
    fused, fast = pair(kind)
    check_same(fast, fused)
    graphs = len(traced)
    for unet in (fused, fast):
        with torch.no_grad():
            for i, p in enumerate(unet.parameters()):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    check_same(fast, fused)
    assert len(traced) == graphs > 0


@pytest.mark.parametrize("kind", ["xl"], scope="module")
def test_one_block_at_a_time_is_kept(traced, kind, monkeypatch):
    """Without gradient the tensors kept for a backward pass are freed block by block; no answer has a history."""

    class Kept:
        def __init__(self, x):
            self.x = x.detach()  # with its history the two would keep each other alive

    alive, most = weakref.WeakSet(), 0

    def pack(x):
        nonlocal most
        kept = Kept(x)
        alive.add(kept)
        most = max(most, len(alive))
        return kept

    unet = make(kind)
    make_fast(unet, "compiled")
    args, more = inputs(unet)
    with torch.no_grad():
        unet(*args, **more)  # compiles
    counts = []
    for enabled in (True, False):
        most = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.x), torch.set_grad_enabled(enabled):
            out = unet(*args, **more).sample
        counts.append(most)
        del out
        assert not alive
    assert counts[1] < counts[0] / 4
    graph_of, histories = compiled_blocks.graph_of, []

    def watched(function):
        def run(block, *given, **named):
            if function is fast_unet._block:  # what it gets is the answer of another block
                histories.append(given[0].grad_fn)
            return graph_of(function)(block, *given, **named)

        return run

    monkeypatch.setattr(compiled_blocks, "graph_of", watched)
    with torch.no_grad():
        unet(*args, **more)
    assert len(histories) > 5 and not any(histories)


@pytest.mark.parametrize("kind", ["sd"], scope="module")
def test_with_gradient_checkpointing(traced, kind):
    fused, fast = pair(kind)
    check_same(fast, fused)
    graphs = len(traced)
    fast.enable_gradient_checkpointing()
    check_same(fast, fused)
    args, more = inputs(fast)
    with torch.no_grad():
        without = fast(*args, **more).sample
    assert torch.equal(fast(*args, **more).sample, without) and len(traced) == graphs > 0


def test_a_block_never_runs_uncompiled(traced, monkeypatch):
    """What the compiler cannot take whole is an error, and so are more graphs than there may be."""
    unet = make("sd")
    make_fast(unet, "compiled")
    args, _ = inputs(unet, size=4)  # that no other test has
    monkeypatch.setattr(compiled_blocks, "MOST_GRAPHS", 1)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        unet(*args)
    monkeypatch.setattr(compiled_blocks, "MOST_GRAPHS", 128)
    monkeypatch.setattr(fast_unet, "_pointwise", lambda layer, tokens: torch._dynamo.graph_break() or layer(tokens))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        unet(*args)


def test_what_has_no_block_stays_plain(traced):
    """A ResNet block of another kind is diffusers' own, uncompiled, as with fused."""
    unet = make("sd")
    odd = next(m for m in unet.modules() if isinstance(m, ResnetBlock2D))
    odd.output_scale_factor = 2.0
    make_fast(unet, "compiled")
    assert "forward" not in odd.__dict__
    unet(*inputs(unet)[0])


@pytest.mark.parametrize("pipeline", [small, pytest.param(small_xl, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lora", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_fp8(traced, items, pipeline, lora):
    """The inversion has graphs of its own then; the loss's predictions stay on theirs."""
    how = {"lora": replace(LORA, rank=lora)} if lora else {}
    fused, fast = world(pipeline, fast="fused", **how), world(pipeline, fast="compiled", **how)
    narrow = inverted(fast, items, fp8=True)
    assert len(traced) == fast_unet.compiled_blocks(fast.policy)  # one for all transformers' blocks of a shape
    assert distance(narrow, inverted(fused, items, fp8=True)) < 0.03
    assert distance(inverted(fast, items), inverted(fused, items)) < ROUNDED < distance(narrow, inverted(fused, items))
    move(fast, 3), move(fused, 3)
    assert distance(inverted(fast, items, fp8=True), inverted(fused, items)) < 0.03


def test_cuda_graphs_are_of_one_size(traced, items):
    """The whole evaluation is one graph, whatever the timesteps; what the loss compares stays on the blocks'."""
    plain, fast = world(small), world(small, fast="compiled", cuda_graphs=True)
    assert distance(inverted(fast, items), inverted(plain, items)) < ROUNDED
    assert len(traced) == 1
    others = [replace(item, position=item.position + 100) for item in items]
    assert distance(inverted(fast, others), inverted(plain, others)) < ROUNDED
    assert len(traced) == 1
    more = {"encoder_hidden_states": fast.encode_prompts(["a", "b"]).hidden}
    for which in ("policy", "reference"):
        traced.clear()
        with torch.no_grad():
            fast.predict(which, torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), more)
        assert len(traced) == fast_unet.compiled_blocks(fast.policy)
    with pytest.raises(UserError, match=r"models.cuda_graphs=true needs models.fast=compiled"):
        check(RunConfig(models=ModelsConfig(base="x", fast="fused", cuda_graphs=True)))


@pytest.fixture
def kernels(interpreted, monkeypatch):
    """The compiler goes as far as Inductor's door: forward and backward graphs as they would be given to it, with the
    kernels' own operators in them."""
    plain = torch.compile
    how = {"backend": "aot_eager_decomp_partition", "fullgraph": True, "dynamic": False}
    monkeypatch.setattr(torch, "compile", lambda f, **_: plain(f, **how))
    compiled_blocks.graph_of.cache_clear()
    yield
    compiled_blocks.graph_of.cache_clear()


def test_on_the_kernels(kernels):
    """Of one level: each of our operators, forward and backward, and no graph of another size of the same."""
    plain, fast = make("one level"), make("one level")
    make_fast(fast, "compiled")
    before = counters["stats"]["unique_graphs"]
    check_same(fast, plain, batch=2)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs - before == 5  # two ResNet blocks; a transformer's block, what comes before and after
    args, more = inputs(fast, 3)
    with torch.no_grad():
        assert distance(fast(*args, **more).sample, plain(*args, **more).sample) < ROUNDED
    assert counters["stats"]["unique_graphs"] == graphs  # no operator's shape function pins the batch


@pytest.mark.gpu
def test_step_zero_on_a_gpu(items):
    """Inductor around the kernels, bf16: logits of exactly 0, graphs for every batch, and the fused step's gradient."""
    compiled_blocks.graph_of.cache_clear()
    before, zero, gradients = counters["stats"]["unique_graphs"], {}, {}
    for how in ("off", "fused", "compiled"):
        config = ModelsConfig(base="x", fast=how, precision="bf16")
        models = Models(tiny_pipeline(), torch.device("cuda"), config)
        step_batch = make_step_batch(items, models, STEP_CONFIG, models.encode_empty())
        _, logits = train_step(step_batch, models, STEP_CONFIG, len(items), 1e9)
        zero[how] = not logits.any()
        gradients[how] = torch.cat([g.flatten() for g in models.weights.gradients])
    graphs = counters["stats"]["unique_graphs"] - before
    unsettle(models)
    _, logits = train_step(step_batch, models, STEP_CONFIG, len(items), 1e9)
    assert zero == {"off": True, "fused": True, "compiled": True}
    assert logits.all() and counters["stats"]["unique_graphs"] - before == graphs > 5
    assert distance(gradients["compiled"], gradients["fused"]) < 0.1


def test_how_many_blocks_it_says(traced):
    """Before the first step: the kinds of blocks; another size of image makes more graphs."""
    fused, fast = pair("sd")
    assert fast_unet.compiled_blocks(fused) == 0
    fast(*inputs(fast)[0])
    assert fast_unet.compiled_blocks(fast) <= len(traced) <= 2 * fast_unet.compiled_blocks(fast)
