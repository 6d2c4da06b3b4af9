"""Everything that wants a GPU, in slices: tests, the kernels' benchmarks, the step benchmark, the profile.

    python -m bench.gpu [--budget-minutes 8.5] [--output FOLDER] [--again] [--list] [--rehearse]

Each task is a process with a time limit. One is started only while its limit fits into the budget; the next call,
for the same state of the sources, goes on with what is left. FOLDER (bench/results/gpu-COMMIT) gets state.json,
log.txt, the benchmarks' JSON lines and summary.md, as things happen. Needs Python, torch, triton, numpy, pytest and
hypothesis; what trains also needs diffusers and the rest, and is skipped, with the reason, where they are missing.
Exit status 1: a task failed. 2: there is no GPU.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report, results
from bench.clock import ceilings

ROOT = results.ROOT
TRAINER = ("tests/test_fast_unet.py", "tests/test_fast_inversion.py", "tests/test_syncs.py")
UNFINISHED = ("running", "unfinished", "")  # a task that a killed run was at is begun again


@dataclass(frozen=True)
class Task:
    name: str
    command: tuple[str, ...]
    minutes: float  # killed after so long
    needs: str = ""  # a module; where it cannot be imported the task is skipped, with the reason
    shown: int = 0  # so many last lines of what it prints go into the summary
    resumes: bool = False  # keeps what it has when its time is up, and goes on from there: not failed while it gets on


def tasks(folder: Path, rehearse: bool) -> list[Task]:
    python = (sys.executable, "-m")
    pytest = (*python, "pytest", "-q")
    machine = (*python, "bench.results") if rehearse else (sys.executable, "-c", "import bench.gpu; bench.gpu.facts()")
    which = "not slow and not gpu" if rehearse else "gpu or not slow"
    timing = ("--benchmark-only", "--missing", "--results", os.path.relpath(folder, ROOT))
    where = os.path.relpath(folder, ROOT)
    small = ("--pairs", "4", "--micro-batch", "2", "--repeats", "1") if rehearse else ("--results", where)
    bf16 = ("--precision", "bf16", "--contenders", "naive,lockstep,plain,fused,compiled")
    steps = {"step pocket": ()}
    if not rehearse:
        steps["step sd15"] = ("--model", "sd15", *bf16, "--pairs", "64", "--repeats", "2")
        sizes = ("--pairs", "12", "--micro-batch", "4", "--inversion-batch", "24", "--lockstep-batch", "4")
        steps["step sdxl"] = ("--model", "sdxl", *bf16, *sizes, "--repeats", "1")
    profiles = {} if rehearse else {f"profile {name}": name for name in ("sd15", "sdxl")}
    names = sorted(path.stem for path in (ROOT / "bench").glob("bench_*.py"))
    files = {name: (*pytest, f"bench/{name}.py", *(("--check",) if rehearse else timing)) for name in names}
    return [
        Task("machine", machine, 1, shown=6),
        Task("kernel tests", (*pytest, "tests/kernels", "--continue-on-collection-errors", "-m", which), 6),
        Task("values", (*pytest, "bench", "--check"), 4),
        *(Task(name, command, 3, resumes=True) for name, command in files.items()),
        *(
            Task(name, (*python, "bench.train_step", *more, *small), 8, needs="bench.train_step", shown=16)
            for name, more in steps.items()
        ),
        Task("attention", (*python, "bench.attention", "--results", where), 3, needs="inpo_fast.attention", shown=5)
        if not rehearse
        else Task("attention", (*python, "compileall", "-q", "bench/attention.py"), 1),
        Task("tests of the trainer", (*pytest, *TRAINER, "-m", which), 4, needs="inpo_fast.train"),
        *(
            Task(name, (*python, "inpo_fast.profile", *profile(config, folder)), 6, needs="inpo_fast.train", shown=20)
            for name, config in profiles.items()
        ),
    ]


def profile(config: str, folder: Path) -> tuple[str, ...]:
    """The recipe on random weights and pictures, on the kernels."""
    name = str(folder / f"profile-{config}.json")
    sizes = ("--pairs=64", "--train.micro_batch=16") if config == "sd15" else ("--pairs=16", "--train.micro_batch=4")
    model = ("--models.base=", f"--models.random={config}", "--models.fast=fused", "--data.source=")
    return (f"--config=configs/{config}.yaml", *model, *sizes, "--windows=2", "--json", name)


def facts() -> None:
    """The machine: versions, the GPU and its settings, the two ceilings."""
    for name, value in results.provenance().items():
        print(name, value)
    p = torch.cuda.get_device_properties(0)
    print(f"sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory} bytes, L2 {p.L2_cache_size} bytes")
    fields = "driver_version,power.limit,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], stderr=subprocess.STDOUT)
    print(ceilings())


def environment() -> dict[str, str]:
    """Makes the folder kernels/ importable as inpo_kernels without an installation."""
    path = ROOT / "build" / "path"
    path.mkdir(parents=True, exist_ok=True)
    link = path / "inpo_kernels"
    if not link.is_symlink():
        link.symlink_to(Path("..", "..", "kernels"))
    before = os.environ.get("PYTHONPATH")
    paths = [str(path), str(ROOT), *([before] if before else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def missing(module: str) -> str:
    """Why a module cannot be imported, or nothing."""
    command = [sys.executable, "-c", f"import {module}"]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    return ran.stderr.strip().splitlines()[-1] if ran.returncode else ""


def execute(task: Task, log: Path) -> dict:
    """Status, names of failing tests and last lines of one task. What it prints goes to the log."""
    if task.needs and (reason := missing(task.needs)):
        return {"status": f"skipped: {reason}"}
    size = size_of_results(log.parent)
    with open(log, "a") as file:
        file.write(f"\n===== {task.name}: {shlex.join(task.command)}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            task.command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            status = "passed" if process.wait(60 * task.minutes) == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            got_on = task.resumes and size_of_results(log.parent) > size
            status = "unfinished" if got_on else f"failed (took more than {task.minutes:g} minutes)"
        finally:
            stop(process)
    said = log.read_bytes()[begin:].decode(errors="replace")
    failures = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", said, re.MULTILINE)
    return {"status": status, "failures": failures, "last": said.strip().splitlines()[-12:]}


def size_of_results(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def stop(process: subprocess.Popen) -> None:
    """Ends the process and all that it started (compiler workers)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(todo: list[Task], folder: Path, budget: float, again: bool = False) -> dict[str, dict]:
    """Runs what is left of the tasks for `budget` seconds. Returns the state: task -> status, seconds, failures."""
    ends = time.monotonic() + budget
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.json"
    of = {"commit": results.commit()[0], "sources": results.sources()}
    kept = json.loads(path.read_text()) if path.exists() else {}
    state = kept["tasks"] if kept.items() >= of.items() else {}

    def note(task: Task, done: dict) -> None:
        state[task.name] = done
        aside = path.with_suffix(".part")  # a killed run leaves the old state or the new one
        aside.write_text(json.dumps({**of, "tasks": state}, indent=1))
        aside.replace(path)

    before = {task: status_of(task, state) for task in todo}
    queue = [task for task in todo if before[task] in UNFINISHED or (again and before[task] != "passed")]
    for task in queue:
        if time.monotonic() + 60 * task.minutes > ends:
            print(f"{task.name}: not begun, its limit of {task.minutes:g} minutes does not fit", flush=True)
            continue  # a later task may have a shorter limit
        begun = time.monotonic()
        note(task, {"status": "running"})
        done = execute(task, folder / "log.txt")
        note(task, {**done, "seconds": round(time.monotonic() - begun, 1)})
        print(f"{task.name}: {done['status']}, {state[task.name]['seconds']:.0f} s", flush=True)
        if done["status"] == "unfinished":
            queue.append(task)
        if done["status"].startswith("failed"):
            print("\n".join("    " + line for line in done["last"]), flush=True)
    return state


