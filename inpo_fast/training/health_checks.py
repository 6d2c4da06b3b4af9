"""Plain warnings, each given once, when a run shows a sign of going wrong."""

from collections import deque
from statistics import stdev

from inpo_fast.method.inversion import UNDER_NOISED

WINDOW = 10  # steps that a sign is averaged over
CLEAR = 2.0  # standard errors of the mean over WINDOW steps that a rise must exceed: single batches are noisy


class HealthChecks:
    """Feed it each step's metrics; it returns the warnings that are due.

    expects_noise: x_t must hold unit noise by itself, because the objective does not rescale it.
    """

    def __init__(self, expects_noise: bool = True):
        self.expects_noise = expects_noise
        self.recent: dict[str, deque[float]] = {}
        self.given: set[str] = set()

    def step(self, values: dict[str, float]) -> list[str]:
        for name in ("winner_delta", "winner_error", "tau_rms_winner", "tau_rms_loser"):
            if name in values:
                self.recent.setdefault(name, deque(maxlen=WINDOW)).append(values[name])
        signs = {}
        rise = self._mean("winner_delta")
        before = (self._mean("winner_error") or 0.0) - (rise or 0.0)  # the reference's error on the same images
        if rise is not None and rise > CLEAR * self._standard_error("winner_delta"):
            signs["winner"] = (
                f"over the last {WINDOW} steps the policy's error on the winners is {100 * rise / before:.0f} % above "
                f"the reference's (winner_delta {rise:+.2g}); a larger objective.beta or a smaller optim.lr usually "
                "mends it"
            )
        sizes = [size for side in ("winner", "loser") if (size := self._mean(f"tau_rms_{side}")) is not None]
        if self.expects_noise and sizes and min(sizes) < UNDER_NOISED:
            signs["tau"] = (
                f"the inversion lands on images with too little noise for their timestep (tau_rms {min(sizes):.2f}, "
                "1 is right); more inversion.steps bring it closer, objective.tau_norm=rms rescales it"
            )
        due = [text for sign, text in signs.items() if sign not in self.given]
        self.given |= signs.keys()
        return due

    def _mean(self, name: str) -> float | None:
        recent = self.recent.get(name, ())
        return sum(recent) / WINDOW if len(recent) == WINDOW else None

    def _standard_error(self, name: str) -> float:
        return stdev(self.recent[name]) / WINDOW**0.5
