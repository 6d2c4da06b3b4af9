"""models.fast=compiled: one graph a kind of block, for policy, reference and inversion. Tracing alone, without the C++
compiler, but where Inductor is named."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from inpo_kernels.geglu import _geglu
from inpo_kernels.group_norm_silu import _group_norm_silu
from inpo_kernels.layer_norm import _layer_norm
from test_fast_inversion import RECIPE, ROUNDED, distance, inverted, move, world
from test_fast_unet import check_same, inputs, make
from tiny_world import save_pairs, tiny_pipeline, tiny_unet, tiny_xl
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from inpo_fast import compiled, fast_unet
from inpo_fast.architectures import make_unet
from inpo_fast.config import RunConfig
from inpo_fast.config_rules import check
from inpo_fast.data.sources import open_source
from inpo_fast.data.windows import DataConfig, Windows
from inpo_fast.fast_unet import inverting, make_fast
from inpo_fast.loading import open_pipeline
from inpo_fast.models import LoraSettings, Models, ModelsConfig
from inpo_fast.pocket import ASSETS
from inpo_fast.refusal import Refusal
from inpo_fast.sample import draw, drawing_with
from inpo_fast.step import noise_window, train_step
from inpo_fast.window import make_window

KINDS = ("sd", "xl")
LORA = LoraSettings(rank=2, targets=("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj"))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    source = open_source(save_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet"))
    return next(Windows(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 5))


def pair(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A fused and a compiled UNet of the same weights."""
    unets = make(kind), make(kind)
    for unet, how in zip(unets, ("fused", "compiled"), strict=True):
        make_fast(unet, how)
    return unets


def kinds_of_blocks(unet, monkeypatch) -> list[tuple]:
    """What a graph is made for, of each in order: the function, the shapes of the block's own weights, and those that
    reach it, whatever the batch."""
    seen, graph_of = {}, compiled.graph_of

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
        patch.setattr(compiled, "graph_of", watched)
        unet(*args, **more)
    return list(seen)


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
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
    with torch.inference_mode():
        assert torch.equal(fast(*args, **more).sample, without)
    check_same(fast, fused)


@torch.no_grad()
def unsettle(models: Models) -> None:
    """New weights, those too that begin at zero."""
    for i, p in enumerate(models.parameters()):
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.device))
    models.weights.refresh()


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
def test_step_zero_is_exact(traced, items, pipeline, lora, precision):
    """One set of graphs, and logits that are exactly 0; the policy's gradient is the fused one's."""
    gradients = []
    for how in ("fused", "compiled"):
        config = ModelsConfig(base="x", fast=how, precision=precision, lora=replace(LORA, rank=lora))
        models = Models(pipeline(), torch.device("cpu"), config)
        window = make_window(items, models, RECIPE, models.encode_empty())
        _, logits = train_step(window, models, RECIPE, len(items), 1e9)
        assert not logits.any()
        gradients.append(torch.cat([g.flatten() for g in models.weights.gradients]))
        if how == "compiled":
            graphs = len(traced)
            unsettle(models)
            _, logits = train_step(window, models, RECIPE, len(items), 1e9)
            assert logits.all() and len(traced) == graphs
    assert distance(gradients[1], gradients[0]) < {"fp32": 20 * ROUNDED, "bf16": 0.1}[precision]


def test_pictures_are_drawn_on_the_same_graphs(traced, items):
    """Drawing in the middle of a run, or at its end, compiles nothing."""
    models = world(tiny_pipeline, fast="compiled")
    window = make_window(items, models, RECIPE, models.encode_empty())
    train_step(window, models, RECIPE, len(items), 1e9)
    graphs = len(traced)
    with drawing_with(models.pipeline, models.policy):
        pictures = draw(models.pipeline, ["a", "b", "c"], [(1,), (2,), (3,)], steps=2, guidance=3.0, batch=2)
    assert len(pictures) == 3 and len(traced) == graphs > 0


