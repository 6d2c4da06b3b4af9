"""Where the time of a step goes, and how far each part is from the least it could take.

    python -m inpo_fast.profile --config configs/sd15.yaml [--ceiling 790] [--copy-ceiling 4.3] [--price 2.5]
                                [--json FILE] [--trace FILE]
    python -m inpo_fast.profile --config configs/sd15.yaml --dry-run      # work and lower bounds; no weights, no GPU

Runs a few steps of the recipe, on its pairs or, without data.source, on random pictures, and times the phases of a
step: data, encode, invert, reference, forward, backward, optimizer. Work is counted from shapes (step_cost.py); the
floor of a phase is its matrix work at --ceiling, which is what the machine's own matrix product reaches, not the
datasheet's. The roofline adds, one after the other, the bytes of what no matrix product can do on the way, at
--copy-ceiling; the fused path's floor the bytes of all that models.fast=fused does beside its matrix products. Both:
step_cost.py, memory_traffic.py.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from inpo_fast.runtime.arguments import number, whole
from inpo_fast.runtime.errors import UserError, command_line, run_command
from inpo_fast.runtime.outputs import check_file


def main() -> None:
    from inpo_fast.config import parse

    parser = command_line(
        "python -m inpo_fast.profile",
        __doc__,
        epilog="All keys of the trainer's configuration may follow: python -m inpo_fast.train --help",
    )
    parser.add_argument(
        "--ceiling", type=number(above=0), default=790.0, help="TFLOP/s of a large bf16 matrix product (H200: 790)"
    )
    parser.add_argument(
        "--copy-ceiling", type=number(above=0), default=4.3, help="TB/s of a device copy, read + write (H200: 4.3)"
    )
    parser.add_argument("--price", type=number(least=0), help="of one GPU-hour, in any currency")
    parser.add_argument("--windows", type=whole(), default=3, help="timed steps, after one to warm up (default 3)")
    parser.add_argument("--pairs", type=whole(), help="pairs of a step; default: the recipe's, at most 128")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--trace", type=Path, help="write a chrome trace of the timed steps there")
    own, rest = parser.parse_known_args()
    for option, path in (("--json", own.json), ("--trace", own.trace)):
        if path is not None:
            check_file(option, path, (".json", ".gz") if option == "--trace" else (".json",))
            path.parent.mkdir(parents=True, exist_ok=True)
    config = parse("python -m inpo_fast.profile", rest)
    if config.inversion.cache is not None:
        raise UserError("inversion.cache: the profile knows uncached steps only; leave it out (and inversion.frozen)")
    from rich.console import Console

    from inpo_fast.cost.plan import make_plan
    from inpo_fast.cost.profiling import measure, show, summary
    from inpo_fast.models.loading import quiet_libraries
    from inpo_fast.runtime import distributed
    from inpo_fast.runtime.files import write_text

    quiet_libraries()
    console = Console()
    plan, measured = make_plan(config, 1), None
    if not config.dry_run:
        _, world, device = distributed.start()
        if world > 1:
            raise UserError("inpo_fast.profile times one GPU: start it without torchrun")
        if device.type != "cuda":
            console.print("[yellow]no GPU: the times below are the CPU's[/yellow]")
        pairs = own.pairs or min(config.train.pairs_per_step, 128)
        pairs -= pairs % min(pairs, config.train.micro_batch)
        measured = measure(config, device, own.windows, pairs, own.trace)
    result = summary(config, plan, own.ceiling, own.price, measured, own.copy_ceiling)
    result |= {"command": " ".join(["python -m inpo_fast.profile", *sys.argv[1:]]), "plan": asdict(plan)}
    show(result, console)
    if own.json:
        write_text(own.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    run_command("python -m inpo_fast.profile", main)
