"""Every optimizer in every precision, and both with each model, full and LoRA: starts at ln 2, moves, and resumes
exactly."""

import copy
import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from tiny_world import one_level, save_pairs, tiny_pipeline, tiny_xl

from inpo_fast.config.run import OptimConfig
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import DTYPES, Models
from inpo_fast.runtime.memory import TooLarge
from inpo_fast.training import checkpoint, saved_checkpoint
from inpo_fast.training.optim import Average, LossScale, make_optimizer
from inpo_fast.training.saved_checkpoint import State
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

STEP_CONFIG = StepConfig(
    method="inpo",
    objective=ObjectiveConfig(beta=50.0),
    inversion=InversionConfig(steps=2),
    micro_batch=4,
    vae_sample=True,
    seed=0,
)
FULL, LORA = 0, 4
# an optimizer is given lists of tensors and knows no model: each in each precision, with adapters as often as without
MODES = [
    ("sd", FULL, "adamw", "fp32"),
    ("sd", LORA, "adamw", "bf16"),
    ("sd", FULL, "adamw", "fp16"),
    ("sd", LORA, "adamw-bf16", "fp32"),
    ("sd", FULL, "adamw-bf16", "bf16"),
    ("sd", FULL, "adamw-8bit", "fp32"),
    ("sd", LORA, "adamw-8bit", "bf16"),
    ("sd", LORA, "adafactor", "fp32"),
    ("sd", FULL, "adafactor", "bf16"),
    ("xl, one level", LORA, "adamw", "fp32"),
    ("xl, one level", FULL, "adamw-bf16", "bf16"),
    ("xl, one level", LORA, "adamw", "fp16"),
]
PAIRS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    one_level(tiny_pipeline()).save_pretrained(folder / "sd")
    tiny_xl().save_pretrained(folder / "xl")
    one_level(tiny_xl()).save_pretrained(folder / "xl, one level")
    source = open_source(save_pairs(folder / "pairs.parquet"))
    loader = PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1)
    return folder, list(loader.steps(0, 3, PAIRS))


@lru_cache
def opened(config: ModelsConfig):
    """With its own UNet: nothing else of a pipeline is trained."""
    pipeline = open_pipeline(config)
    return pipeline, pipeline.unet


class Training:
    """A model and its optimizer; step(k) is the same function of k in every process."""

    def __init__(self, folder, items, base: str, rank: int, kind: str, precision: str):
        config = ModelsConfig(base=str(folder / base), precision=precision, lora=LoraSettings(rank))
        pipeline, unet = opened(config)
        pipeline.unet = copy.deepcopy(unet)
        torch.manual_seed(0)
        self.models, self.items = Models(pipeline, torch.device("cpu"), config), items
        optim = OptimConfig(kind=kind, lr=1e-4, average="ema")
        self.optimizer = make_optimizer(self.models.parameters(), optim, seed=3)
        self.average = Average(self.models.parameters(), optim, 3)
        self.scale = 64.0 if precision == "fp16" else 1.0

    def step(self, number: int):
        step_batch = make_step_batch(self.items[number], self.models, STEP_CONFIG, self.models.encode_empty())
        metrics, logits = train_step(step_batch, self.models, STEP_CONFIG, PAIRS, 1.0, self.scale)
        self.optimizer.step()
        self.models.weights.refresh()
        self.average.update(number)
        return metrics.values(), logits

    def everything(self) -> list[torch.Tensor]:
        return [*self.models.weights.masters, *self.models.weights.working, *self.average.mean]


@pytest.mark.parametrize(("base", "rank", "kind", "precision"), MODES)
def test_trains_and_resumes(world, tmp_path, base, rank, kind, precision):
    mode = (*world, base, rank, kind, precision)
    whole = Training(*mode)
    begin = [master.clone() for master in whole.models.weights.masters]
    base_weights = {n: p.clone() for n, p in whole.models.reference.named_parameters() if "lora" not in n}
    values, logits = whole.step(0)
    # fp16 on a CPU: matrix products round by how their operands lie in memory, one of beta / 2 times 1e-3
    assert logits.abs().max() <= (0.03 if precision == "fp16" else 0.0), logits
    assert values["loss"] == pytest.approx(math.log(2), abs=1e-6 if precision != "fp16" else 1e-2)
    assert math.isfinite(values["grad_norm"]) and values["grad_norm"] > 0
    moved = [not torch.equal(a, b) for a, b in zip(begin, whole.models.weights.masters, strict=True)]
    assert sum(moved) > (0.9 if rank == 0 else 0.4) * len(moved)  # LoRA: at first only B has a gradient
    assert all(w.dtype == DTYPES[precision] for w in whole.models.weights.working)

    everything = (whole.models.weights, whole.optimizer, whole.average)
    folder = checkpoint.Checkpoints(tmp_path, keep=1).save(State(1, 0.0, []), *everything, wait=True)
    other = Training(*mode)
    other.step(2)  # other weights and moments: all must be replaced
    saved_checkpoint.load(folder, other.models.weights, other.optimizer, other.average)
    for training in (whole, other):
        assert math.isfinite(training.step(1)[0]["loss"])
    for one, two in zip(whole.everything(), other.everything(), strict=True):
        assert torch.equal(one, two)
    for name, p in whole.models.reference.named_parameters():
        assert "lora" in name or torch.equal(p, base_weights[name]), name  # the reference never moves


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base", ["sd", "xl"])
def test_the_reference_of_lora_is_the_untouched_base(world, base, precision):
    """Bit for bit, before and after the adapter has been trained; the policy with its adapter differs then."""
    training = Training(*world, base, 4, "adamw", precision)
    models = training.models
    untouched = open_pipeline(models.config).unet.eval()
    step_batch = make_step_batch(world[1][0], models, STEP_CONFIG, models.encode_empty())
    x, t = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 700, 999])
    arguments = step_batch.conditional.arguments(torch.arange(4))

    def same(who: str) -> bool:
        with torch.no_grad():
            want = untouched(x.to(models.dtype), t, **arguments).sample
            return torch.equal(models.predict(who, x, t, arguments), want)

    assert same("reference") and same("policy")
    training.step(0)
    training.step(1)
    assert same("reference") and not same("policy")
    assert all(p.requires_grad for n, p in models.policy.named_parameters() if "lora" in n)


