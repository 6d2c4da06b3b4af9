"""bench.study: the grid, the split of prompts, results that are made once, the two-level interval against its formula,
and one cell of either kind on the pocket model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import replace

import numpy as np
import pytest
from tiny_runs import ran

from bench import results
from bench.study import plot, reconstruct, table, train
from bench.study.cells import RECIPE, SPLITS, Cell, Study, config_of, grid, result_name, split_prompts
from bench.study.measures import MEASURES
from bench.study.presets import CHEAP, METHODS, PRESETS, methods
from bench.study.run import run, wanted_of, write
from inpo_fast.comparison.prompts import read_prompts
from inpo_fast.config import parse
from inpo_fast.data.loader import PairLoader
from inpo_fast.pocket import ASSETS
from inpo_fast.pocket.scenes import Finish, render, split_scenes
from inpo_fast.runtime.errors import UserError

SMALL = Study("small", grid({"method": ["inpo", "dpo"], "objective.beta": ["100", "200"]}), (0, 1))


class Inline(Executor):
    """Here and now: the trainer's signals want the main thread, and a new process would import everything again."""

    def __init__(self, jobs: int):
        assert jobs >= 1

    def submit(self, work, /, *arguments):
        future: Future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as problem:
            future.set_exception(problem)
        return future


def test_grid_is_every_combination():
    assert [cell.name for cell in SMALL.cells] == [
        f"method={m} beta={b}" for m in ("inpo", "dpo") for b in ("100", "200")
    ]
    assert grid({"optim.lr": ["1e-4"]})[0].name == "lr=1e-4"
    assert grid({"inversion.steps": ["5", "10"], "objective.timesteps.min": ["0"]})[1].name == "steps=10"
    config = config_of(SMALL, SMALL.cells[1], 7)
    assert (config.method, config.objective.beta, config.seed, config.evaluate.prompts) == ("inpo", 200.0, 7, None)
    for bad in ({"optim.lr": ["1", "1"]}, {"optim.lr": [""]}):
        with pytest.raises(UserError, match=r"--grid optim\.lr"):
            grid(bad)
    with pytest.raises(UserError, match=r"cell 'x': unknown key"):
        config_of(SMALL, Cell("x", (("optim.lrr", "1"),)), 0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_runs_with_different_names(name):
    preset = PRESETS[name]
    for cell in (preset.cells[0], preset.cells[-1]):  # made pairs need not be there yet
        config_of(preset, cell, 0)
    assert len({cell.name for cell in preset.cells}) == len(preset.cells) and name == preset.name


def test_every_method_has_a_valid_setting():
    chosen = Study("methods", PRESETS["methods"].cells)
    assert [config_of(chosen, cell, 0).method for cell in chosen.cells] == [m["method"] for m in METHODS.values()]


RUNS = results.ROOT / "bench" / "results" / "study" / "runs"


def test_tuned_settings_are_the_best_of_the_tuning_that_is_kept():
    """By win-rate on the tuning prompts, by gain where two are equal; each method had as many tries."""
    tuning, tries = PRESETS["tuning"], {}
    for cell in tuning.cells:
        result = json.loads((RUNS / result_name(tuning, cell, tuning.seeds[0])).read_text())
        score = round(float(np.mean(result["points"])), 6), np.mean(result["gain"])
        tries.setdefault(cell.name.partition(":")[0], []).append((score, cell))
    assert tries.keys() == METHODS.keys() and {len(some) for some in tries.values()} == {6}
    for cell in methods(METHODS):
        best = max(tries[cell.name], key=lambda one: one[0])[1]
        assert (best.settings, best.first) == (cell.settings, cell.first), cell.name


def test_the_cheap_inpo_is_the_best_of_what_was_tried():
    """By the mean win-rate over the seeds of `cheaper`, on the tuning prompts."""
    cheaper, mean = PRESETS["cheaper"], {}
    for cell in cheaper.cells:
        runs = [json.loads((RUNS / result_name(cheaper, cell, seed)).read_text()) for seed in cheaper.seeds]
        mean[np.mean([run["points"] for run in runs])] = dict(cell.settings)
    assert cheaper.split == "tuning" and mean[max(mean)].items() >= CHEAP.items()


def test_the_pockets_default_is_what_the_study_found():
    """Of inpo-rms, the variant that it names; the study's own recipe stays what it was."""
    default, chosen = parse("train", ["--config", RECIPE]), methods(["inpo-rms"])[0]
    found = config_of(Study("methods", ()), chosen, 0)
    assert (found.objective, found.optim, found.inversion) == (default.objective, default.optim, default.inversion)
    assert config_of(Study("x", ()), Cell("x", ()), 0).objective.beta == 2000


def test_a_result_is_of_one_setting_only():
    """Anything that decides a result gives it another file."""
    cell = SMALL.cells[0]
    other = [
        result_name(SMALL, cell, 1),
        result_name(SMALL, SMALL.cells[1], 0),
        *(
            result_name(Study("small", SMALL.cells, **changed), cell, 0)
            for changed in ({"split": "tuning"}, {"pictures": 3}, {"shared": (("train.steps", "9"),)})
        ),
    ]
    first = replace(cell, first=(("method", "sft"),))
    other += [result_name(SMALL, some, 0) for some in (first, replace(first, first=(("method", "kto"),)))]
    own = result_name(SMALL, cell, 0)
    assert len({own, *other}) == 8 and own == result_name(Study("renamed", SMALL.cells), replace(cell, name="x"), 0)
    default = replace(cell, settings=(*cell.settings, ("online.every", "0")))  # says what holds anyway
    assert own == result_name(SMALL, default, 0)


def test_prompts_are_split_once_and_for_all():
    prompts = read_prompts(str(ASSETS / "prompts-held-out.txt"))
    parts = [split_prompts(prompts, split) for split in SPLITS]
    assert sorted(parts[0] + parts[1]) == sorted(prompts) and len(prompts) / 5 < len(parts[1]) < len(prompts) / 2
    assert split_prompts(prompts[::-1], "tuning") == parts[1][::-1]  # by the text, not by the place


def work(study, cell, seed):
    if cell is not None and cell.name == "method=dpo beta=100" and seed == 1 and not (study.pictures - 2):
        raise RuntimeError("broken cell")
    return {"seed": seed, "points": [0.5, 1.0]} | ({"control": "control"} if cell is None else {"named": cell.name})


def test_results_are_made_once_and_a_failed_cell_again(tmp_path):
    said: list[str] = []
    how = {"work": work, "show": said.append, "pool": Inline}
    with pytest.raises(UserError, match=r"1 of 9 cells failed.*dpo-\w{10}-seed1.*broken cell"):
        run(SMALL, tmp_path, 2, **how)
    assert len(list(tmp_path.glob("*.json"))) == 8 and any("ETA" in line for line in said)
    (tmp_path / "control-reporting-2.json").write_text('{"cell": ')  # as left by something that is not whole
    made = []

    def again(some, cell, seed):
        made.append((cell, seed))
        return {"control": "again", "seed": seed}

    found = run(SMALL, tmp_path, 2, **how | {"work": again})
    assert {seed for _, seed in made} == {0, 1} and len(made) == 2
    assert len(found) == 9 and found[0]["cell"] == "again"
    assert all(result.get("named", result["cell"]) == result["cell"] for result in found)
    assert run(SMALL, tmp_path, 2, **how) == found
    # another study with one of these runs, under another name there, makes nothing
    shared = run(Study("other", (replace(SMALL.cells[0], name="mine"),), (1,)), tmp_path, 2, **how | {"work": None})
    assert [(result["cell"], result["seed"]) for result in shared] == [("again", 0), ("mine", 1)]


ORPHANED = """
import os, time
from bench.study.run import processes
if __name__ == "__main__":
    pool = processes(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 100)
    time.sleep(100)
"""


def test_what_is_there_is_shown_and_nothing_is_made(tmp_path):
    study, runs = PRESETS["batch"], tmp_path / "runs"
    asked = (tmp_path / "process", "bench.study", "batch", "--show", "--folder", str(tmp_path))
    told = ran(*asked)
    assert told.returncode == 2 and "nothing of batch is there yet" in told.stderr and not runs.exists()
    runs.mkdir()
    kept = [
        path for path, cell, seed in wanted_of(study, RUNS) if cell is None or (cell in study.cells[:2] and seed < 2)
    ]
    for path in kept:
        shutil.copy(path, runs)
    assert ran(*asked).returncode == 0
    rows = [line.split("|")[1:4] for line in (tmp_path / "batch" / "table.md").read_text().splitlines()[4:]]
    assert [[cell.strip() for cell in row][::2] for row in rows[1:]] == [[cell.name, "2"] for cell in study.cells[:2]]
    assert len(list(runs.iterdir())) == len(kept) == 5
    picture = (tmp_path / "batch" / "plot.svg").read_text()
    assert [f"<!-- {cell.name} -->" in picture for cell in study.cells] == [True, True, *6 * [False]]
    assert "<!-- win-rate against the base -->" in picture and "<!-- gain in score -->" in picture


@pytest.mark.slow
def test_a_killed_study_leaves_no_worker_behind():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, text=True, cwd=results.ROOT)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("it computes on for nobody")


