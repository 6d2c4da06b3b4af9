"""Win-rates, intervals and sanity checks against hand-made scores; a whole evaluation against its own premises."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_world import save_tiny_model, tiny_pipeline, tiny_unet

from inpo_fast import evaluate as evaluate_command
from inpo_fast.comparison import evaluation as ev
from inpo_fast.comparison.drawing import draw, open_base, scaled_eps, use_deterministic_sampler
from inpo_fast.comparison.prompts import read_prompts
from inpo_fast.comparison.run_evaluation import evaluate
from inpo_fast.comparison.win_rates import win_rate
from inpo_fast.config import EvaluateConfig, parse
from inpo_fast.judges import Scores
from inpo_fast.pocket.scenes import split_scenes
from inpo_fast.report.results import sanity_checks, verdict
from inpo_fast.runtime.errors import UserError


def test_win_rate_counts_wins_and_half_the_ties():
    base = np.zeros(8)
    ours = np.array([1, 1, 1, -1, 0.001, 0, 1, -1])
    assert win_rate(ours, base, tie=0.01, seeds=2)[0] == (4 + 0.5 * 2) / 8
    assert win_rate(-ours, base, tie=0.01, seeds=2)[0] == 1 - (4 + 0.5 * 2) / 8


def test_interval_is_over_prompts_not_pictures():
    """Eight pictures of one prompt that agree are one observation: repeating them must not narrow the interval."""
    rng = np.random.default_rng(0)
    one = rng.choice([-1.0, 1.0], size=64)
    found = win_rate(one, np.zeros(64), 0.01, seeds=1)
    repeated = win_rate(one.repeat(8), np.zeros(512), 0.01, seeds=8)
    assert repeated == found
    _, low, high, _ = found
    # the known half-width of a fair coin at 64 prompts is 12 points (1.96 sqrt(0.25 / 64))
    assert 0.09 < (high - low) / 2 < 0.15


def test_interval_covers_a_fair_coin():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        _, low, high, _ = win_rate(rng.standard_normal(64), np.zeros(64), 0.0, seeds=1)
        covered += low <= 0.5 <= high
    assert covered >= 88  # 95 expected; binomial, 3 standard deviations


def test_diversity_is_zero_for_copies_and_grows_with_spread():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(4)]
    same = ev.Gallery(["a", "b"], 2, [noise[0], noise[0], noise[1], noise[1]])
    different = ev.Gallery(["a", "b"], 2, noise)
    assert ev.diversity(same) == 0 < ev.diversity(different)


class Brightness:
    """A judge that is easy to predict."""

    name, tie = "brightness", 1e-6

    def score(self, images, prompts):
        mean = np.array([image.mean() for image in images])
        return Scores(mean, {"alignment": -mean, "looks": mean})


def gallery(level, prompts=6, seeds=2):
    rng = np.random.default_rng(level)
    return ev.Gallery(
        [f"p{i}" for i in range(prompts)],
        seeds,
        [(rng.integers(0, 20, (4, 4, 3)) + level).astype(np.uint8) for _ in range(prompts * seeds)],
    )


def test_summary_has_its_keys_and_sanity_checks_can_fail():
    galleries = {
        "base": gallery(50),
        "aligned": gallery(150),
        "control": gallery(100),
        "base_seen": gallery(50),
        "aligned_seen": gallery(150),
    }
    judge = Brightness()
    scores = {name: judge.score(g.pictures, g.captions) for name, g in galleries.items()}
    config = replace(EvaluateConfig(), seeds=2)
    result = ev.summarise(galleries, scores, judge, Brightness(), config, "inpo-rms")
    assert result["win_rate"] == 1.0 and result["prompts"] == 6 and result["seeds"] == 2
    assert result["win_rate_low"] == pytest.approx(0.025 ** (1 / 6)) and result["win_rate_high"] == 1
    assert set(result["parts"]) == {"alignment", "looks"} and result["parts"]["alignment"]["win_rate"] == 0
    assert not result["guards"]["alignment"]["ok"]  # looks were bought with alignment
    assert not result["guards"]["control"]["ok"]  # a judge that the control fools
    assert result["guards"]["seen"]["ok"]
    assert result["guards"]["outside"]["shift"] > 0
    # what it says of a model that is no better
    assert result["guards"]["outside"]["control"] == pytest.approx([1.0, 0.025 ** (1 / 6), 1.0])
    assert not result["guards"]["outside"]["fit"] and result["guards"]["outside"]["ok"] is None
    fooled = "what it sees also moves with the size of the noise prediction, so it is unfit for this base and cannot"
    assert any(fooled in check.meaning for check in sanity_checks(result))
    same = ev.summarise(galleries | {"control": gallery(50)}, scores, judge, Brightness(), config, "inpo-rms")
    half = (1 - 0.025 ** (1 / 6)) / 2
    assert same["guards"]["outside"]["control"] == pytest.approx([0.5, 0.5 - half, 0.5 + half])
    assert any("Of the negative control it says 50 % (27 to 73)." in check.meaning for check in sanity_checks(same))
    assert same["guards"]["outside"]["ok"] is True
    worse = ev.summarise(
        galleries | {"aligned": gallery(40), "control": gallery(50)}, scores, judge, Brightness(), config, "inpo-rms"
    )
    assert worse["guards"]["outside"]["shift"] < -0.5 and worse["guards"]["outside"]["ok"] is False
    json.dumps(result)
    text = verdict(result)
    assert "100.0 %" in text and "inpo-rms" in text
    assert "fail: alignment (its pictures show less" in text and "; negative control (brightness also prefers" in text


def test_same_noise_for_both_models_whatever_the_batch():
    pipeline = tiny_pipeline()
    use_deterministic_sampler(pipeline)
    prompts, keys = ["a small red circle on a blue background"] * 3, [("k", i) for i in range(3)]
    together = draw(pipeline, prompts, keys, steps=2, guidance=2.0, batch=3)
    alone = draw(pipeline, prompts[2:], keys[2:], steps=2, guidance=2.0, batch=1)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1  # fp32 rounding before 8 bits
    assert np.abs(together[0].astype(int) - together[1]).max() > 1


def test_control_scales_the_prediction_and_is_undone():
    pipeline = tiny_pipeline()
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 64)
    with torch.no_grad():
        plain = pipeline.unet(x, t, text).sample
        with scaled_eps(pipeline, 1.01):
            torch.testing.assert_close(pipeline.unet(x, t, text).sample, 1.01 * plain)
        torch.testing.assert_close(pipeline.unet(x, t, text).sample, plain, rtol=0, atol=0)


def test_a_model_against_itself_ties_and_the_base_is_put_back(tmp_path):
    pipeline = tiny_pipeline()
    own = pipeline.unet
    (tmp_path / "p.txt").write_text("\n".join(s.caption for s in split_scenes()[1][:3]))
    config = EvaluateConfig(
        prompts=str(tmp_path / "p.txt"), seeds=2, sampler_steps=2, guidance=2.0, batch=4, control_eps_scale=1.3
    )
    same = tiny_unet()
    same.load_state_dict(own.state_dict())
    evaluation = evaluate(pipeline, same, config, "itself", tmp_path)
    assert evaluation.result["win_rate"] == 0.5 and pipeline.unet is own
    base, aligned, control = (np.stack(evaluation.galleries[n].pictures) for n in ("base", "aligned", "control"))
    assert (base == aligned).all() and (base != control).any()
    plain = draw(
        pipeline,
        evaluation.galleries["base"].captions[:1],
        [("evaluate", 0, evaluation.galleries["base"].prompts[0], 0)],
        steps=2,
        guidance=2.0,
    )
    assert np.abs(plain[0].astype(int) - base[0]).max() <= 1  # the base itself is drawn unscaled


def test_command_line_compares_two_folders(tmp_path, monkeypatch, capsys):
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "p.txt").write_text("a small red circle on a blue background\n")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate",
            "--model",
            model,
            "--base",
            model,
            "--output",
            str(tmp_path / "out"),
            f"--evaluate.prompts={tmp_path / 'p.txt'}",
            "--evaluate.seeds=1",
            "--evaluate.sampler_steps=2",
        ],
    )
    evaluate_command.main()
    assert "Report:" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["win_rate"] == 0.5
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "samples.png").exists()


def test_unreadable_or_empty_prompts_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(str(tmp_path / "none.txt"))


def test_the_configurations_vae_draws_in_the_command_too(tmp_path):
    """As at the end of a run."""
    base, other = tiny_pipeline(), tiny_pipeline(seed=5)
    base.save_pretrained(tmp_path / "base")
    other.vae.save_pretrained(tmp_path / "vae")
    config = parse("test", [f"--models.base={tmp_path / 'base'}", f"--models.vae={tmp_path / 'vae'}"])
    how = config.models
    opened = open_base("models.base", how.base, torch.float32, how.single_file_config, "models.vae", how.vae)
    ours, theirs = opened.vae.state_dict(), other.vae.state_dict()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
