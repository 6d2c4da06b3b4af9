"""Which attention back end is fastest for each head size of SD1.5 and SDXL, forward and with its gradient.

    python -m bench.kernels.attention [--results FOLDER] [--images 16] [--tiny]

Every back end is compared with float64 first. Prints the table that inpo_fast/models/fast/attention.py keeps as
FASTEST: the one with the least total time over a UNet's shapes, where it beats torch's own choice by more than the
noise. Needs a GPU; --tiny tries the script on small shapes anywhere.
"""

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch

from bench import results
from bench.kernels.clock import median_ms
from inpo_fast.models.fast.attention import attend

BACKENDS = ("torch", "flash", "cudnn", "efficient", "xformers")
# (model, heads, size of a head, queries, keys, how often in a UNet)
SHAPES = [
    ("sd15", 8, 40, 4096, 4096, 5),
    ("sd15", 8, 40, 4096, 77, 5),
    ("sd15", 8, 80, 1024, 1024, 5),
    ("sd15", 8, 80, 1024, 77, 5),
    ("sd15", 8, 160, 256, 256, 5),
    ("sd15", 8, 160, 256, 77, 5),
    ("sd15", 8, 160, 64, 64, 1),
    ("sd15", 8, 160, 64, 77, 1),
    ("sdxl", 10, 64, 4096, 4096, 10),
    ("sdxl", 10, 64, 4096, 77, 10),
    ("sdxl", 20, 64, 1024, 1024, 60),
    ("sdxl", 20, 64, 1024, 77, 60),
]
TINY = [("tiny", 2, 40, 16, 16, 1), ("tiny", 2, 40, 16, 7, 2)]
GAIN = 0.98  # a back end must take at most this share of torch's time to be written into the table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--results", type=Path, help="folder for a JSON line per shape and back end")
    parser.add_argument("--tiny", action="store_true", help="small shapes; without a GPU torch's back end alone")
    asked = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not (cuda or asked.tiny):
        print("bench.kernels.attention: there is no CUDA device; --tiny tries the script")
        return 2
    device, totals = "cuda" if cuda else "cpu", defaultdict(float)
    major = torch.cuda.get_device_capability()[0] if cuda else 0
    broken: set[tuple[str, int]] = set()
    for model, heads, size, queries, keys, often in TINY if asked.tiny else SHAPES:
        for backend in BACKENDS if cuda else BACKENDS[:1]:
            try:
                line = measure(backend, asked.images, heads, size, queries, keys, device)
            except (ImportError, RuntimeError, NotImplementedError, ValueError) as problem:
                print(f"{model} {heads}x{size} {queries}x{keys} {backend}: {str(problem).splitlines()[0]}")
                broken.add((backend, size))
                continue
            print(f"{model} {heads}x{size} {queries}x{keys} {backend}: {line}", flush=True)
            totals[backend, size] += often * (line["forward_ms"] + line["both_ms"])
            if asked.results:
                identity = {"kernel": "attention", "op": model, "shape": f"{heads}x{size} {queries}x{keys}"}
                results.record(asked.results, identity | {"dtype": "bfloat16", "provider": backend} | line)
    chosen = {}
    for size in sorted({size for _, size in totals}):
        times = {name: ms for (name, s), ms in totals.items() if s == size and (name, s) not in broken}
        best = min(times, key=times.get, default="torch")
        if best != "torch" and times[best] < GAIN * times.get("torch", math.inf):
            chosen[major, size] = best
        print(f"head size {size}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in sorted(times.items())))
    print(f"FASTEST = {chosen}")
    return 0


def measure(backend: str, images: int, heads: int, size: int, queries: int, keys: int, device: str) -> dict[str, float]:
    """Median milliseconds of the forward pass and of forward and backward; ValueError when the values are wrong."""
    q, k, v = (
        torch.randn(images, n, heads, size, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (queries, keys, keys)
    )
    with torch.no_grad():
        wanted = attend(*(x[:1].double() for x in (q, k, v)), "torch")
        off = ((attend(q[:1], k[:1], v[:1], backend).double() - wanted).norm() / wanted.norm()).item()
    if not off < 2.0**-6:  # bf16 keeps 8 bits of each factor and of the result
        raise ValueError(f"{off:.1e} from float64")
    weight = torch.randn_like(q)

    def both() -> None:
        torch.autograd.grad(attend(q, k, v, backend), (q, k, v), weight)

    with torch.no_grad():
        forward = median_ms(lambda: attend(q, k, v, backend), 5, 20, device)
    return {"forward_ms": round(forward, 4), "both_ms": round(median_ms(both, 5, 20, device), 4), "error": off}


if __name__ == "__main__":
    sys.exit(main())
