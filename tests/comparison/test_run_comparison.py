"""Several models and judges: pictures, tables and pages of a comparison against hand-made numbers and a real run."""

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_world import save_tiny_model, tiny_pipeline

from inpo_fast import evaluate as evaluate_command
from inpo_fast.comparison import run_comparison
from inpo_fast.comparison.model_comparison import ModelComparison, summarise
from inpo_fast.comparison.picture_store import PictureStore, read_picture
from inpo_fast.comparison.prompts import PromptSet
from inpo_fast.comparison.win_rates import disagreement
from inpo_fast.config import EvaluateConfig
from inpo_fast.judges import Scores
from inpo_fast.pocket.scenes import split_scenes
from inpo_fast.report import comparison as page
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>alert('|')</script>"


class Named:
    tie = 0.5

    def __init__(self, name):
        self.name = name


def comparison(tmp_path, seeds=2):
    """Three models on four prompts of two styles; scores written by hand."""
    prompts = PromptSet("hpdv2", [f"p{i} {EVIL}" for i in range(4)], {"style": {"anime": [0, 2], "photo": [1, 3]}})
    out = ModelComparison(prompts, seeds, {"base": "B", "ours": "O", "other": "X"}, [Named("j|1"), Named("j2")])
    rng = np.random.default_rng(0)
    for name in (*out.models, "control"):
        store = PictureStore(tmp_path, name, {"name": name})
        store.start()
        store.fill(store.missing(prompts.prompts, seeds), lambda jobs: [
            rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in jobs], 3, lambda n: None)  # fmt: skip
        out.pictures[name] = store.all(prompts.prompts, seeds)
    base = np.arange(8.0)
    ours = base + np.array([1, 1, 1, -1, 0.1, 0, -1, -1])  # by prompts: 1, 1/2, 1/2 (two ties), 0
    out.scores = {
        "j|1": {"base": base, "ours": ours, "other": base + 1, "control": base},
        "j2": {"base": base, "ours": base + np.array([1, 1, 1, -1, 0.1, 0, 9, -1]), "other": base - 1, "control": base},
    }
    out.scores = {judge: {name: Scores(t) for name, t in each.items()} for judge, each in out.scores.items()}
    return out


def test_table_holds_the_hand_counted_numbers(tmp_path):
    result = summarise(comparison(tmp_path), EvaluateConfig())
    rates = {(r["model"], r["against"]): r for r in result["win_rates"]["j|1"]}
    assert rates.keys() == {("ours", "base"), ("other", "base"), ("control", "base"), ("other", "ours")}
    ours = rates["ours", "base"]
    assert ours["win_rate"] == 0.5 and ours["low"] is ours["high"] is None  # four prompts tell nothing from chance
    assert ours["groups"]["style"]["anime"]["win_rate"] == 0.75 and ours["groups"]["style"]["photo"]["prompts"] == 2
    assert ours["groups"]["style"]["photo"]["win_rate"] == 0.25
    assert rates["other", "base"]["win_rate"] == 1 and rates["control", "base"]["win_rate"] == 0.5
    assert rates["other", "ours"]["win_rate"] == (0.5 * 2 + 0.5 + 1 + 1 + 1 + 1 + 1) / 8
    scores = result["scores"]["j|1"]["ours"]
    assert scores["mean"] == pytest.approx(3.5 + 0.1 / 8) and scores["median"] == pytest.approx(3.55)
    assert scores["groups"]["style"]["anime"]["mean"] == pytest.approx((1 + 2 + 4.1 + 5) / 4)
    assert result["paper"] is None
    text = page.markdown(json.loads(json.dumps(result)))
    assert "| ours against base | 50.0 (4 prompts, no interval)" in text and "by style" in text and "j\\|1" in text
    assert "| anime | 75.0 (2 prompts, no interval)" in text