def test_two_level_interval_against_the_crossed_bootstraps_variance():
    """Rows, columns and their interaction: var_rows / S + var_columns / P + var_rest / (S P)."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(12, 1)) + 0.5 * rng.normal(size=(1, 40)) + rng.normal(size=(12, 40))
    rows = values.mean(1) - values.mean()
    columns = values.mean(0) - values.mean()
    rest = values - values.mean() - rows[:, None] - columns[None]
    spread = np.sqrt(rows.var() / 12 + columns.var() / 40 + rest.var() / (12 * 40))
    mean, low, high = table.two_level(values)
    assert mean == pytest.approx(values.mean()) and (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.08)
    assert table.two_level(np.full((3, 5), 0.7))[1:] == pytest.approx((0.7, 0.7))
    one = table.two_level(values[:1])
    assert (one[2] - one[1]) / 2 == pytest.approx(1.96 * values[0].std() / 40**0.5, rel=0.08)


def test_win_rates_that_are_nearly_equal_have_a_width_and_a_few_prompts_no_interval():
    values = np.tile([0.0] + [0.5] * 47, (3, 1))
    unseen = 1 - 0.025 ** (1 / 48)
    mean, low, high = table.win_rates(values)
    assert low == pytest.approx(mean * (1 - unseen)) and high == pytest.approx(mean + unseen * (1 - mean))
    spread = np.random.default_rng(0).uniform(0, 1, (3, 48))
    assert table.win_rates(spread) == table.two_level(spread)
    assert table.win_rates(spread[:, :5])[1:] == (None, None)
    assert table._span(table.win_rates(np.ones((3, 5)))) == "1.000 [no interval]"


def test_differences_from_a_cell_leave_out_what_they_share():
    """Two cells whose prompts are equally hard: the interval of each is wide, that of their difference is not."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 1, 40)
    rest = {name: dict.fromkeys(("alignment", "looks"), [0.5] * 40) for name in ("parts",)}
    rest |= {"measures": {name: [0.0] * 40 for name in MEASURES}, "outside": [0.5] * 40, "gain": [0.0] * 40}
    rest |= {"diversity": 1.0, "training": {"eps_scale": 1.0}, "unet_evaluations": 10, "cpu_seconds": 1, "variant": "v"}
    results = [
        {"cell": name, "seed": seed, "points": (hard + add + rng.normal(0, 0.01, 40)).tolist(), **rest}
        for name, add in (("one", 0.0), ("two", 0.05))
        for seed in range(3)
    ]
    head, _, one, two = (line.split("|") for line in table.table(results, "train", "one").strip().splitlines())
    place = [cell.strip() for cell in head].index("less one's")
    assert one[place].strip() == "-"
    mean, low, high = (float(part.strip(" ],[")) for part in two[place].replace("[", ",").split(","))
    assert mean == pytest.approx(0.05, abs=0.01) and low > 0.03 and high < 0.07
    assert "less" not in table.table(results, "train")
    fewer = [result for result in results if (result["cell"], result["seed"]) != ("two", 2)]
    assert table.table(fewer, "train", "one").strip().splitlines()[-1].split("|")[place].strip() == "-"