def status_of(task: Task, state: dict[str, dict]) -> str:
    return state.get(task.name, {}).get("status", "")


def summary(todo: list[Task], state: dict[str, dict], folder: Path) -> str:
    made = results.provenance()
    text = [f"# commit {made['commit']}{' with changes' if made['dirty'] else ''}, sources {made['sources']}", ""]
    text += [report.table(results.load(folder)), ""]
    text += ["| task | status | seconds |", "| --- | --- | --- |"]
    for task in todo:
        done = state.get(task.name, {"status": "left"})
        text.append(f"| {task.name} | {done['status']} | {done.get('seconds', '-')} |")
    text += [""] + [f"- {task.name}: {x}" for task in todo for x in state.get(task.name, {}).get("failures", [])]
    for task in todo:
        last = state.get(task.name, {}).get("last", [])[-task.shown :] if task.shown else []
        text += ["", *(f"    {line}" for line in last)] if last else []
    return "\n".join([*text, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for state and results, default bench/results/gpu-COMMIT")
    parser.add_argument("--budget-minutes", type=float, default=8.5, help="of this call")
    parser.add_argument("--again", action="store_true", help="also tasks that failed or were skipped")
    parser.add_argument("--list", action="store_true", help="print the tasks and their limits, run nothing")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in check mode: tries this script itself")
    arguments = parser.parse_args()
    name, dirty = results.commit()
    default = ROOT / ("build/rehearsal" if arguments.rehearse else "bench/results") / f"gpu-{name}{'-dirty' * dirty}"
    folder = (arguments.output or default).resolve()
    todo = tasks(folder, arguments.rehearse)
    if arguments.list:
        for task in todo:
            print(f"{task.minutes:g} min  {task.name}: {shlex.join(task.command)}")
        return 0
    if not (arguments.rehearse or torch.cuda.is_available()):
        print("bench.gpu: there is no CUDA device (torch.cuda.is_available() is False); --rehearse tries the script")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the task at work is ended too
    state = run(todo, folder, 60 * arguments.budget_minutes, arguments.again)
    text = summary(todo, state, folder)
    (folder / "summary.md").write_text(text)
    print(text)
    left = [task.name for task in todo if status_of(task, state) in UNFINISHED]
    print(f"left: {', '.join(left)}; the same command goes on" if left else "nothing left")
    print(f"everything is in {os.path.relpath(folder)}")
    return int(any(done["status"].startswith("failed") for done in state.values()))


if __name__ == "__main__":
    sys.exit(main())