def test_judges_that_tell_the_control_from_the_base_are_named(tmp_path):
    """Whichever of the two they prefer; a fit judge is not, nor one on too few prompts."""
    prompts = PromptSet("text", [f"p{i}" for i in range(10)], {})
    flat, picture = np.zeros(20), np.zeros((8, 8, 3), np.uint8)
    controls = {"likes": flat + 1, "dislikes": flat - 1, "fit": flat, "torn": flat + np.tile([1.0, -1.0], 10)}
    out = ModelComparison(prompts, 2, {"base": "B", "ours": "O"}, [Named(name) for name in controls])
    out.pictures = dict.fromkeys(("base", "ours", "control"), [picture] * 20)
    out.scores = {
        judge: {name: Scores(t) for name, t in (("base", flat), ("ours", flat + 1), ("control", control))}
        for judge, control in controls.items()
    }
    result = json.loads(json.dumps(summarise(out, EvaluateConfig())))
    assert [line.split(" is unfit")[0] for line in page.unfit_judges(result)] == ["likes", "dislikes"]
    text = page.markdown(result)
    assert text.count("unfit for this base") == 2 and "- likes is unfit for this base: it tells even" in text
    assert page.html(result, []).count("unfit for this base") == 2
    few = json.loads(json.dumps(summarise(comparison(tmp_path), EvaluateConfig())))
    assert page.unfit_judges(few) == []


def test_disagreement_knows_no_scale():
    same = np.array([1.0, -1, 2])
    assert np.allclose(disagreement([same, 100 * same]), 0)
    apart = disagreement([np.array([1.0, 1, 1]), np.array([50.0, -50, 50])])
    assert apart.argmax() == 1 and np.allclose(apart, [0, 1, 0])


def test_rows_are_sorted_by_disagreement(tmp_path):
    shown = page.rows(comparison(tmp_path))
    spreads = [row.spread for row in shown]
    assert len(shown) == 4 and spreads == sorted(spreads, reverse=True)  # one row a prompt
    assert [shot.model for shot in shown[0].shots] == ["base", "ours", "other"]
    assert shown[0].shots[0].scores[0][2] is None and shown[0].labels[0] in ("anime", "photo")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page(tmp_path):
    made = comparison(tmp_path)
    path = page.write_comparison(tmp_path, summarise(made, EvaluateConfig()), made)
    text = path.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<!DOCTYPE html><meta charset=utf-8><iframe width=1100 height=900 srcdoc="{html.escape(text)}"></iframe>'
        f'<iframe width=390 height=900 srcdoc="{html.escape(text)}"></iframe><pre id=out></pre>'
        "<script>onload = () => { out.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(f => {"
        "const d = f.contentDocument; return { overflow: d.documentElement.scrollWidth - d.documentElement.clientWidth,"
        "broken: [...d.images].filter(i => !i.naturalWidth).length, images: d.images.length,"
        "bars: [...d.querySelectorAll('.span')].filter(b => b.getBoundingClientRect().width > 1).length,"
        "dots: [...d.querySelectorAll('.dot')].filter(b => b.getBoundingClientRect().width > 1).length,"
        "cells: [...d.querySelectorAll('#scores tbody tr:first-child td')].map(c => c.firstChild.textContent.trim()) }"
        "})) }</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--hide-scrollbars"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    for seen in json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.S)[1])):
        assert seen["overflow"] <= 0 and seen["broken"] == 0 and seen["images"] == 12
        assert (
            seen["bars"] == 0 and seen["dots"] == 2 * 4 + 3 * 2 * 2
        )  # pairs by judge, two styles of the three; 4 prompts
        assert seen["cells"] == ["3.5", "3.55", "4.5", "3.5"]


def arguments(tmp_path, *more):
    (tmp_path / "p.txt").write_text("\n".join(s.caption for s in split_scenes()[1][:3]))
    return [
        "evaluate", "--base", str(tmp_path / "base"), "--model", f"same={tmp_path / 'base'}",
        "--model", f"new={tmp_path / 'new'}", "--output", str(tmp_path / "out"), "--evaluate.seeds=2",
        f"--evaluate.prompts={tmp_path / 'p.txt'}", "--evaluate.sampler_steps=2", "--evaluate.batch=4", *more,
    ]  # fmt: skip


