"""The noise path of DDPM's discrete levels: a = sqrt(abar_t), s = sqrt(1 - abar_t), abar diffusers' `alphas_cumprod`.

A level is an index into abar; `CLEAN` = -1 is the image itself, where abar = 1. Coefficients are computed in float64
from the fp32 table and rounded once to fp32: in bf16, abar[0] == abar[1] == 1 and the target divides by zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from inpo_fast.method.config import Grid, Timesteps
from inpo_fast.method.noise_path import NoisePath, per_image
from inpo_fast.runtime import keyed_rng

CLEAN = -1


@dataclass(frozen=True)
class DDPMPath(NoisePath):
    """abar: (T,) fp32, decreasing. first_abar: what diffusers' inverse scheduler takes for the clean image. output: v
    is a eps - s x_0 (arXiv 2202.00512)."""

    abar: torch.Tensor
    first_abar: float = 1.0
    steps_offset: int = 1
    output: Literal["epsilon", "v"] = "epsilon"

    clean = CLEAN
    grids = get_args(Grid)

    @classmethod
    def of(cls, scheduler) -> "DDPMPath":
        """That of a diffusers scheduler with `alphas_cumprod`."""
        abar, config = scheduler.alphas_cumprod.float().cpu(), scheduler.config
        return cls(
            abar,
            first_abar=1.0 if config.get("set_alpha_to_one", True) else float(abar[0]),
            steps_offset=int(config.get("steps_offset", 0)),
            output="v" if config.get("prediction_type") == "v_prediction" else "epsilon",
        )

    @property
    def T(self) -> int:
        return len(self.abar)

    @property
    def implicit_steps(self) -> bool:
        """v becomes noise with the coefficients of the level that it was predicted at."""
        return self.output == "epsilon"

    @property
    def identity(self) -> str:
        return repr((self.abar.tolist(), self.first_abar, self.steps_offset))

    def check(self, t: torch.Tensor, steps: int) -> None:
        T = self.T
        if not 1 <= steps <= T:
            raise ValueError(f"inversion steps must be in 1..{T}, got {steps}")
        if t.dtype != torch.int64 or t.ndim != 1 or (len(t) and not (int(t.min()) >= 0 and int(t.max()) < T)):
            raise ValueError(f"t must be int64 (M,) in 0..{T - 1}, got {t.dtype} {tuple(t.shape)}")

    def a_s(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        abar = self._abar(t)
        return abar.sqrt().float(), (1 - abar).sqrt().float()

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        return t.clamp_min(0)  # the image has the first level's

    def global_levels(self, steps: int) -> torch.Tensor:
        """T/n, 2T/n, ... T, less one, because the clean image is number 0."""
        return torch.arange(steps + 1) * self.T // steps - 1

    def own_levels(self, t: torch.Tensor, steps: int) -> torch.Tensor:
        """round(t k / n), halves up."""
        levels = (2 * t[:, None] * torch.arange(steps + 1) + steps) // (2 * steps)
        levels[:, 0] = CLEAN
        return levels

    def all_levels(self, steps: int) -> torch.Tensor:
        return torch.arange(self.T)

    def visited_levels(
        self, t: torch.Tensor, steps: int, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The published script's grids walk scheduler.timesteps while they are < t; each step goes T // n up in
        diffusers 0.20 and comes from T // n below in >= 0.22. It lands on t at one t of T // n only."""
        if grid not in ("diffusers-0.20", "diffusers-0.22"):
            return super().visited_levels(t, steps, grid)
        self.check(t, steps)
        stride = self.T // steps
        marks = torch.arange(steps) * stride + self.steps_offset
        levels = torch.cat([torch.tensor([CLEAN]), marks])
        times = self.network_time(levels)
        if grid == "diffusers-0.20":
            walked = marks - stride  # -99, 1, ... 801
            times[0] = walked[0]
        else:
            walked = marks  # 1, 101, ... 901
        return levels.expand(len(t), -1), (walked < t[:, None]).sum(1), times.expand(len(t), -1)

    def step_coefficients(self, levels: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        abar = self._abar(levels, self.first_abar if grid.startswith("diffusers-") else 1.0)
        source, target = abar[:, :-1], abar[:, 1:]
        p = (target / source).sqrt()
        q = (1 - target).sqrt() - (1 - source).sqrt() * p
        sigma = ((1 - source) / (1 - target).clamp_min(1e-12) * (1 - target / source)).clamp_min(0).sqrt()
        if self.output == "v":  # eps = a v + s x
            p, q = p + q * (1 - source).sqrt(), q * source.sqrt()
        return p, q, sigma

    def noise_from_output(
        self, output: torch.Tensor, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor
    ) -> torch.Tensor:
        """The output itself, or a v + s x in fp32 (arXiv 2202.00512, appendix D)."""
        return output if self.output == "epsilon" else per_image(a) * output.float() + per_image(s) * x

    def part(self, t: torch.Tensor, parts: int) -> torch.Tensor:
        return t * parts // self.T

    def draw_timesteps(self, span: Timesteps, keys: Sequence[keyed_rng.Key]) -> torch.Tensor:
        first = torch.tensor([keyed_rng.integer(span.min, span.max, *key) for key in keys], dtype=torch.int64)
        return systematic_timesteps(first, span.min, span.max, span.per_pair)

    def possible_timesteps(self, span: Timesteps) -> torch.Tensor:
        return systematic_timesteps(torch.arange(span.min, span.max + 1), span.min, span.max, span.per_pair)

    def _abar(self, levels: torch.Tensor, clean: float = 1.0) -> torch.Tensor:
        """float64, same shape; the clean image is appended, so that index -1 finds it."""
        return torch.cat([self.abar.double(), torch.tensor([clean], dtype=torch.float64)])[levels]


def systematic_timesteps(first: torch.Tensor, low: int, high: int, count: int) -> torch.Tensor:
    """(count, N) int64: the given timesteps (N,) and count - 1 more of each, at equal distances round from high to low.

    Where the first is uniform on low..high each of the others is too, and together they are in as many equal parts of
    the range (systematic sampling): their mean of a function of t is unbiased, and varies less than that of as many
    independent ones where the function is smooth.
    """
    width = high - low + 1
    return low + (first - low + torch.arange(count)[:, None] * width // count) % width