def few_steps(monkeypatch):
    """Pictures of four steps."""
    how = replace(train.evaluation(), sampler_steps=4)
    monkeypatch.setattr(train, "evaluation", lambda: how)


def test_a_trained_cell_its_control_and_their_table(tmp_path, monkeypatch):
    few_steps(monkeypatch)
    monkeypatch.setattr(train, "read_prompts", lambda path: read_prompts(path)[:6])
    monkeypatch.setattr(train, "_bases", {})
    monkeypatch.setattr(train, "PICTURES", tmp_path / "pictures")
    settings = {"train.steps": "1", "train.pairs_per_step": "2", "train.micro_batch": "2", "inversion.steps": "2"}
    tiny = Study("tiny", (Cell("mine", tuple(settings.items())),), pictures=1)
    how = {"show": str, "pool": Inline}
    made = run(tiny, tmp_path, 1, **how)
    control, mine = made
    prompts = split_prompts(read_prompts(str(ASSETS / "prompts-held-out.txt"))[:6], "reporting")
    assert mine["prompts"] == control["prompts"] == prompts and len(mine["points"]) == len(prompts)
    assert mine["variant"] == "inpo-rms" and mine["unet_evaluations"] > 0 and mine["seed"] == 0
    # one step of a warm-up moves nothing that the judge sees
    assert set(mine["points"]) == {0.5} and np.abs(mine["gain"]).max() < 0.01
    assert all(np.abs(values).max() < 0.01 for values in mine["measures"].values())
    kept = [np.load(path) for path in (tmp_path / "pictures").iterdir()]
    assert len(kept) == 2 and all(some["captions"].tolist() == prompts for some in kept)
    again = train.gallery(tiny, None)
    assert all(np.abs(some["pictures"].astype(int) - np.stack(again.pictures)).mean() < 2 for some in kept)
    text = write(tmp_path, made, tiny, "tiny")
    header, _, *rows = text.strip().splitlines()
    assert len(rows) == 2 and all(row.count("|") == header.count("|") for row in rows)
    assert "0.500 [no interval]" in rows[1] and "prompts only" in rows[1]
    assert "<svg" in (tmp_path / "plot.svg").read_text() and json.dumps(made)


