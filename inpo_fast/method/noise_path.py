"""The path from an image to noise, x_t = a_t x_0 + s_t eps: all that inversion, caches and metrics know about it.

A level says where on the path a sample is, in the path's own coordinates: whole numbers of a DDPM schedule, or floating
point (rectified flow: a = 1 - s, 0 < s <= 1). `clean` is the level of the image itself, where a = 1 and s = 0; noise
grows with the level. Timesteps are the levels that are trained at. The time that conditions the network may be
another number again (1000 s, 1 - s).

Pure tensors on the CPU, but for `noise_from_output`, `target` and `noised`, which follow their arguments.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from inpo_fast.method.config import Grid, Timesteps
from inpo_fast.runtime.keyed_rng import Key

Levels = torch.Tensor  # in the path's coordinates, of its dtype


class NoisePath(ABC):
    """What a kind of path has to say. `ddpm_path.py` is that of the models with diffusers' `alphas_cumprod`."""

    clean: int | float
    output: str  # what the network predicts: epsilon (the noise), v, velocity …
    grids: tuple[str, ...] = ("exact", "spread", "snap")
    # Whether p and q of a step are the same with the output at the level it goes to: else no solver can solve for it.
    implicit_steps: bool

    @property
    @abstractmethod
    def identity(self) -> str:
        """All numbers of the path, for what is kept on disk."""

    @abstractmethod
    def check(self, t: Levels, steps: int) -> None:
        """ValueError where t (M,) are no levels above `clean`, or a grid of so many steps cannot be."""

    @abstractmethod
    def a_s(self, t: Levels) -> tuple[torch.Tensor, torch.Tensor]:
        """a_t and s_t, fp32, same shape as t."""

    @abstractmethod
    def network_time(self, t: Levels) -> torch.Tensor:
        """What the network is conditioned on at these levels, `clean` among them; same shape, whole or floating."""

    @abstractmethod
    def global_levels(self, steps: int) -> Levels:
        """(steps + 1,) rising: of a grid that all samples share, from `clean` to the highest level."""

    @abstractmethod
    def own_levels(self, t: Levels, steps: int) -> Levels:
        """(M, steps + 1) rising: of each sample's own grid, from `clean` to t (M,) in equal parts."""

    @abstractmethod
    def all_levels(self, steps: int) -> Levels:
        """(L,) rising to the highest: every level; of a continuous path, several within each step of the grids."""

    @abstractmethod
    def step_coefficients(self, levels: Levels, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """p, q, sigma of each step along levels (M, K + 1), (M, K) float64: x <- p x + q output (+ sigma noise).

        DDIM's update from one level to the next, with the network's output at the first of them, whatever it predicts:
        what turns the output into noise is folded into p and q. sigma is DDIM's with eta = 1.
        """

    @abstractmethod
    def noise_from_output(
        self, output: torch.Tensor, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor
    ) -> torch.Tensor:
        """The predicted noise (B, C, H, W), differentiable. output: the network's at x; a, s (B,) of x's level."""

    @abstractmethod
    def part(self, t: Levels, parts: int) -> torch.Tensor:
        """Which of so many equal parts of the path t lies in: int64 in 0..parts - 1, 0 next to the image."""

    @abstractmethod
    def draw_timesteps(self, span: Timesteps, keys: Sequence[Key]) -> Levels:
        """(K, N): the timesteps that N pairs are trained at in a step, K = span.per_pair of each, the first drawn from
        its key and the others evenly spaced around the range from there."""

    @abstractmethod
    def possible_timesteps(self, span: Timesteps) -> Levels:
        """(K, L): all columns that `draw_timesteps` may give, equally probable; enough of them on a continuous path."""

    def visited_levels(self, t: Levels, steps: int, grid: Grid) -> tuple[Levels, torch.Tensor, torch.Tensor]:
        """levels (M, K + 1) that samples visit on their way from `clean` to t (M,), how many steps each takes (M,), and
        the network's time at each level (M, K + 1). Levels past a sample's last step are padding."""
        self.check(t, steps)
        if grid == "spread":
            levels = self.own_levels(t, steps)
            return levels, torch.full((len(t),), steps), self.network_time(levels)
        if grid in ("exact", "snap"):
            # the global levels below t, then t itself
            t = self.snap(t, steps) if grid == "snap" else t
            levels = torch.minimum(self.global_levels(steps), t[:, None])
            return levels, (levels[:, :-1] < t[:, None]).sum(1), self.network_time(levels)
        raise ValueError(f"unknown inversion grid {grid!r}; one of {', '.join(self.grids)}")

    def snap(self, t: Levels, steps: int) -> Levels:
        """The global level at or above each t, same shape."""
        levels = self.global_levels(steps)
        return levels[torch.searchsorted(levels, t.to(levels.dtype))]


def target(x_t: torch.Tensor, x_0: torch.Tensor, a_t: torch.Tensor, s_t: torch.Tensor) -> torch.Tensor:
    """tau = (x_t - a_t x_0) / s_t, which equals (x_0(t) - x_0) / sigma_t + delta_t of Eq. 18.

    x_t, x_0: (B, C, H, W); a_t, s_t: (B,). With a_t = 1 it is the mean velocity of a rectified flow's path.
    """
    return (x_t - per_image(a_t) * x_0) / per_image(s_t)


def velocity_target(x_t: torch.Tensor, x_0: torch.Tensor, a_t: torch.Tensor, s_t: torch.Tensor) -> torch.Tensor:
    """a_t tau - s_t x_0 = (a_t x_t - x_0) / s_t, what a v-model should say at x_t (arXiv 2202.00512); also for a_t = 0.

    Shapes as `target`. For paths with a^2 + s^2 = 1.
    """
    return (per_image(a_t) * x_t - x_0) / per_image(s_t)


def noised(x_0: torch.Tensor, tau: torch.Tensor, a_t: torch.Tensor, s_t: torch.Tensor) -> torch.Tensor:
    """x_t = a_t x_0 + s_t tau: the inverse of `target`."""
    return per_image(a_t) * x_0 + per_image(s_t) * tau


def per_image(c: torch.Tensor) -> torch.Tensor:
    """(B,) to (B, 1, 1, 1), to multiply images with."""
    return c[:, None, None, None]
