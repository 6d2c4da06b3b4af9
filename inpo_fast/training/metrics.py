"""Sums of what a step observes, kept on the device; one reduction and one copy to the host per step."""

import codecs
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import parse_json, write_text

BUCKETS = 5  # of timesteps, equal in width


class MetricAccumulator:
    """Named (sum, count) cells. `reduce` adds them up over processes; `values` reads the means."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cells: dict[str, torch.Tensor] = {}  # (2,) float64: sum and count
        for name in NAMES:
            self.cells[name] = torch.zeros(2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, name: str, value: torch.Tensor | float, total: bool = False) -> None:
        """Adds all elements of a tensor, or one number, to a mean; total=True adds a number to a total instead."""
        cell = self.cells[name]
        if total:
            cell[0] += float(value)
        elif not isinstance(value, torch.Tensor):
            cell += torch.tensor([value, 1.0], dtype=torch.float64).to(cell.device, non_blocking=True)
        else:
            cell[0] += value.detach().double().sum()
            cell[1] += value.numel()

    def put(self, name: str, value: torch.Tensor) -> None:
        """A value that is already the same on all processes."""
        self.cells[name] = torch.stack([value.detach().double(), torch.ones_like(value, dtype=torch.float64)])

    def count(self, name: str) -> torch.Tensor:
        return self.cells[name][1]

    @torch.no_grad()
    def add_micro_batch(self, *, loss, logit, image, tau_rms, bucket, sides, contrast) -> None:
        """Everything worth watching of a micro-batch of B pairs; images are (S B), winners first.

        image: (S B, 7), the means over elements that `inpo_kernels.inpo_loss.COLUMNS` names. tau_rms: (S B,).
        bucket: (B,) int64, which of BUCKETS parts of the noise path the pair's timestep lies in.
        eps_scale is <eps_theta, eps_ref> / <eps_ref, eps_ref>; tau_residual is the same of tau - eps_ref, for
        winners and losers apart: where they differ the loss rewards changing the amplitude of the noise.
        """
        self.add("loss", loss)
        if contrast:
            self.add("implicit_accuracy", (logit > 0).double() + 0.5 * (logit == 0).double())
            self.add("margin", logit)
            self._by_level("margin", logit.detach(), bucket)
        e, r, _, energy, pred_ref, tau_ref, _ = image.unbind(1)
        along = (tau_ref - energy) / energy
        for number, side in enumerate(("winner", "loser")[:sides]):
            part = slice(number * len(loss), (number + 1) * len(loss))
            self.add(f"{side}_delta", e[part] - r[part])
            self._by_level(f"{side}_delta", e[part] - r[part], bucket)
            self.add(f"{side}_error", e[part])
            self.add(f"tau_rms_{side}", tau_rms[part])
            self.add(f"tau_residual_{side}", along[part])
        self.add("eps_scale", pred_ref / energy)

    def _by_level(self, name: str, value: torch.Tensor, bucket: torch.Tensor) -> None:
        """value, bucket: (B,). Masks: picking elements out would make the host wait."""
        value = value.double()
        for b in range(BUCKETS):
            chosen = bucket == b
            self.cells[f"{name}_t{b}"] += torch.stack([torch.where(chosen, value, 0.0).sum(), chosen.double().sum()])

    def reduce(self) -> None:
        names = sorted(self.cells)
        flat = torch.stack([self.cells[name] for name in names])
        distributed.sum_([flat], "metrics")
        self.cells = dict(zip(names, flat, strict=True))

    def values(self) -> dict[str, float]:
        """The means and totals that were observed. Copies to the host: the step's one sync."""
        names = sorted(self.cells)
        table = torch.stack([self.cells[name] for name in names]).tolist()
        out = {}
        for name, (total, count) in zip(names, table, strict=True):
            if name in TOTALS:
                out[name] = total
            elif count:
                out[name] = total / count
        return out


TOTALS = ("unet_evaluations",)
NAMES = (
    "loss",
    "implicit_accuracy",
    "margin",
    *(f"{name}_t{b}" for name in ("margin", "winner_delta", "loser_delta") for b in range(BUCKETS)),
    "winner_delta",
    "loser_delta",
    "winner_error",
    "loser_error",
    "tau_rms_winner",
    "tau_rms_loser",
    "tau_residual_winner",
    "tau_residual_loser",
    "eps_scale",
    "loser_gate",
    "reference_point",
    "slot_utilisation",
    "grad_norm",
    "trajectories_hit",
    *TOTALS,
)  # fixed, so that processes without a usable pair reduce the same table


class MetricsFile:
    """metrics.jsonl: one object a step. A resumed run drops the lines past its checkpoint.

    foreign: lines that no run wrote, which are dropped too; the last one, cut short by a crash, is not counted.
    """

    def __init__(self, path: Path, keep_steps: int = 0):
        """UserError where something else than a file is in its place."""
        try:
            before = path.read_bytes() if path.exists() else b""
        except OSError as problem:
            raise UserError(f"{path} cannot be read ({problem.strerror}); move it away and repeat") from problem
        kept, self.foreign = _own_lines(before, keep_steps)
        self.path, content = path, "".join(f"{line}\n" for line in kept)
        if content.encode() != before:
            write_text(path, content)  # in one go: a kill in between must not lose the lines of earlier steps
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **_finite(values)}) + "\n")
        self.file.flush()

    def rewrite(self, step: int, change: Callable[[dict], dict]) -> None:
        """Another line in the place of that step's, if there is one: change(values of the old one)."""
        lines = self.path.read_text(encoding="utf-8").split("\n")
        changed = [self._changed(line, step, change) for line in lines]
        if changed != lines:
            self.file.close()
            write_text(self.path, "\n".join(changed))
            self.file = self.path.open("a", encoding="utf-8")

    def values(self, step: int) -> dict:
        """What was written of a step before this start; empty where nothing was."""
        rows = [parse_json(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]
        return next((row for row in rows if row["step"] == step), {})

    @staticmethod
    def _changed(line: str, step: int, change: Callable[[dict], dict]) -> str:
        values = parse_json(line) if line else {}
        if values.pop("step", None) != step:
            return line
        return json.dumps({"step": step, **_finite(change(values))})

    def close(self) -> None:
        self.file.close()


def _finite(values: dict) -> dict:
    return {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}


def _own_lines(content: bytes, last: int) -> tuple[list[str], int]:
    """Of a metrics.jsonl, whatever was done to it: the lines of steps 1 to `last`, and how many lines no run wrote."""
    kept, foreign = [], 0
    if content[:4] in (codecs.BOM_UTF16_LE + b"{\0", codecs.BOM_UTF16_BE + b"\0{"):  # saved by an editor or a shell
        content = content.decode("utf-16", errors="replace").encode()
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, raw in enumerate(lines):
        line, is_cut = raw.strip(), False
        try:
            row = parse_json(line.decode("utf-8"))
            step = row.get("step") if isinstance(row, dict) else None
        except (ValueError, RecursionError):
            step, is_cut = None, number == len(lines) - 1
        if type(step) is int and step >= 1:
            if step <= last:
                kept.append(line.decode("utf-8"))
        elif line and not is_cut:
            foreign += 1
    return kept, foreign