def test_the_reference_of_an_adapter_is_the_base(traced, items):
    """Its adapter adds zeros, and is back afterwards."""
    args = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    answers = []
    for how in ("off", "compiled"):
        models = world(tiny_pipeline, fast=how, lora=LORA)
        more = {"encoder_hidden_states": models.encode_prompts(["a", "b"]).hidden}
        with torch.no_grad():
            unsettle(models)
            before, graphs = models.predict("policy", *args, more), len(traced)
            answers.append(models.predict("reference", *args, more))
            assert len(traced) == graphs
            assert torch.equal(models.predict("policy", *args, more), before)
        assert distance(answers[-1], before) > 1e-3
    assert distance(answers[1], answers[0]) < ROUNDED


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_inputs(traced, kind):
    fused, fast = pair(kind)
    check_same(fast, fused)
    graphs = len(traced)
    for unet in (fused, fast):
        with torch.no_grad():
            for i, p in enumerate(unet.parameters()):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    check_same(fast, fused)
    assert len(traced) == graphs


def test_one_block_at_a_time_is_kept(traced, monkeypatch):
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

    unet = make("xl")
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
    graph_of, histories = compiled.graph_of, []

    def watched(function):
        def run(block, *given, **named):
            if function is fast_unet._block:  # what it gets is the answer of another block
                histories.append(given[0].grad_fn)
            return graph_of(function)(block, *given, **named)

        return run

    monkeypatch.setattr(compiled, "graph_of", watched)
    with torch.no_grad():
        unet(*args, **more)
    assert len(histories) > 5 and not any(histories)


def test_with_gradient_checkpointing(traced):
    fused, fast = pair("sd")
    check_same(fast, fused)
    graphs = len(traced)
    fast.enable_gradient_checkpointing()
    check_same(fast, fused)
    args, more = inputs(fast)
    with torch.no_grad():
        without = fast(*args, **more).sample
    assert torch.equal(fast(*args, **more).sample, without) and len(traced) == graphs


def test_a_block_never_runs_uncompiled(traced, monkeypatch):
    """What the compiler cannot take whole is an error, and so are more graphs than there may be."""
    _, unet = pair("sd")
    args, more = inputs(unet)
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 1)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        unet(*args, **more)
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 128)
    monkeypatch.setattr(fast_unet, "_pointwise", lambda layer, tokens: torch._dynamo.graph_break() or layer(tokens))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        unet(*args, **more)


def test_what_has_no_block_stays_plain(traced):
    """A ResNet block of another kind is diffusers' own, uncompiled, as with fused."""
    unet = tiny_unet()
    odd = next(m for m in unet.modules() if isinstance(m, ResnetBlock2D))
    odd.output_scale_factor = 2.0
    make_fast(unet, "compiled")
    assert "forward" not in odd.__dict__
    unet(*inputs(unet)[0])


