"""Plain warnings, each given once, when a run shows a sign of going wrong."""

from collections import deque

WINDOW = 10  # steps that a sign is averaged over


class Watch:
    """Feed it each step's metrics; it returns the warnings that are due."""

    def __init__(self):
        self.recent: dict[str, deque[float]] = {}
        self.given: set[str] = set()

    def step(self, values: dict[str, float]) -> list[str]:
        for name in ("winner_delta", "tau_rms_winner", "tau_rms_loser"):
            if name in values:
                self.recent.setdefault(name, deque(maxlen=WINDOW)).append(values[name])
        warnings = []
        rise = self._mean("winner_delta")
        if rise is not None and rise > 0:
            warnings.append(
                f"over the last {WINDOW} steps the policy predicts the winners worse than the reference does "
                f"(winner_delta {rise:+.2g}); a larger objective.beta or a smaller optim.lr usually mends it"
            )
        for side in ("winner", "loser"):
            size = self._mean(f"tau_rms_{side}")
            if size is not None and size < 0.9:
                warnings.append(
                    f"the inversion lands on images with too little noise for their timestep (tau_rms_{side} {size:.2f}, "
                    "expected about 1); inversion.evaluate_at=source with grid=exact lands right, or take more steps"
                )
        due = [text for text in warnings if text.split("(")[0] not in self.given]
        self.given |= {text.split("(")[0] for text in due}
        return due

    def _mean(self, name: str) -> float | None:
        recent = self.recent.get(name, ())
        return sum(recent) / WINDOW if len(recent) == WINDOW else None
