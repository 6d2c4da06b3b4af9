"""Looks at preference pairs before anybody spends GPU-hours on them.

    python -m inpo_fast.validate --source PATH [--sheet pairs.png] [--json FILE] [--limit N]
    python -m inpo_fast.validate --config configs/sd15.yaml --source PATH [--data.filters.min_side=512 …]

Reads and decodes pairs as the trainer would: counts, ties, what each filter leaves out, broken images, sizes, duplicate
prompts and images, pairs whose images are the same, how sure the labels are; a contact sheet of sample pairs; how fast
they can be read. What is judged is what the filters leave.
Exit status: 0 fit to train on, 1 not fit, 2 the source cannot be opened, or the filters leave nothing.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from inpo_fast.data.config import Format
from inpo_fast.runtime.arguments import whole
from inpo_fast.runtime.errors import UserError, command_line, run_command
from inpo_fast.runtime.outputs import check_file

PROGRAM = "python -m inpo_fast.validate"


def main() -> None:
    from inpo_fast.config import parse

    parser = command_line(
        PROGRAM,
        __doc__,
        epilog="All keys of the trainer's configuration may follow, data.filters too: python -m inpo_fast.train --help",
    )
    parser.add_argument("--source", help="as data.source of the trainer, and in its place")
    parser.add_argument("--format", choices=get_args(Format), help="as data.format of the trainer")
    parser.add_argument("--images", help="as data.images of the trainer")
    parser.add_argument("--resolution", type=whole(most=16_384), help="default: data.resolution, or 512")
    parser.add_argument("--pairs-per-step", type=whole(most=1_000_000), help="default: train.pairs_per_step")
    parser.add_argument("--limit", type=whole(), help="look at so many pairs, in training order; default: at all")
    parser.add_argument("--workers", type=whole(most=1024), help="threads that decode (default: data.workers)")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of sample pairs there (PNG)")
    parser.add_argument("--json", type=Path, help="write the findings there")
    own, rest = parser.parse_known_args()
    for option, path, ending in (("--sheet", own.sheet, ".png"), ("--json", own.json, ".json")):
        if path is not None:
            check_file(option, path, (ending,))
    run = parse(PROGRAM, rest)
    given = {name: getattr(own, name) for name in ("source", "format", "images", "workers")}
    config = replace(run.data, **{name: value for name, value in given.items() if value is not None})
    if not config.source:
        raise UserError("no source: give --source PATH, or a --config that names data.source")
    from rich.console import Console
    from rich.progress import Progress

    from inpo_fast.data.contact_sheet import contact_sheet
    from inpo_fast.data.examine import examine, show
    from inpo_fast.data.loader import open_data
    from inpo_fast.runtime.files import write_bytes, write_text
    from inpo_fast.runtime.masking import masked_tree

    source = open_data(config)
    console = Console()
    with Progress(disable=not console.is_terminal) as bar:
        task = bar.add_task("look at pairs", total=min(own.limit or len(source), len(source)))
        found, samples = examine(
            source,
            config.source,
            config,
            resolution=own.resolution or config.resolution or 512,
            limit=own.limit,
            advance=lambda: bar.update(task, advance=1),
        )
    show(found, console, own.pairs_per_step or run.train.pairs_per_step)
    if own.sheet and samples:
        own.sheet.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(own.sheet, contact_sheet(samples, config.max_pixels))
        console.print(f"sample pairs: {own.sheet}", highlight=False, markup=False)
    if own.json:
        own.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(own.json, json.dumps(masked_tree(asdict(found)), indent=1))
    sys.exit(1 if found.problems else 0)


if __name__ == "__main__":
    run_command(PROGRAM, main)
