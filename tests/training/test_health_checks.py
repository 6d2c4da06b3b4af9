"""Warnings held against made-up runs: each sign is named once with its condition, and taken back where it ceased."""

import json
import math

import pytest

from inpo_fast.training.health_checks import WINDOW, HealthChecks

HEALTHY = {"winner_delta": -0.01, "winner_error": 0.09, "tau_rms_winner": 0.5, "tau_rms_loser": 0.6}
BAD = HEALTHY | {"winner_delta": 0.02, "winner_error": 0.12}


def fed(*rows):
    checks = HealthChecks()
    return checks, [warning for done, row in enumerate(rows, 1) for warning in checks.step(done, row)]


def run(*rows):
    return fed(*rows)[1]


def test_a_healthy_run_is_quiet():
    """rms(tau) below 1 is no sign: the exact path has that too."""
    checks, warnings = fed(*[HEALTHY] * 50)
    assert warnings == checks.summary() == []


def test_a_rising_winner_error_is_named_once_and_not_for_single_steps():
    warnings = run(*[BAD] * (WINDOW + 20))
    assert len(warnings) == 1 and "20 % above" in warnings[0] and f"(step {WINDOW};" in warnings[0]
    assert run(*[BAD] * (WINDOW - 1)) == []
    swinging = [HEALTHY | {"winner_delta": 0.02 if i % 2 else -0.018} for i in range(30)]
    assert run(*swinging) == []  # a mean above 0 that does not stand out of the noise
    small = run(*[HEALTHY | {"winner_delta": 0.001}] * 30)
    assert len(small) == 1  # however small, when it is there in every step
    assert run(*([HEALTHY] * 9 + [HEALTHY | {"winner_delta": 0.05}]) * 3) == []


def test_the_end_says_which_warnings_still_hold(tmp_path):
    checks, warnings = fed(*[BAD] * 15, *[HEALTHY] * 20)
    (line,) = checks.summary()
    assert len(warnings) == 1 and line.startswith("the policy's error on the winners is above the reference's")
    ((first, last),) = checks.signs["winner"].spans
    assert first == WINDOW and 15 <= last < 30 and f"from step {first} to step {last}, then no longer (the run" in line
    checks, warnings = fed(*[BAD] * 15, *[HEALTHY] * 20, *[BAD] * 20)
    (line,) = checks.summary()
    assert len(warnings) == 1 and line.endswith("since step 10, with 1 break between, and still at the end (step 55)")
    checks.write(tmp_path / "warnings.json")
    (written,) = json.loads((tmp_path / "warnings.json").read_text())["warnings"]
    assert written["holds"] is True and written["spans"][0][0] == 10 and written["spans"][1][1] == 55


def test_a_continued_run_knows_what_it_said(tmp_path):
    rows = [BAD] * 15 + [HEALTHY] * 20
    rows[0] = rows[0] | {"noise_ratio": 0.5}
    text = "".join(json.dumps({"step": done} | row) + "\n" for done, row in enumerate(rows, 1))
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 36, "wi')
    checks = HealthChecks.after(tmp_path / "metrics.jsonl", 12)
    assert [w for done, row in enumerate(rows[12:], 13) for w in checks.step(done, row)] == []
    assert checks.summary() == fed(*rows)[0].summary() and len(checks.summary()) == 2
    assert HealthChecks.after(tmp_path / "metrics.jsonl", 0).summary() == []
    assert HealthChecks.after(tmp_path / "missing", 5).summary() == []


@pytest.mark.parametrize(("ratio", "words"), [(0.5, "50 % less noise"), (2.0, "100 % more noise"), (0.9, None)])
def test_an_inversion_is_measured_by_a_finer_one(ratio, words):
    checks, warnings = fed(HEALTHY | {"noise_ratio": ratio}, *[HEALTHY] * 4)
    assert [words in w and f"noise_ratio {ratio:.2f}" in w for w in warnings] == [True] * bool(words)
    assert len(checks.summary()) == bool(words)
    assert not words or (checks.summary()[0].endswith(": measured once") and "(step 1; measured once)" in warnings[0])


def test_nothing_is_divided_by_nothing():
    """A reference without error (v at zero terminal SNR), overflowed steps, methods without losers."""
    assert "0.02 above" in run(*[{"winner_delta": 0.02, "winner_error": 0.02}] * 20)[0]
    odd = [{"winner_delta": math.nan, "winner_error": math.inf}, {"winner_delta": None}, {}]
    assert run(*odd * 20) == []
    assert len(run(*[{"winner_delta": 0.1, "winner_error": 0.5}] * 20)) == 1
    assert len(run(*[{"winner_delta": 0.1}] * 20)) == 1