def test_a_cell_that_starts_from_another_runs_model(tmp_path, monkeypatch):
    """The second run's base and reference is the first one's model: its first step's loss is ln 2 there, and the
    result carries both runs' costs."""
    few_steps(monkeypatch)
    monkeypatch.setattr(train, "read_prompts", lambda path: read_prompts(path)[:3])
    monkeypatch.setattr(train, "_bases", {})
    monkeypatch.setattr(train, "PICTURES", tmp_path / "pictures")
    seen, plain = [], train.trained

    def looking(config):
        run = plain(config)
        seen.append((config, run))
        return run

    monkeypatch.setattr(train, "trained", looking)
    small = {"train.steps": "1", "train.pairs_per_step": "2", "train.micro_batch": "2", "inversion.steps": "2"}
    first = tuple((small | {"method": "sft", "optim.lr": "1e-2", "optim.warmup_steps": "0"}).items())
    result = train.run_cell(Study("two", (), pictures=1), Cell("two", tuple(small.items()), first), 0)
    (one, moved), (two, run) = seen
    assert (one.method, two.method, result["variant"]) == ("sft", "inpo", "sft, then inpo-rms")
    assert two.models.base != one.models.base and run.metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    weights = dict(moved.unet.named_parameters())
    assert any((p - weights[name]).abs().max() > 1e-3 for name, p in train.pipeline_of_base().unet.named_parameters())
    assert all((p - weights[name]).abs().max() < 1e-3 for name, p in run.unet.named_parameters())
    assert result["unet_evaluations"] == sum(line["unet_evaluations"] for _, r in seen for line in r.metrics)