@pytest.fixture
def models(tmp_path):
    save_tiny_model(tmp_path / "base")
    tiny_pipeline(seed=3).unet.save_pretrained(tmp_path / "new")  # a UNet's folder alone
    return tmp_path


def test_command_line_goes_on_where_it_stopped(models, monkeypatch, capsys):
    drawn, kept = [], distributed.gather
    draw = run_comparison.draw

    def counted(pipeline, prompts, *rest, **how):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return draw(pipeline, prompts, *rest, **how)

    monkeypatch.setattr(run_comparison, "draw", counted)
    monkeypatch.setattr(sys, "argv", arguments(models))
    with pytest.raises(KeyboardInterrupt):
        evaluate_command.main()
    assert drawn == [4, 2, 4]
    drawn.clear()
    drawn += [0, 0, 0, 0]  # no limit any more
    evaluate_command.main()
    assert drawn[4:] == [2, 4, 2, 4, 2]  # the rest of `same`, then `new` and the control
    result = json.loads((models / "out/comparison.json").read_text())
    same = next(r for r in result["win_rates"]["pocket-rules"] if r["model"] == "same")
    assert same["win_rate"] == 0.5 and same["low"] is None and same["prompts"] == 3  # the same noise: equal pictures
    files = [json.loads(line) for line in (models / "out/pictures.jsonl").read_text().splitlines()]
    assert len(files) == 24 and kept is distributed.gather
    pictures = {(f["model"], f["prompt"], f["seed"]): read_picture(models / "out" / f["file"]) for f in files}
    for (model, prompt, seed), picture in pictures.items():
        equal = (picture == pictures["base", prompt, seed]).all()
        assert equal == (model in ("base", "same"))
    drawn[4:] = []
    monkeypatch.setattr(sys, "argv", arguments(models, "--evaluate.judges=[pocket-rules]"))
    evaluate_command.main()
    assert len(drawn) == 4  # nothing is drawn again
    monkeypatch.setattr(sys, "argv", arguments(models, "--evaluate.guidance=2"))
    evaluate_command.main()
    assert len(drawn) == 4 + 8  # another way of drawing: none of the old pictures
    capsys.readouterr()


def test_ranks_share_the_work(models, monkeypatch):
    """Two processes, one after the other: each draws and judges its half, and the shares make the whole in order."""
    shares = [
        Scores(np.array([0.0, 2, 4]), {"x": np.array([0.0, 20, 40])}),
        Scores(np.array([1.0, 3]), {"x": [10, 30]}),
    ]
    whole = run_comparison._interleaved(shares, 5)
    assert whole.total.tolist() == [0, 1, 2, 3, 4] and whole.parts["x"].tolist() == [0, 10, 20, 30, 40]
    prompts = PromptSet("text", [s.caption for s in split_scenes()[1][:3]])
    pipeline, config = tiny_pipeline(), EvaluateConfig(sampler_steps=2, guidance=2.0, control_eps_scale=1.0)
    drawn = []
    for rank in range(2):  # each sees none of the other's, as when both look before anybody adds
        monkeypatch.setattr(run_comparison.distributed, "rank_and_world", lambda rank=rank: (rank, 2))
        made = ModelComparison(prompts, 1, {"base": "B"}, [])
        run_comparison.draw_all(made, pipeline, config, models / "shared")
        drawn.append([path.name for path in made.pictures["base"].files if path.exists()])
        for path in made.pictures["base"].files:
            path.unlink(missing_ok=True)
    assert [len(names) for names in drawn] == [2, 1] and len({*drawn[0], *drawn[1]}) == 3


def test_names_of_models():
    assert run_comparison.named_models("b", ["runs/sd15/model", "runs/x/lora", "mine=hub/id", "org/name"]) == {
        "base": "b", "sd15": "runs/sd15/model", "x": "runs/x/lora", "mine": "hub/id", "name": "org/name",
    }  # fmt: skip
    for twice in (["a/model", "b/../a/model"], ["control=x"], ["base=x"], ["=x"]):
        with pytest.raises(UserError, match="is taken"):
            run_comparison.named_models("b", twice)
