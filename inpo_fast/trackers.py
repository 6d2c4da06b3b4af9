"""TensorBoard, when it is installed. metrics.jsonl is always written and needs nothing."""

from pathlib import Path

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
    """Scalars under <run>/tensorboard; does nothing where tensorboard cannot be imported."""

    def __init__(self, folder: Path, done: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{AXES.get(name, 'preference')}/{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
