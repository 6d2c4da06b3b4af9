"""Warnings held against made-up runs: each sign is named once, and a healthy run stays quiet."""

from inpo_fast.training.health_checks import WINDOW, HealthChecks

HEALTHY = {"winner_delta": -0.01, "winner_error": 0.09, "tau_rms_winner": 0.98, "tau_rms_loser": 1.0}


def run(*rows):
    watch = HealthChecks()
    return [warning for row in rows for warning in watch.step(row)]


def test_a_healthy_run_is_quiet():
    assert run(*[HEALTHY] * 50) == []


def test_a_rising_winner_error_is_named_once_and_not_for_single_steps():
    bad = HEALTHY | {"winner_delta": 0.02, "winner_error": 0.12}
    warnings = run(*[bad] * (WINDOW + 20))
    assert len(warnings) == 1 and "20 % above" in warnings[0]
    assert run(*[bad] * (WINDOW - 1)) == []
    swinging = [HEALTHY | {"winner_delta": 0.02 if i % 2 else -0.018} for i in range(30)]
    assert run(*swinging) == []  # a mean above 0 that does not stand out of the noise
    small = run(*[HEALTHY | {"winner_delta": 0.001}] * 30)
    assert len(small) == 1  # however small, when it is there in every step
    assert run(*([HEALTHY] * 9 + [HEALTHY | {"winner_delta": 0.05}]) * 3) == []


def test_too_little_noise_is_named():
    warnings = run(*[HEALTHY | {"tau_rms_winner": 0.5}] * 30)
    assert len(warnings) == 1 and "tau_rms 0.50" in warnings[0]
    rescaled = HealthChecks(expects_noise=False)
    assert not [w for _ in range(30) for w in rescaled.step(HEALTHY | {"tau_rms_winner": 0.5})]


def test_methods_without_losers_are_watched_too():
    assert len(run(*[{"winner_delta": 0.1, "winner_error": 0.5}] * 20)) == 1
