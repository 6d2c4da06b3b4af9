"""TensorBoard, when it is installed, and Weights & Biases, when a project is named. metrics.jsonl is always written."""

import sys
import threading
import uuid
from pathlib import Path

import numpy as np

from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import write_text
from inpo_fast.runtime.masking import masked, masked_tree

AXES = {
    "loss": "loss",
    "seconds": "speed",
    "pairs_per_second": "speed",
    "unet_evaluations": "speed",
    "trajectories_hit": "speed",
    "lr": "optim",
    "grad_norm": "optim",
}


class Tracker:
    """Scalars and pictures under <run>/tensorboard, which is left out where tensorboard cannot be imported.

    wandb: project of Weights & Biases; a continued run continues there too. config: what it is shown with.
    """

    def __init__(self, folder: Path, done: int, wandb: str | None = None, config: dict | None = None):
        self.wandb = None if wandb is None else _start_wandb(folder.parent, done, wandb, config or {})
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder), purge_step=done + 1)
            threading.excepthook, self._hook = self._without_its_own, threading.excepthook

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(_path(name), value, step)
        if self.wandb is not None:
            self.wandb.log({_path(name): value for name, value in values.items()}, step=step)

    def picture(self, step: int, pixels: np.ndarray) -> None:
        """pixels: (H, W, 3) uint8. Before the metrics of the same step."""
        if self.writer is not None:
            self.writer.add_image("images/fixed prompts", pixels, step, dataformats="HWC")
        if self.wandb is not None:
            import wandb

            self.wandb.log({"images/fixed prompts": wandb.Image(pixels)}, step=step)

    def _without_its_own(self, failed: threading.ExceptHookArgs) -> None:
        """A full disk stops TensorBoard's thread, which prints a traceback, and then the next `write`, which tells."""
        if not (isinstance(failed.exc_value, OSError) and "tensorboard" in type(failed.thread).__module__):
            self._hook(failed)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            threading.excepthook = self._hook
        if self.wandb is not None:
            self.wandb.finish()


def _path(name: str) -> str:
    if name.startswith("held_out_"):
        return f"held out/{name.removeprefix('held_out_')}"
    return f"{AXES.get(name, 'preference')}/{name}"


def _start_wandb(folder: Path, done: int, project: str, config: dict):
    """Its id stands in <run>/wandb-id: a run that is continued is one run there too."""
    try:
        import wandb
    except ImportError as problem:
        raise UserError(
            f"observe.wandb={project} needs Weights & Biases ({problem}): pip install inpo-fast[trackers]"
        ) from problem
    place = folder / "wandb-id"
    if not (done and place.exists()):
        write_text(place, uuid.uuid4().hex)
    known = place.read_text(encoding="utf-8").strip()
    shown, words = masked_tree(config), sys.argv
    try:
        sys.argv = [masked(word) for word in words]  # it keeps the command line too
        return wandb.init(project=project, dir=str(folder), id=known, resume="allow", name=folder.name, config=shown)
    except Exception as problem:  # its own kinds: no key, no network
        line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise UserError(f"observe.wandb={project}: {line}; WANDB_MODE=offline keeps everything here") from problem
    finally:
        sys.argv = words
