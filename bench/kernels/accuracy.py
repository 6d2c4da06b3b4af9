"""Each op's error against float64, beside that of eager torch at the same dtypes: a table for docs/kernels.md.

    python -m bench.kernels.accuracy [--file docs/kernels.md]

Over the tiny cases of bench/kernels/bench_*.py, on the CPU in Triton's interpreter or on the GPU there is.
"""

import argparse
from pathlib import Path

import torch

from bench import interpreter, results  # interpreter first: before anything imports triton
from bench.kernels.case import Case, all_cases, check, provide
from bench.report import write_between

CUDA = interpreter.CUDA
TRUNCATED = (
    " The interpreter truncates what it stores in bf16, up to one ulp; compiled kernels round to nearest, half of that."
)
HEAD = ("kernel", "op", "dtype", "ours, largest", "ours, rms", "eager, largest", "eager, rms")


def measured(case: Case, provider: str) -> tuple[float, float]:
    """(largest, rms) over all results of a case; AssertionError where that is more than it allows."""
    return check(case, provider, provide(case, provider), case.make("cuda" if CUDA else "cpu"))


def table(cases: list[Case]) -> str:
    rows: dict[tuple, list[torch.Tensor]] = {}
    for case in cases:
        name = (case.kernel, case.op, str(case.dtype).removeprefix("torch."))
        found = torch.tensor([*measured(case, "ours"), *measured(case, "eager")])
        rows[name] = torch.maximum(rows[name], found) if name in rows else found
    lines = [HEAD, ["---"] * len(HEAD), *([*name, *(f"{x:.1e}" for x in found)] for name, found in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=results.ROOT / "docs" / "kernels.md")
    arguments = parser.parse_args()
    if interpreter.BROKEN:
        parser.exit(2, f"bench.kernels.accuracy: {interpreter.BROKEN}\n")
    made = results.provenance()
    where = f"on {made['device']}" if CUDA else "in Triton's interpreter on the CPU"
    text = (
        f"`python -m bench.kernels.accuracy`, {where}, torch {made['torch']}, triton {made['triton']}. An element's "
        "error is relative to its own size or, where that is smaller, to the rms of its tensor; largest over elements, "
        f"results and shapes.{'' if CUDA else TRUNCATED}\n\n" + table([case for case in all_cases() if not case.real])
    )
    print(text)
    write_between(arguments.file, "accuracy", text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
