"""Names for the parts of a step, for a stopwatch and torch's profiler. Where nobody watches they cost nothing."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

NAMES = ("data", "encode", "invert", "reference", "forward", "backward", "optimizer")
_watch: "Stopwatch | None" = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The block is one of NAMES while a stopwatch runs."""
    if _watch is None:
        yield
        return
    with record_function(name), _watch.timing(name):
        yield


class Stopwatch:
    """Seconds by phase. On a GPU by events in the stream, read once at the end: no phase waits for another."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: dict[str, list[tuple]] = defaultdict(list)

    @contextmanager
    def running(self) -> Iterator["Stopwatch"]:
        global _watch
        before, _watch = _watch, self
        try:
            yield self
        finally:
            _watch = before

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        begin = self._now()
        try:
            yield
        finally:
            self.spans[name].append((begin, self._now()))

    def seconds(self) -> dict[str, float]:
        """Sums since the last call, which start anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            out = {k: sum(a.elapsed_time(b) for a, b in spans) / 1000 for k, spans in self.spans.items()}
        else:
            out = {k: sum(b - a for a, b in spans) for k, spans in self.spans.items()}
        self.spans.clear()
        return out

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
