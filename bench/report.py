"""The benchmarks' results as tables, printed and written into README.md, each between two markers.

    python -m bench.report [--results FOLDER] [--file README.md]

Without the markers, or without a GPU's results of the kernels, it says so.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import results

NOT_MEASURED = "The kernels are **not measured on a GPU**."
PROVIDERS = ("eager", "torch.compile", "ours")


def table(lines: list[dict]) -> str:
    """Markdown: for each GPU the newest result of every case and provider. Results of the CPU are left out."""
    found = list(results.newest([x for x in lines if x["gpu"] and "p50_ms" in x]).values())
    devices = sorted({line["device"] for line in found})
    return "\n\n".join(_of_device([x for x in found if x["device"] == name]) for name in devices) or NOT_MEASURED


def steps_table(lines: list[dict]) -> str:
    """Markdown: the newest optimizer step of every model, machine, contender and size."""
    head = ("model", "machine", "what ran", "pairs/s", "against", "recipe, GPU-hours", "peak", "waits")
    rows = [head, ["---"] * len(head)]
    for x in newest_steps([line for line in lines if line["kernel"] == "train_step"]):
        commit = f"{x['commit']}{' with changes' if x['dirty'] else ''}"
        what = f"{x['op']}, {x['shape']}, {x['dtype']}, {x['pairs']} pairs, micro-batch {x['micro_batch']}, {commit}"
        machine = x["device"] if x["gpu"] else f"{x['device']}, {x['threads']} threads"
        if x.get("out_of_memory"):
            rows.append((what, machine, x["provider"], "**out of memory**", *"----"))
            continue
        rate, ratio, hours = f"{x['pairs_s']:.3g}", "1", f"{x['gpu_hours_recipe']:.2f}"
        if x["provider"] != x["against"]:
            low, high = x["ratio_range"]
            ratio = f"**{x['ratio']:.2f}x** {x['against']} ({low:.2f} to {high:.2f})"
        who = x["provider"]
        if is_off(x):
            who = f"{who}, **gradient off by {x['gradient_error']:.2g}, allowed {x['gradient_allowed']:g}**"
            rate, ratio, hours = (f"**not valid** ({text.replace('*', '')})" for text in (rate, ratio, hours))
        gpu = (hours, f"{x['peak_memory'] / 2**30:.1f} GiB", f"{x['host_waits']}") if x["gpu"] else "---"
        rows.append((what, machine, who, rate, ratio, *gpu))
    return markdown(rows)


def newest_steps(lines: list[dict]) -> list[dict]:
    """Of lines of bench.step, the last of each setting; runs of other sizes, or beside another first contender,
    are told apart."""
    names = ("op", "device", "shape", "dtype", "pairs", "micro_batch", "against", "provider")
    found = {tuple(str(line[name]) for name in names): line for line in lines}
    return [line for _, line in sorted(found.items())]


def is_off(line: dict) -> bool:
    """Lines of old, which compared before they timed, have no such field."""
    return line.get("gradient_error") is not None and not line["gradient_error"] < line["gradient_allowed"]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _of_device(lines: list[dict]) -> str:
    cases: dict[tuple, dict[str, dict]] = {}
    for line in lines:
        case = (line["kernel"], line["op"], line["shape"], line["dtype"])
        cases.setdefault(case, {})[line["provider"]] = line
    head = ("kernel", "op", "shape", "dtype", *(f"{p}, ms" for p in PROVIDERS), "compile / ours", "ours", "of ceiling")
    rows = [head, ["---"] * len(head)]
    for case, by in sorted(cases.items()):
        ours, compiled = by.get("ours"), by.get("torch.compile")
        times = [f"{by[p]['p50_ms']:.4g}" if p in by else "-" for p in PROVIDERS]
        ratio = f"{compiled['p50_ms'] / ours['p50_ms']:.2f}" if ours and compiled else "-"
        rate = share = "-"
        if ours:
            matmul = ours["ceiling"] == "matmul"
            rate = f"{ours['tflop_s']:.0f} TFLOP/s" if matmul else f"{ours['gb_s']:.0f} GB/s"
            share = f"{ours['share']:.0%}"
        rows.append([*case, *times, ratio, rate, share])
    seen = lambda name: ", ".join(sorted({str(line[name]) for line in lines}))  # noqa: E731
    commits = ", ".join(sorted({line["commit"] + (" with changes" if line["dirty"] else "") for line in lines}))
    ceilings = [f"{min(v):.0f} to {max(v):.0f}" for v in ([x[k] for x in lines] for k in _CEILINGS)]
    return (
        f"{markdown(rows)}\n\n"
        f"{seen('device')}, torch {seen('torch')}, triton {seen('triton')}, commit {commits}. Median time of "
        f"a call, {min(x['n'] for x in lines)} or more samples, CUDA-graph replay over rotated buffers; ceilings of "
        f"the same runs: device copy {ceilings[0]} GB/s, bf16 matmul {ceilings[1]} TFLOP/s. "
        "`pytest bench --benchmark-only`"
    )


_CEILINGS = ("copy_gb_s", "matmul_tflop_s")


def write_between(path: Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- NAME:begin --> and <!-- NAME:end -->; says so where they are missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = path.read_text() if path.exists() else ""
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        print(f"{path.name} has no lines {begin} and {end} (once each, in this order): nothing written there")
        return
    path.write_text(f"{old[: old.index(begin)]}{begin}\n{text}\n{old[old.index(end) :]}")
    print(f"written to {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder with JSON lines")
    parser.add_argument("--file", type=Path, default=results.ROOT / "README.md")
    arguments = parser.parse_args()
    lines = results.load(arguments.results)
    for name, text in (("bench", table(lines)), ("steps", steps_table(lines))):
        print(text)
        write_between(arguments.file, name, text)


if __name__ == "__main__":
    main()