def test_bf16_keeps_what_bf16_would_lose(world):
    """Updates far below a bf16 weight's last place add up in the masters, and reach the working copies rounded."""
    training = Training(*world, "sd", 0, "adamw", "bf16")
    weights = training.models.weights
    before = [m.clone() for m in weights.masters]
    for group in training.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-6, 0.0
    training.step(0)
    for old, new, working in zip(before, weights.masters, weights.working, strict=True):
        assert (new - old).abs().max() <= 1.1e-6
        assert torch.equal(working, new.to(torch.bfloat16))
    large = [(o.abs() > 0.1) & (n != o) for o, n in zip(before, weights.masters, strict=True)]
    assert sum(int(x.sum()) for x in large) > 100  # in bf16 these would have stood still


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_gradients_are_the_wide_ones(world, precision):
    """The summed fp32 gradient of a narrow model against fp32's own, relative in norm: bf16 has 8 bits, fp16 11."""

    def gradient(precision: str, micro_batch: int = 2) -> torch.Tensor:
        training = Training(*world, "sd", 0, "adamw", precision)
        step_batch = make_step_batch(world[1][0], training.models, STEP_CONFIG, training.models.encode_empty())
        step_config = replace(STEP_CONFIG, micro_batch=micro_batch)
        train_step(step_batch, training.models, step_config, PAIRS, math.inf, training.scale)
        assert all(g.dtype == torch.float32 for g in training.models.weights.gradients)
        return torch.cat([g.flatten() for g in training.models.weights.gradients])

    want, got = gradient("fp32"), gradient(precision)
    assert (got - want).norm() / want.norm() < {"bf16": 0.1, "fp16": 0.02}[precision]
    again = gradient(precision, micro_batch=1)  # summed in fp32: the number of micro-batches adds no error of its own
    assert (got - again).norm() / want.norm() < {"bf16": 0.05, "fp16": 0.01}[precision]


def test_loss_scale():
    scale = LossScale(value=8.0, patience=3)
    history = []
    for finite in (True, True, False, True, True, True, True):
        scale.update(finite)
        history.append((scale.value, scale.good))
    assert history == [(8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1)]


@pytest.mark.parametrize("phase", ["inversion.batch", "train.micro_batch"])
def test_out_of_memory_names_what_to_lower_and_repeats_exactly(world, phase, monkeypatch):
    """A UNet that refuses large batches, as a full GPU does: the repeated step gives the same gradient."""
    limit = 3  # images
    training = Training(*world, "sd", 0, "adamw", "fp32")
    models, step_batch = (
        training.models,
        make_step_batch(world[1][0], training.models, STEP_CONFIG, training.models.encode_empty()),
    )
    step_config = replace(STEP_CONFIG, micro_batch=4, inversion=replace(STEP_CONFIG.inversion, batch=8))
    train_step(step_batch, models, step_config, PAIRS, 1.0)
    want = [g.clone() for g in models.weights.gradients]

    forward = models.policy.forward

    def crowded(x, *args, **kwargs):
        if len(x) > limit and torch.is_grad_enabled() == (phase == "train.micro_batch"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(models.policy, "forward", crowded)
    tried = []
    while True:
        try:
            train_step(step_batch, models, step_config, PAIRS, 1.0)
            break
        except TooLarge as problem:
            assert problem.key == phase
            tried.append(problem.size)
            if phase == "train.micro_batch":
                step_config = replace(step_config, micro_batch=problem.size // 2)
            else:
                step_config = replace(step_config, inversion=replace(step_config.inversion, batch=problem.size // 2))
    assert tried == {"train.micro_batch": [4, 2], "inversion.batch": [8, 4]}[phase]
    for got, wanted in zip(models.weights.gradients, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