def test_a_cell_that_is_asked_to_stop_says_so_in_a_line(tmp_path, monkeypatch):
    """SIGTERM to a process that trains: a UserError instead of a traceback, and the run's folder is free again."""
    settings = {"train.steps": "3", "train.pairs_per_step": "2", "train.micro_batch": "2", "inversion.steps": "2"}
    config = config_of(Study("s", ()), Cell("s", tuple(settings.items())), 0, f"{tmp_path}/run")
    load, loaded = PairLoader.load, []

    def stop_at_the_second_step(loader, position):
        loaded.append(position)
        if len(loaded) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(loader, position)

    monkeypatch.setattr(PairLoader, "load", stop_at_the_second_step)
    with pytest.raises(UserError, match="stopped by SIGTERM; the same command goes on"):
        train.trained(config)
    monkeypatch.setattr(PairLoader, "load", load)
    assert train.trained(replace(config, overwrite=True)).metrics[-1]["step"] == 3


def test_measures_see_what_they_are_named_after():
    """One property is changed at a time; the others stay where they are."""
    scenes = split_scenes()[0][::40]
    captions, rng = [scene.caption for scene in scenes], np.random.default_rng(0)

    def measured(pictures):
        return {name: of(pictures, captions) for name, of in MEASURES.items()}

    def drawn(**finish):
        return [render(scene, Finish(**finish), rng) for scene in scenes]

    plain, moved = measured(drawn()), measured(drawn(dx=3.0, dy=-2.0))
    assert plain["outline"].min() > 0.95 and plain["grain"].max() < 0.002
    assert moved["outline"].min() > 0.93 and moved["grain"].max() < 0.002  # wherever the object is
    noisy = [(p + rng.normal(0, 4, p.shape)).clip(0, 255).astype(np.uint8) for p in drawn()]
    grainy = measured(noisy)
    assert (grainy["grain"] > plain["grain"] + 0.005).all()
    assert np.abs(grainy["brightness"] - plain["brightness"]).max() < 0.01
    stained = measured(drawn(stain=0.04))
    assert np.median(stained["grain"]) < 0.2 * np.median(grainy["grain"])  # blotches are no grain
    swapped = [replace(scene, size={"small": "large", "large": "small"}[scene.size]) for scene in scenes]
    wrong = measured([render(scene, Finish(), rng) for scene in swapped])
    assert (wrong["outline"] < 0.7).all()
    paler = [(p * 0.9).astype(np.uint8) for p in drawn()]
    assert (measured(paler)["brightness"] < plain["brightness"]).all()


def test_reconstruction_falls_with_n_and_with_solved_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(reconstruct, "TIMES", (300,))
    monkeypatch.setattr(reconstruct, "PAIRS", 1)
    monkeypatch.setattr(reconstruct, "FINE", 20)
    cells = grid({"inversion.estimator": ["ddim", "fixed-point"], "inversion.steps": ["3", "20"]})
    chosen = Study("r", cells, kind="reconstruct")
    found = [{"cell": cell.name, **reconstruct.run_cell(chosen, cell, 0)} for cell in cells]
    error = [np.mean(result["points"]) for result in found]
    assert error[1] < error[0] and error[3] < 0.1, error
    assert [result["evaluations_an_image"] for result in found] == [1, 7, 2, 14]
    assert "t = 300" in table.table(found, "reconstruct")
    plot.plot(found, "reconstruct", tmp_path / "plot.svg")
    picture = (tmp_path / "plot.svg").read_text()  # one line for each solver, through its two n
    assert picture.count("<!-- estimator=ddim -->") == picture.count("<!-- estimator=fixed-point -->") == 1
    assert "steps=" not in picture
