"""What a person sees while training: a bar on a terminal, a line now and then in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LOG_SECONDS = 15.0  # between lines when the output is not a terminal


class StepProgress:
    """Context manager; `step` after each optimizer step, `say` for a message above the bar."""

    def __init__(self, console: Console, steps: int, done: int, variant: str, shown: bool):
        self.console, self.steps, self.done, self.shown = console, steps, done, shown
        # fits 80 columns: name, bar, steps, time left, and the note
        self.bar = Progress(
            TextColumn(variant, markup=False),
            BarColumn(bar_width=10),
            TextColumn("{task.completed}/{task.total} eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self.task = self.bar.add_task("", total=steps, completed=done, note="")
        self.begun, self.first, self.printed = time.monotonic(), done, float("-inf")

    def __enter__(self) -> "StepProgress":
        self.bar.start()
        return self

    def __exit__(self, *_exception) -> None:
        self.bar.stop()

    def step(self, values: dict[str, float]) -> None:
        self.done += 1
        note = f"loss {values['loss']:.4f}"
        if "margin" in values:
            note += f" margin {values['margin']:+.2f}"
        note += f" {values['pairs_per_second']:.1f} pairs/s"
        self.bar.update(self.task, advance=1, note=note)
        now = time.monotonic()
        if (
            self.shown
            and not self.console.is_terminal
            and (now - self.printed >= LOG_SECONDS or self.done == self.steps)
        ):
            self.printed = now
            left = (now - self.begun) / (self.done - self.first) * (self.steps - self.done)
            self.console.print(
                f"step {self.done}/{self.steps}  {note}  eta {left:.0f} s", highlight=False, soft_wrap=True
            )

    def draw(self, drawn: int, wanted: int) -> None:
        """Pictures of a round of online training."""
        self.bar.update(self.task, note=f"drawing {drawn}/{wanted} pictures")
        now = time.monotonic()
        if self.shown and not self.console.is_terminal and now - self.printed >= LOG_SECONDS:
            self.printed = now
            self.console.print(
                f"step {self.done}/{self.steps}  drawing {drawn}/{wanted} pictures", highlight=False, soft_wrap=True
            )

    def say(self, message: str) -> None:
        if self.shown:
            self.bar.console.print(message, style="yellow", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def picture_progress(total: int, verb: str, shown: bool = True) -> Iterator[Callable[[int, str], None]]:
    """A bar over pictures that are drawn; gives advance(number, of which model)."""
    columns = (
        TextColumn(verb + " {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} pictures"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda number, name: bar.update(task, advance=number, description=name)
