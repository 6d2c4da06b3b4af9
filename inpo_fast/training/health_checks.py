"""Signs of a run that goes wrong: said once when they begin, and at the end of the run whether they still hold.

Everything follows from metrics.jsonl, so a continued run knows what it said before.
"""

import json
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev

from inpo_fast.runtime.files import parse_json, write_text

WINDOW = 10  # steps that a sign is averaged over
CLEAR = 2.0  # standard errors of the mean over WINDOW steps that a rise must exceed: single batches are noisy
FINE = (0.75, 1.33)  # rms(tau) relative to a fine inversion's: outside, x_t holds clearly less or more noise
WATCHED = ("winner_delta", "winner_error")


@dataclass
class Sign:
    """condition: under which it holds, in words. spans: first and last step of each time that it held. once: it was
    measured once, and is not looked at again."""

    condition: str
    once: bool = False
    spans: list[list[int]] = field(default_factory=list)


class HealthChecks:
    """Feed it each step's metrics; it returns the warnings that are due."""

    def __init__(self):
        self.recent: dict[str, deque[float]] = {}
        self.signs: dict[str, Sign] = {}
        self.last = 0  # step

    @classmethod
    def after(cls, metrics: Path, done: int) -> "HealthChecks":
        """As it was after so many steps of a run that is continued. metrics: its metrics.jsonl; may be missing."""
        checks = cls()
        for line in (
            metrics.read_text(encoding="utf-8", errors="replace").splitlines() if done and metrics.exists() else ()
        ):
            try:
                values = parse_json(line)
                if values["step"] <= done:
                    checks.step(values["step"], values)
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a crash
        return checks

    def step(self, done: int, values: dict[str, float]) -> list[str]:
        """done: steps so far. values: by name; what is missing, None or not finite is left out."""
        for name in WATCHED:
            if isinstance(value := values.get(name), int | float) and math.isfinite(value):
                self.recent.setdefault(name, deque(maxlen=WINDOW)).append(value)
        self.last, due = done, []
        for name, (condition, text) in (self._winner() | self._noise(values)).items():
            sign = self.signs.setdefault(name, Sign(condition, once=name == "noise"))
            if not sign.spans:
                later = "measured once" if sign.once else "the end of the run says whether it still holds"
                due.append(f"{text} (step {done}; {later})")
            if sign.spans and sign.spans[-1][1] >= done - 1:
                sign.spans[-1][1] = done
            else:
                sign.spans.append([done, done])
        return due

    def summary(self) -> list[str]:
        """At the end, of each sign that there was: since when it holds, or when it ceased."""
        return [f"{sign.condition}: {_history(sign, self.last)}" for sign in self.signs.values()]

    def write(self, path: Path) -> None:
        """warnings.json, for the report."""
        signs = [
            {"condition": sign.condition, "spans": sign.spans, "holds": _holds(sign, self.last)}
            for sign in self.signs.values()
        ]
        write_text(path, json.dumps({"steps": self.last, "warnings": signs, "said": self.summary()}, indent=1))

    def _winner(self) -> dict[str, tuple[str, str]]:
        """Policy's error on the winners above the reference's: by name, condition and warning."""
        rise, error = self._mean("winner_delta"), self._mean("winner_error")
        if rise is None or not rise > CLEAR * self._standard_error("winner_delta"):
            return {}
        before = 0.0 if error is None else error - rise  # the reference's error on the same images
        share = f"{100 * rise / before:.0f} %" if before > 0 else f"{rise:.2g}"
        condition = f"the policy's error on the winners is above the reference's, on average over {WINDOW} steps"
        return {
            "winner": (
                condition,
                f"over the last {WINDOW} steps the policy's error on the winners is {share} above the reference's "
                f"(winner_delta {rise:+.2g}); a larger objective.beta or a smaller optim.lr usually mends it",
            )
        }

    def _noise(self, values: dict[str, float]) -> dict[str, tuple[str, str]]:
        """Measured once, so it holds for the whole run."""
        ratio = values.get("noise_ratio", self.recent.get("noise_ratio", [None])[0])
        if ratio is None or not math.isfinite(ratio):
            return {}
        self.recent["noise_ratio"] = deque([ratio], maxlen=1)
        if FINE[0] <= ratio <= FINE[1]:
            return {}
        what = "less" if ratio < 1 else "more"
        condition = (
            f"before the first step x_t held {100 * abs(1 - ratio):.0f} % {what} noise than by a fine inversion of the "
            f"same images (noise_ratio {ratio:.2f})"
        )
        return {
            "noise": (
                condition,
                f"{condition}; more inversion.steps or inversion.grid=spread bring it closer, objective.tau_norm=rms "
                "rescales it",
            )
        }

    def _mean(self, name: str) -> float | None:
        recent = self.recent.get(name, ())
        return sum(recent) / WINDOW if len(recent) == WINDOW else None

    def _standard_error(self, name: str) -> float:
        return stdev(self.recent[name]) / WINDOW**0.5


def _holds(sign: Sign, last: int) -> bool:
    return bool(sign.spans) and sign.spans[-1][1] == last


def _history(sign: Sign, last: int) -> str:
    if sign.once:
        return "measured once"
    first, end = sign.spans[0][0], sign.spans[-1][1]
    gaps = "" if len(sign.spans) == 1 else f", with {len(sign.spans) - 1} breaks between"
    gaps = gaps.replace("1 breaks", "1 break") if len(sign.spans) == 2 else gaps
    if _holds(sign, last):
        return f"since step {first}{gaps}, and still at the end (step {last})"
    return f"from step {first} to step {end}{gaps}, then no longer (the run has {last})"
