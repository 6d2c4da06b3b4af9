"""The step benchmark against its own rules: gradients are compared, what is off is never hidden, nothing is lost."""

import argparse
import json
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from plans import counted_once
from tiny_world import one_level, save_pairs, tiny_pipeline, tiny_xl

from bench import report
from bench.kernels import attention
from bench.step import contenders, predictions, train_step
from bench.step.naive import lockstep_step, naive_step
from inpo_fast.config import RunConfig
from inpo_fast.cost.profiling import WORK
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.memory import TooLarge

STEPS = contenders.STEPS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    one_level(tiny_pipeline()).save_pretrained(folder / "model")
    return str(folder / "model"), save_pairs(folder / "pairs.parquet")


@pytest.fixture
def command(world, monkeypatch):
    """bench.step, with an inversion of three steps."""
    for module in (contenders, train_step):
        monkeypatch.setattr(module, "STEPS", 3)
    model, pairs = world
    fixed = ["--model", model, "--source", pairs, "--pairs", "4", "--micro-batch", "2", "--threads", "1"]

    def command(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bench.step", *fixed, *more])
        train_step.main()

    return command


@pytest.mark.filterwarnings("error:grad and param do not obey")  # all lie alike: no contender is slowed by another's
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_it_prints_rates_and_ratios_and_keeps_them(command, capsys, tmp_path, precision):
    command(
        "--contenders=naive,lockstep,plain,fused", "--lockstep-batch=3", "--repeats=2",
        f"--precision={precision}", "--results", str(tmp_path / "results"),
    )  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("gradient of") == 3 and out.count("pairs/s") == 2 * 4 and out.count("x naive") == 2 * 3
    assert "encode" in out and "backward" in out and "OFF" not in out
    lines = recorded(tmp_path / "results")
    assert [x["provider"] for x in lines] == 2 * ["naive", "lockstep", "plain", "fused"]  # one line a turn
    assert [x["repeats"] for x in lines] == [1] * 4 + [2] * 4 and {x["pairs"] for x in lines} == {4}
    assert lines[-1]["pairs_s_range"][0] <= lines[-1]["pairs_s"] <= lines[-1]["pairs_s_range"][1]
    errors = [x["gradient_error"] for x in lines]
    assert errors[0] is None and all(0 < e < lines[0]["gradient_allowed"] for e in errors[1:4])
    assert all(lines[-1]["setup_seconds"][name] > 0 for name in ("weights", "build", "first_call"))
    assert lines[-1]["ms_per_pair"].keys() == set(predictions.COUNTED) and lines[-1]["evaluations"] > 1
    table = report.steps_table(lines)
    assert table.count("\n") == 5 and f"**{lines[-1]['ratio']:.2f}x**" in table


def test_evaluations_are_the_mean_of_those_done(command, monkeypatch, tmp_path):
    """What a prediction of the inversion is scaled by. With all steps, as it is measured."""
    for module in (contenders, train_step):
        monkeypatch.setattr(module, "STEPS", STEPS)
    done, plain = [], contenders.train_step

    def counted(*args, **more):
        metrics, logits = plain(*args, **more)
        done.append(metrics.values()["unet_evaluations"])
        return metrics, logits

    monkeypatch.setattr(contenders, "train_step", counted)
    command("--contenders=plain", "--repeats=1", "--results", str(tmp_path / "results"))
    images = 2 * 4
    (line,) = recorded(tmp_path / "results")
    assert (
        line["evaluations"] == (done[-1] - 2 * images) / images
    )  # beside the reference's and the policy's forward pass


def recorded(folder) -> list[dict]:
    return [json.loads(x) for path in sorted(folder.iterdir()) for x in path.read_text().splitlines()]


def test_a_wrong_gradient_is_recorded_and_marked_and_fails(command, capsys, monkeypatch, tmp_path):
    half = lambda items, models, **how: naive_step(items[: len(items) // 2], models, **how)  # noqa: E731
    monkeypatch.setattr(contenders, "naive_step", half)
    with pytest.raises(SystemExit) as ended:
        command("--repeats=1", "--contenders=plain,naive", "--results", str(tmp_path / "results"))
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert (
        out.count("OFF\n") == 1
        and out.count("GRADIENT OFF: not a result") == 1
        and out.splitlines()[-1].startswith("gradient off: naive ")
    )
    plain, naive = recorded(tmp_path / "results")
    assert naive["gradient_error"] > naive["gradient_allowed"] and naive["pairs_s"] > 0
    table = report.steps_table([plain, naive]).splitlines()
    assert "gradient off" in table[2] and "not valid" in table[2] and "gradient off" not in table[3]


def test_what_is_not_a_number_is_off(command, monkeypatch, tmp_path):
    monkeypatch.setattr(train_step, "distance", lambda got, wanted: float("nan"))
    with pytest.raises(SystemExit):
        command("--repeats=1", "--results", str(tmp_path / "results"))
    assert all(report.is_off(x) for x in recorded(tmp_path / "results")[1:])


def test_a_result_is_kept_before_the_next_contender_is_built(command, monkeypatch, tmp_path):
    build = contenders.build

    def fails(name, *more):
        if name == "lockstep":
            raise RuntimeError("does not compile")
        return build(name, *more)

    monkeypatch.setattr(train_step, "build", fails)
    with pytest.raises(RuntimeError, match="does not compile"):
        command("--contenders=plain,naive,lockstep", "--results", str(tmp_path / "results"))
    assert [x["provider"] for x in recorded(tmp_path / "results")] == ["plain", "naive"]


@pytest.mark.parametrize("fits", [2, 0])
def test_out_of_memory_is_recorded_and_halves(command, monkeypatch, tmp_path, capsys, fits):
    """Beyond `fits` pairs a micro-batch, as on a card that is too small; the plain step is the first contender."""
    real = contenders.train_step

    def small_card(step_batch, models, recipe, *more, **how):
        if recipe.micro_batch > fits:
            raise TooLarge("train.micro_batch", recipe.micro_batch)
        return real(step_batch, models, recipe, *more, **how)

    monkeypatch.setattr(contenders, "train_step", small_card)
    words = ("--contenders=plain,naive", "--micro-batch=4", "--repeats=2", "--results", str(tmp_path / "results"))
    if fits:
        command(*words)
        first, *_, last = recorded(tmp_path / "results")
        assert first["provider"] == "plain" and first["micro_batch"] == 2 and first["pairs_s"] > 0
        assert first["too_large"] == ["micro_batch 4"] and last["provider"] == "naive" and last["ratio"] > 0
    else:
        with pytest.raises(SystemExit) as ended:
            command(*words)
        lines = recorded(tmp_path / "results")
        assert ended.value.code == 1 and [x["provider"] for x in lines] == ["plain", "naive", "naive"]
        assert lines[0]["out_of_memory"] and lines[0]["too_large"] == [f"micro_batch {n}" for n in (4, 2, 1)]
        assert lines[1]["against"] == "naive" and lines[1]["gradient_error"] is None
        assert "**out of memory**" in report.steps_table(lines)
        assert "plain: out of memory at micro_batch 1: given up" in capsys.readouterr().out


def test_the_vae_has_a_size_of_its_own(command, monkeypatch, tmp_path):
    real = contenders.make_step_batch

    def small_card(items, models, recipe, empty):
        if recipe.vae_batch > 2:
            raise TooLarge("data.vae_batch", recipe.vae_batch)
        return real(items, models, recipe, empty)

    monkeypatch.setattr(contenders, "make_step_batch", small_card)
    command("--contenders=plain", "--repeats=1", "--results", str(tmp_path / "results"))
    (line,) = recorded(tmp_path / "results")
    assert line["too_large"] == ["vae_batch 8", "vae_batch 4"] and line["vae_batch"] == line["micro_batch"] == 2


def test_turns_of_other_sizes_are_not_mixed(command, monkeypatch, tmp_path):
    """Memory that runs out in the second turn: its rates are of the smaller size alone."""
    real, calls = contenders.train_step, []

    def fuller(step_batch, models, recipe, *more, **how):
        calls.append(recipe.micro_batch)
        if len(calls) == 3:
            raise TooLarge("inversion.batch", recipe.inversion.batch)
        return real(step_batch, models, recipe, *more, **how)

    monkeypatch.setattr(contenders, "train_step", fuller)
    command("--contenders=plain", "--inversion-batch=8", "--repeats=3", "--results", str(tmp_path / "results"))
    lines = [(x["repeats"], x["inversion_batch"], x["too_large"]) for x in recorded(tmp_path / "results")]
    assert lines == [(1, 8, []), (1, 4, ["inversion_batch 8"]), (2, 4, ["inversion_batch 8"])]


@pytest.mark.parametrize(
    ("model", "names", "memory", "micro_batch"),
    [
        ("sd15", ["plain", "fused"], 79.2, 16),
        ("sd15", ["plain", "fused"], 46, 16),
        ("sd15", ["plain", "naive"], 46, 16),
        ("sd15", ["fused", "naive"], 46, 8),
        ("sdxl", ["fused"], 79.2, 2),
        pytest.param("sdxl", ["naive", "plain"], 79.2, 2, marks=pytest.mark.slow),
        pytest.param("sdxl", ["naive", "plain"], 139.8, 4, marks=pytest.mark.slow),
    ],
)
def test_sizes_from_the_cards_memory(monkeypatch, capsys, model, names, memory, micro_batch):
    monkeypatch.setattr(train_step, "make_plan", counted_once)
    sizes = {"micro_batch": 16 if model == "sd15" else 4, "inversion_batch": 60 if model == "sd15" else 16}
    asked = argparse.Namespace(model=model, precision="bf16", resolution=None, **sizes)
    train_step.fit(asked, names, memory)
    assert (asked.micro_batch, asked.inversion_batch) == (micro_batch, sizes["inversion_batch"])
    assert ("instead of" in capsys.readouterr().out) == (micro_batch != sizes["micro_batch"])


def test_what_the_predictions_count():
    """TFLOP and GB of step/predictions.py are those of inpo_fast/cost/step_cost.py for the benchmark's settings."""
    how = InversionConfig(steps=10, grid="diffusers-0.22", evaluate_at="target", guidance=1.0, batch=60)
    config = RunConfig(models=ModelsConfig(random="sd15", precision="bf16"), inversion=how)
    work = counted_once(replace(config, train=replace(config.train, micro_batch=predictions.MICRO_BATCH)), 1).work
    assert work.evaluations == pytest.approx(predictions.EVALUATIONS)
    for phase, (flop, moved) in predictions.COUNTED.items():
        assert sum(work.flop[line] for line in WORK[phase]) / 1e12 == pytest.approx(flop, rel=1e-4)
        assert sum(work.fused_bytes[line] for line in WORK[phase]) / 1e9 == pytest.approx(moved, rel=1e-4)


def test_the_policy_is_moved_by_the_same_numbers_as_ever():
    """On the CPU, bit for bit: earlier results stay comparable."""
    got, want = (Models(tiny_pipeline(), torch.device("cpu"), ModelsConfig(base="x", precision="bf16")) for _ in "ab")
    contenders.move_policy(got)
    with torch.no_grad():
        for i, p in enumerate(want.parameters()):
            p.add_(0.01 * p.std().nan_to_num() * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    assert all(torch.equal(x, y) for x, y in zip(got.parameters(), want.parameters(), strict=True))
    assert all(torch.equal(w, p.bfloat16()) for w, p in zip(got.policy.parameters(), got.parameters(), strict=True))


def test_the_distance_of_gradients():
    got, wanted = [torch.tensor([3.0, 0.0]), torch.tensor([[4.5]])], [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert train_step.distance(got, wanted) == pytest.approx(0.5 / 5)
    assert train_step.distance(got, [w.bfloat16() for w in wanted]) == pytest.approx(0.5 / 5)


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
def test_lockstep_is_the_naive_loop(tmp_path, pipeline):
    """Whatever the batch; fp32, ten chained evaluations, sums in another order."""
    models = Models(one_level(pipeline()), torch.device("cpu"), ModelsConfig(base="x"))
    contenders.move_policy(models)
    source = open_source(save_pairs(tmp_path / "pairs.parquet"))
    items = next(PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 5))
    how = {"beta": 500.0, "inversion_steps": 10, "seed": 0}

    def gradient(step, **more) -> torch.Tensor:
        models.weights.zero()
        step(items, models, **how, **more)
        return torch.cat([g.reshape(-1) for g in models.weights.gradients])

    wanted = gradient(naive_step)
    for batch in (2, 5):
        assert (gradient(lockstep_step, batch=batch) - wanted).norm() < 1e-3 * wanted.norm()


def test_the_naive_loop_keeps_sums_in_its_own_layout(tmp_path):
    """Where the others' lie in channels_last: handed over whole at each step, and nothing of the step before."""
    pipeline = tiny_pipeline()
    pipeline.unet.to(memory_format=torch.channels_last)
    models = Models(pipeline, torch.device("cpu"), ModelsConfig(base="x"))
    contenders.move_policy(models)
    source = open_source(save_pairs(tmp_path / "pairs.parquet"))
    items = next(PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 2))
    naive = contenders.build("naive", models, items, argparse.Namespace(precision="fp32"))
    found = []
    for _ in range(2):
        models.weights.zero()
        naive.step(items)
        found.append([g.clone() for g in models.weights.gradients])
    assert sum(g.norm() for g in found[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_twin_has_the_same_parameters():
    """Not copies: what one writes the other computes with, and gradients meet in one place."""
    models = Models(tiny_pipeline(), torch.device("cpu"), ModelsConfig(base="x", precision="bf16"))
    other = contenders.twin(models.policy)
    assert all(a is b for a, b in zip(other.parameters(), models.policy.parameters(), strict=True))
    naive = contenders.naive_models(models)
    for p, master in zip(naive.policy.parameters(), models.weights.masters, strict=True):
        assert p.grad is master.grad and torch.equal(p, master) and p is not master


def test_what_counts_as_a_wait(monkeypatch):
    """Not the warning that torch gives when it is asked to watch."""
    first = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: warnings.warn(first, stacklevel=1))
    with train_step._waits(True) as waits:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert len(waits) == 1


def test_attention_where_a_shape_fails(monkeypatch, capsys):
    """Torch's own choice too may be refused by a card: what was measured is said all the same."""

    def measure(backend, images, heads, size, queries, keys, device):
        if queries > keys:
            raise RuntimeError("no kernel for this shape")
        return {"forward_ms": 1.0, "both_ms": 2.0, "error": 0.0}

    monkeypatch.setattr(attention, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["bench.kernels.attention", "--tiny"])
    assert attention.main() == 0
    assert "no kernel for this shape" in (said := capsys.readouterr().out) and "FASTEST = {}" in said


@pytest.mark.parametrize("words", ["--pairs=0", "--micro-batch=0", "--repeats=0", "--contenders=plain,plain"])
def test_sizes_that_mean_nothing_are_refused(command, words):
    with pytest.raises(UserError, match=words.partition("=")[0]):
        command(words)
