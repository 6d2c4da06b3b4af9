"""A grid of settings on the pocket world, several training seeds each, as a table with intervals and a plot.

    python -m bench.study scan                                      a preset; --list names them
    python -m bench.study mine --grid method=inpo,dpo --grid objective.beta=1000,2000 --set train.steps=20 --seeds 3
    python -m bench.study mine … --split tuning                     choose settings here, report on the other split

Any keys of the configuration, over configs/pocket.yaml. One file per setting and seed in FOLDER/runs, written
whole and shared by all studies: an interrupted one goes on, more seeds add to it. Processes with one thread each share
the work. The table and the plot are in FOLDER/NAME. With --folder bench/results/study the tables of docs/study.md are
made from the results that are kept there.
"""

import importlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from bench.results import ROOT
from bench.study import made_pairs, plot, table
from bench.study.cells import SPLITS, Cell, Study, config_of, grid, result_name
from bench.study.presets import PRESETS
from inpo_fast.runtime.errors import UserError, command_line
from inpo_fast.runtime.files import write_text

FOLDER = ROOT / "build" / "study"
CONTROL = 1.01
KINDS = {
    "train": "bench.study.train",
    "reconstruct": "bench.study.reconstruct",
    "landscape": "bench.study.landscape",
    "leak": "bench.study.leak",
}


def main() -> None:
    parser = command_line("python -m bench.study", __doc__)
    parser.add_argument("name", nargs="?", help=f"a preset ({', '.join(PRESETS)}) or, with --grid, any name")
    parser.add_argument("--list", action="store_true", help="the presets with their cells, and stop")
    parser.add_argument("--grid", action="append", default=[], help="KEY=VALUE,VALUE…; may be given again")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE for all cells; may be given again")
    parser.add_argument("--seeds", type=int, help="training seeds 0, 1 …; default: the preset's, else 1")
    parser.add_argument("--split", choices=SPLITS, help="of the held-out prompts; default: reporting")
    parser.add_argument("--pictures", type=int, help="of each prompt; default: the preset's, else 2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one for each core")
    parser.add_argument("--show", action="store_true", help="the table of what is there, without making what is not")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: build/study")
    asked = parser.parse_args()
    os.chdir(ROOT)  # the recipe's paths are the repository's
    if asked.list or not asked.name:
        for study in PRESETS.values():
            print(f"{study.name}: {len(study.cells)} cells x {len(study.seeds)} seeds; {study.cells[0].name} …")
        return
    study = study_of(asked)
    folder = asked.folder.absolute() / study.name
    runs = asked.folder.absolute() / "runs"
    results = there(study, runs) if asked.show else run(study, runs, asked.jobs)
    if not results:
        raise UserError(f"{runs}: nothing of {study.name} is there yet; without --show it is made")
    title = f"{study.name}, {study.split} prompts; raw results beside this file; {' '.join(_words(asked))}"
    print(f"\n{write(folder, results, study, title)}\n{folder / 'table.md'}, {folder / 'plot.svg'}")


def write(folder: Path, results: list[dict], study: Study, title: str) -> str:
    """table.md and plot.svg into the folder; the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = table.table(results, study.kind, study.against)
    write_text(folder / "table.md", f"{title}\n\n{text}")
    plot.plot(results, study.kind, folder / "plot.svg")
    return text


def _words(asked) -> list[str]:
    more = [f"--grid {axis}" for axis in asked.grid] + [f"--set {pair}" for pair in asked.set]
    return [f"python -m bench.study {asked.name}", *more]


def study_of(asked) -> Study:
    """The command line as a study. UserError before anything runs."""
    axes = dict(_pair(text, "--grid") for text in asked.grid)
    if axes:
        study = Study(asked.name, grid({key: values.split(",") for key, values in axes.items()}))
    elif asked.name in PRESETS:
        study = PRESETS[asked.name]
    else:
        raise UserError(f"{asked.name} is no preset; take one of {', '.join(PRESETS)}, or give --grid KEY=VALUE,VALUE")
    for name in ("seeds", "pictures", "jobs"):
        if (number := getattr(asked, name)) is not None and number < 1:
            raise UserError(f"--{name} {number}: must be at least 1")
    shared = (*study.shared, *(_pair(text, "--set") for text in asked.set))
    study = replace(study, shared=shared, pictures=asked.pictures or study.pictures, split=asked.split or study.split)
    study = study if asked.seeds is None else replace(study, seeds=tuple(range(asked.seeds)))
    sources = {config_of(study, cell, 0).data.source for cell in study.cells}
    if study.kind == "leak":
        sources.add(str(made_pairs.ABOVE))
    if not asked.show:
        made_pairs.make({source for source in sources if source})
    return study


def _pair(text: str, option: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not (found and key and value):
        raise UserError(f"{option} {text}: write KEY=VALUE")
    return key, value


def processes(jobs: int) -> Executor:
    context = multiprocessing.get_context("spawn")  # a forked process has torch's threads in an unknown state
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))


def run(
    study: Study,
    runs: Path,
    jobs: int,
    work: Callable | None = None,
    show: Callable = print,
    pool: Callable[[int], Executor] = processes,
) -> list[dict]:
    """All results of the study's cells; makes those that are not in `runs`. UserError, after all others are done, where
    some failed.

    work(study, cell, seed) makes one; cell None is the negative control.
    """
    runs.mkdir(parents=True, exist_ok=True)
    work, wanted = work or run_one, wanted_of(study, runs)
    missing = list({path: (path, cell, seed) for path, cell, seed in wanted if _read(path) is None}.values())
    show(f"{study.name}: {len(wanted)} results, {len(wanted) - len(missing)} are there")
    failed, begun = [], time.monotonic()
    if missing:
        with pool(min(jobs, len(missing))) as workers:
            futures = {workers.submit(work, study, cell, seed): path for path, cell, seed in missing}
            for done, future in enumerate(as_completed(futures), 1):
                path = futures[future]
                if future.exception() is not None:
                    failed.append(f"{path.stem}: {future.exception()}")
                else:
                    write_text(path, json.dumps(future.result()))
                left = (time.monotonic() - begun) / done * (len(missing) - done)
                show(f"{done}/{len(missing)} {path.stem}{' FAILED' if future.exception() else ''}, ETA {left:.0f} s")
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} cells failed; the same command tries them again. {failed[0]}")
    return there(study, runs)


def there(study: Study, runs: Path) -> list[dict]:
    """Those results of the study's cells that are in the folder."""
    found = [(_read(path), cell) for path, cell, _ in wanted_of(study, runs)]
    return [
        {"cell": result["control"] if cell is None else cell.name, **result}
        for result, cell in found
        if result is not None
    ]


def wanted_of(study: Study, runs: Path) -> list[tuple[Path, Cell | None, int]]:
    """Which result is made by which cell and seed; seeds outermost, so that all cells have a first one soon."""
    control = [(runs / f"control-{study.split}-{study.pictures}.json", None, 0)] if study.kind == "train" else []
    jobs = [(cell, seed) for seed in study.seeds for cell in study.cells]
    return control + [(runs / result_name(study, cell, seed), cell, seed) for cell, seed in jobs]


def run_one(study: Study, cell: Cell | None, seed: int) -> dict:
    kind = importlib.import_module(KINDS[study.kind])  # the trainer is imported only where something is trained
    return kind.run_base(study, CONTROL) if cell is None else kind.run_cell(study, cell, seed)


def _start_worker(parent: int) -> None:
    """One thread; and a worker whose parent was killed ends, instead of computing on for nobody."""
    os.environ["OMP_NUM_THREADS"] = "1"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