@pytest.mark.parametrize("pipeline", [tiny_pipeline, pytest.param(tiny_xl, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lora", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_fp8(traced, items, pipeline, lora):
    """The inversion has graphs of its own then; the loss's predictions stay on theirs."""
    how = {"lora": LoraSettings(rank=lora)} if lora else {}
    fused, fast = world(pipeline, fast="fused", **how), world(pipeline, fast="compiled", **how)
    narrow = inverted(fast, items, fp8=True)
    assert distance(narrow, inverted(fused, items, fp8=True)) < 0.03
    assert distance(inverted(fast, items), inverted(fused, items)) < ROUNDED < distance(narrow, inverted(fused, items))
    move(fast, 3), move(fused, 3)
    assert distance(inverted(fast, items, fp8=True), inverted(fused, items)) < 0.03


def test_cuda_graphs_are_of_one_size(traced, items):
    """The whole evaluation is one graph, whatever the timesteps; what the loss compares stays on the blocks'."""
    plain, fast = world(tiny_pipeline), world(tiny_pipeline, fast="compiled", cuda_graphs=True)
    assert distance(inverted(fast, items), inverted(plain, items)) < ROUNDED
    assert len(traced) == 1
    others = [replace(item, position=item.position + 100) for item in items]
    assert distance(inverted(fast, others), inverted(plain, others)) < ROUNDED
    assert len(traced) == 1
    models = Models(tiny_pipeline(), torch.device("cpu"), replace(fast.config, precision="bf16"))
    window = make_window(items, models, RECIPE, models.encode_empty())
    assert not train_step(window, models, RECIPE, len(items), 1.0)[1].any()
    with pytest.raises(Refusal, match=r"models.cuda_graphs=true needs models.fast=compiled"):
        check(RunConfig(models=ModelsConfig(base="x", fast="fused", cuda_graphs=True)))


@pytest.fixture
def kernels(monkeypatch):
    """The kernels' own operators, in Triton's interpreter, where the CPU would take their references; the compiler
    goes as far as Inductor's door: forward and backward graphs as they would be given to it."""
    if torch.cuda.is_available():
        pytest.skip("beside a GPU the kernels are compiled and take no CPU tensors; -m gpu runs them on CUDA")
    monkeypatch.setattr(fast_unet, "group_norm_silu", lambda *args: _group_norm_silu(*args)[0])
    monkeypatch.setattr(fast_unet, "geglu", _geglu)

    def with_residual(x, weight, bias, eps, residual=None):
        y, u, _, _ = _layer_norm(x, weight, bias, eps, residual)
        return y, x if residual is None else u

    monkeypatch.setattr(fast_unet, "layer_norm", with_residual)
    plain = torch.compile
    how = {"backend": "aot_eager_decomp_partition", "fullgraph": True, "dynamic": False}
    monkeypatch.setattr(torch, "compile", lambda f, **_: plain(f, **how))
    compiled.graph_of.cache_clear()
    torch._dynamo.reset()
    yield
    compiled.graph_of.cache_clear()
    torch._dynamo.reset()


def test_on_the_kernels(kernels):
    plain, fast = make("sd"), make("sd")
    make_fast(fast, "compiled")
    check_same(fast, plain, batch=2)
    graphs = counters["stats"]["unique_graphs"]
    args, more = inputs(fast, 3)
    with torch.no_grad():
        without = fast(*args, **more).sample
    assert torch.equal(fast(*args, **more).sample, without)
    assert counters["stats"]["unique_graphs"] == graphs > 5  # no operator's shape function pins the batch


class Layouts(TorchDispatchMode):
    """The images that convolutions' backward passes get: (shape, is it channels_last)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.seen += [(tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last)) for x in args[:2]]
        return function(*args, **(kwargs or {}))


def gradient_of(function, block, arguments: list, weight: torch.Tensor) -> torch.Tensor:
    block.zero_grad()
    given = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in arguments]
    function(*given).backward(weight)
    return torch.cat([x.grad.double().flatten() for x in (*given, *block.parameters())])


def test_a_block_by_inductor():
    """bf16: the same bits with and without gradient, and a gradient as near to float64's as eager's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=16, groups=8).bfloat16()
    unet = torch.nn.ModuleList([block])
    images = torch.randn(3, 32, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    arguments, weight = [images, torch.randn(3, 16).bfloat16()], torch.randn(3, 64, 8, 8).bfloat16()
    exact = copy.deepcopy(block).double()
    want = gradient_of(exact, exact, [x.double() for x in arguments], weight.double())
    eager = gradient_of(block, block, arguments, weight)
    unet.to(memory_format=torch.channels_last)
    block.fast_mode = fast_unet.Mode()
    forward = compiled.blockwise(fast_unet._resnet)
    with compiled.limits():
        got = gradient_of(lambda *args: forward(block, *args), block, arguments, weight)
        given = [x.detach().requires_grad_() for x in arguments]
        with_gradient = forward(block, *given)
        with Layouts() as layouts:
            with_gradient.backward(weight)
        block.fast_mode.cuts = True
        cut = forward(block, *given)
    assert len(layouts.seen) == 2 * 3 and all(nhwc for _, nhwc in layouts.seen), layouts.seen
    assert torch.equal(cut, with_gradient) and cut.grad_fn is None and cut.requires_grad
    assert distance(got, want) < 1.05 * distance(eager, want)


def evaluation(unet, precision: torch.dtype):
    args, more = inputs(unet, 4)
    args = [x.bfloat16().to(precision) if x.is_floating_point() else x for x in args]
    more = {k: {n: x.bfloat16().to(precision) for n, x in v.items()} for k, v in more.items()}
    unet.zero_grad()
    answer = unet(*args, **more).sample
    weight = torch.randn(answer.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    answer.backward(weight.to(precision))
    gradient = torch.cat([p.grad.double().flatten() for p in unet.parameters()])
    with torch.no_grad():
        return answer.detach(), unet(*args, **more).sample, gradient


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_unet_by_inductor(kind):
    """bf16: no bit differs without gradient; the gradient is as near to float64's as the eager ones are."""
    torch._dynamo.reset()
    values = make(kind).bfloat16()
    exact, plain, fast = copy.deepcopy(values).double(), copy.deepcopy(values), copy.deepcopy(values)
    make_fast(fast, "compiled")
    _, _, want = evaluation(exact, torch.float64)
    _, _, eager = evaluation(plain, torch.bfloat16)
    with_gradient, without, got = evaluation(fast, torch.bfloat16)
    assert torch.equal(with_gradient, without)
    assert distance(got, want) < 1.05 * distance(eager, want)


@pytest.mark.slow
def test_sd15_by_inductor():
    """Its true widths, small latents, bf16, two minutes without the compiler's caches; the yardstick is fp32."""
    torch._dynamo.reset()
    counters.clear()
    unet = make_unet("sd15").eval()
    exact = copy.deepcopy(unet.bfloat16()).float()
    fused, fast = copy.deepcopy(unet), unet
    make_fast(fused, "fused"), make_fast(fast, "compiled")
    images, time, text = (
        torch.randn(2, 4, 16, 16).bfloat16(),
        torch.tensor([100, 700]),
        torch.randn(2, 77, 768).bfloat16(),
    )
    weight = torch.randn(2, 4, 16, 16).bfloat16()

    def gradient(unet, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        unet(images.to(dtype), time, text.to(dtype)).sample.backward(weight.to(dtype))
        return torch.cat([p.grad.flatten().bfloat16() for p in unet.parameters()])

    with torch.no_grad():
        without = fast(images, time, text).sample
    assert torch.equal(fast(images, time, text).sample, without)
    want = gradient(exact, torch.float32)
    assert distance(gradient(fast), want) < 1.05 * distance(gradient(fused), want)
    assert counters["stats"]["unique_graphs"] == 26


@pytest.mark.slow
def test_the_pocket_by_inductor(items):
    """The model that ships, in bf16: logits of exactly 0, then a step as the fused one's."""
    torch._dynamo.reset()
    gradients, spread = [], []
    for how, precision in (("off", "fp32"), ("fused", "bf16"), ("compiled", "bf16")):
        config = ModelsConfig(base=str(ASSETS / "model"), fast=how, precision=precision)
        models = Models(open_pipeline(config), torch.device("cpu"), config)
        window = make_window(items, models, RECIPE, models.encode_empty())
        assert not train_step(window, models, RECIPE, len(items), 1e9)[1].any()
        gradients.append(torch.cat([g.double().flatten() for g in models.weights.gradients]))
        move(models, 1)
        spread.append(noise_window(window, models, RECIPE)[0])
    assert distance(gradients[2], gradients[0]) < 1.05 * distance(gradients[1], gradients[0])
    assert distance(spread[2], spread[0]) < 1.2 * distance(spread[1], spread[0])


@pytest.mark.gpu
def test_step_zero_on_a_gpu(items):
    """Inductor around the kernels, bf16: logits of exactly 0, graphs for every batch, and the fused step's gradient."""
    torch._dynamo.reset()
    before, zero, gradients = counters["stats"]["unique_graphs"], {}, {}
    for how in ("off", "fused", "compiled"):
        config = ModelsConfig(base="x", fast=how, precision="bf16")
        models = Models(tiny_pipeline(), torch.device("cuda"), config)
        window = make_window(items, models, RECIPE, models.encode_empty())
        _, logits = train_step(window, models, RECIPE, len(items), 1e9)
        zero[how] = not logits.any()
        gradients[how] = torch.cat([g.flatten() for g in models.weights.gradients])
    graphs = counters["stats"]["unique_graphs"] - before
    unsettle(models)
    _, logits = train_step(window, models, RECIPE, len(items), 1e9)
    assert zero == {"off": True, "fused": True, "compiled": True}
    assert logits.all() and counters["stats"]["unique_graphs"] - before == graphs > 5
    assert distance(gradients["compiled"], gradients["fused"]) < 0.1


def test_how_many_blocks_it_says(traced):
    """Before the first step: the kinds of blocks; another size of image makes more graphs."""
    fused, fast = pair("sd")
    assert fast_unet.compiled_blocks(fused) == 0
    fast(*inputs(fast)[0])
    assert fast_unet.compiled_blocks(fast) <= len(traced) <= 2 * fast_unet.compiled_blocks(fast)
