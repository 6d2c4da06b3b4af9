"""What a GPU is wanted for, in slices with time limits, the most telling ones first.

    python -m bench.gpu [--plan first|second|all] [--only NAME,NAME] [--budget-seconds 470] [--output FOLDER]
                        [--again] [--list] [--rehearse]

--plan first (the default, about 415 s): the machine, SD1.5's step, kernel tests, tests that need a GPU, attention back
ends, SD1.5's step compiled. second (about 200 s): linear + GEGLU, SDXL's step, the naive loop. all: these two, then
every kernel benchmark, all contenders, values, profiles (45 minutes). `make gpu` is --plan all: called again it goes
on with what is left.

A slice is a process. It is begun when what is left of the budget is as much as it is expected to take, and ended at its
own limit or the budget's; what it has recorded by then is kept. FOLDER (build/gpu) has state.json, log.txt, summary.md,
written anew after each slice, and DEVICE.jsonl with the results; the next call for the same state of the sources goes
on there. Slices that only test and time kernels need Python, torch, triton, numpy, pytest and hypothesis; what trains
also needs diffusers and the rest, and is skipped, with the reason, where they are missing.
--rehearse: the same slices on the CPU with a tiny model and a few tests, torch.compile too, all of them unless told
otherwise; no measurement. Its folder is build/gpu-rehearsal.
Exit status 1: a slice failed, or a gradient was off. 2: there is no GPU, or no such slice.
"""

import time

BEGUN = time.monotonic()  # the budget is the call's: importing torch takes its part

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import sysconfig  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from bench import report, results  # noqa: E402
from bench.kernels.clock import ceilings  # noqa: E402
from bench.step import predictions  # noqa: E402

ROOT = results.ROOT
TRAINER = ("tests/models/test_fast_unet.py", "tests/models/test_fast_inversion.py", "tests/training/test_syncs.py")
TRAINING = ("diffusers", "transformers", "accelerate", "peft", "jsonargparse")  # what the trainer cannot do without
KERNELS = sorted(path.stem for path in (ROOT / "bench/kernels").glob("bench_*.py") if path.stem != "bench_linear_geglu")
GRACE = 5.0  # seconds from the interrupt, at which pytest says what has failed so far, to the kill


@dataclass(frozen=True)
class Slice:
    name: str
    command: tuple[str, ...]
    expected: float  # seconds on a GPU, a guess until measured
    limit: float  # seconds: ended after so long
    needs: tuple[str, ...] = ()  # modules; where one is missing the slice is skipped, with the reason
    shown: int = 0  # so many last lines of what it prints go into the summary
    resumes: bool = False  # begun again it goes on from what it has recorded


def slices(folder: Path, tiny: bool = False) -> dict[str, list[Slice]]:
    """Plan -> its own slices, in order; `all` has those of the others before it. tiny: the rehearsal's."""
    where = os.path.relpath(folder, ROOT)
    python = (sys.executable, "-m")
    pytest = (*python, "pytest", "-q", "--tb=short", "--continue-on-collection-errors")
    untimed = "not slow and not gpu"
    many = ("-n", str(2 if tiny else os.cpu_count())) if find_spec("xdist") else ()

    def timed(name: str, command: tuple[str, ...], expected: float, limit: float, **more) -> Slice:
        return Slice(name, command, *((15, 120) if tiny else (expected, limit)), **more)

    def tests(name: str, files: tuple[str, ...], few: tuple[str, ...], marks: str, *seconds: float, **more) -> Slice:
        which = (*few, "-m", untimed) if tiny else (*files, "-m", marks)
        return timed(name, (*pytest, *which), *seconds, **more)

    def step(name: str, model: str, contenders: str, sizes: str, expected: float, limit: float) -> Slice:
        if tiny:
            sizes = "--pairs 4 --micro-batch 2 --inversion-batch 6 --lockstep-batch 2 --repeats 2 --threads 1"
        precision = "fp32" if model == "pocket" else "bf16"
        what = ("--model", "pocket" if tiny else model, "--precision", precision, "--contenders", contenders)
        command = (*python, "bench.step", *what, *sizes.split(), "--results", where)
        return timed(name, command, expected, limit, needs=TRAINING, shown=14)

    def kernel(name: str, expected: float, limit: float) -> Slice:
        how = ("--check", "-k", "tiny") if tiny else ("--benchmark-only", "--missing", "--results", where)
        command = (*pytest, f"bench/kernels/{name}.py", *how)
        title = name.removeprefix("bench_").replace("_", "-")
        return timed(title, command, expected, limit, resumes=True)

    def profile(model: str, sizes: str) -> Slice:
        known = ("--models.base=", f"--models.random={model}", "--models.fast=fused", "--data.source=")
        base, sizes = ("pocket", "--pairs=4 --train.micro_batch=2 --windows=1") if tiny else (model, sizes)
        what = (f"--config=configs/{base}.yaml", *(() if tiny else known), *sizes.split())
        out = ("--json", f"{where}/profile-{model}.json")
        return timed(
            f"profile-{model}", (*python, "inpo_fast.profile", *what, *out), 150, 300, needs=TRAINING, shown=20
        )

    sd15 = "--pairs 64 --micro-batch 16 --inversion-batch 60 --repeats 2"
    sdxl = "--pairs 8 --micro-batch 4 --inversion-batch 16 --repeats 2"
    few = "--pairs 6 --micro-batch 6 --inversion-batch 12 --repeats 1"
    every = "naive,lockstep,plain,fused,compiled"
    on_gpu = ("tests/kernels", *TRAINER, "tests/models/test_compiled_blocks.py")
    kernel_tests = (*many, "tests/kernels", "--ignore=tests/kernels/test_compile.py")
    a_few = (*many, "tests/kernels/test_errors.py", "tests/kernels/test_tensor_lists.py")
    no_wait = (
        "tests/models/test_fast_unet.py::test_fused_is_plain_on_the_kernels",
        "tests/training/test_syncs.py",
        "-k",
        "kernels or sees",
    )
    attention = (*python, "bench.kernels.attention", "--results", where, *(("--tiny",) if tiny else ()))
    values = (*pytest, "bench", "--check", *(("-k", "errors and tiny") if tiny else ()))
    facts = (sys.executable, "-c", "import bench.gpu; bench.gpu.facts()")
    return {
        "first": [
            timed("machine", facts, 20, 40, shown=13),
            step("step-sd15", "sd15", "plain,fused", sd15, 105, 150),
            tests("kernel-tests", kernel_tests, a_few, untimed, 50, 100),
            tests("gpu-tests", on_gpu, no_wait, "gpu", 60, 90),
            timed("attention", attention, 60, 80, needs=("diffusers",), shown=6),
            step("step-sd15-compiled", "sd15", "fused,compiled", sd15, 120, 190),
        ],
        "second": [
            kernel("bench_linear_geglu", 50, 60),
            step("step-sdxl", "sdxl", "fused", sdxl, 100, 130),
            step("step-sd15-naive", "sd15", "naive,plain", few, 50, 70),
        ],
        "all": [
            timed("values", values, 120, 240),
            *(kernel(name, 90, 180) for name in KERNELS),
            step("step-pocket", "pocket", "naive,plain,fused", "--repeats 3", 40, 80),
            step("step-sd15-all", "sd15", every, sd15 + " --lockstep-batch 16", 400, 470),
            step("step-sdxl-all", "sdxl", every, sdxl + " --lockstep-batch 2", 400, 470),
            tests(
                "trainer-tests",
                TRAINER,
                ("tests/models/test_fast_unet.py", "-k", "odd or undo"),
                untimed,
                120,
                240,
                needs=TRAINING,
            ),
            profile("sd15", "--pairs=64 --train.micro_batch=16 --windows=2"),
            profile("sdxl", "--pairs=16 --train.micro_batch=2 --windows=2"),
        ],
    }


def facts() -> None:
    """The machine: versions, what Triton builds its launchers with, the GPU and its settings, the two ceilings."""
    for name, value in results.provenance().items():
        print(name, value)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    print(f"Triton's C compiler {compiler}, {header}{'' if header.exists() else ' is missing'}")
    if not torch.cuda.is_available():
        return
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


def why_not(it: Slice) -> str:
    """What it lacks here, or nothing."""
    missing = [name for name in it.needs if not find_spec(name)]
    return f"there is no {', no '.join(missing)}" if missing else ""


def execute(it: Slice, folder: Path, ends: float) -> dict:
    """Status, names of failing tests and last lines of one slice. What it prints goes to the log."""
    if reason := why_not(it):
        return {"status": f"skipped: {reason}"}
    before, begun = len(results.load(folder)), time.monotonic()
    limit = min(it.limit, ends - begun)
    log = folder / "log.txt"
    with open(log, "a") as file:
        file.write(f"\n===== {it.name}, at most {limit:.0f} s: {shlex.join(it.command)}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            it.command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            try:
                code = process.wait(limit - min(GRACE, limit / 10))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                process.wait(max(0.0, limit - (time.monotonic() - begun)))
            finally:
                stop(process)
    said = log.read_bytes()[begin:].decode(errors="replace")
    lines = said.strip().splitlines()
    kept = len(results.load(folder)) - before
    failures = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", said, re.MULTILINE)
    return {"status": _status(it, code, limit, kept, lines), "failures": failures, "last": lines[-14:], "kept": kept}


def _status(it: Slice, code: int | None, limit: float, kept: int, lines: list[str]) -> str:
    last = lines[-1] if lines else ""
    if code == 0:
        return "passed"
    if code is None:
        if limit < it.limit or (it.resumes and kept):
            return f"unfinished (cut off after {limit:.0f} s, {kept} results kept)"
        return f"failed (took more than {limit:.0f} s; {kept} results kept)"
    if code == 1 and last.startswith("gradient off"):
        return f"passed, {last}"
    if last.startswith("ModuleNotFoundError"):
        return f"skipped: {last}"
    return f"failed ({code})"


def stop(process: subprocess.Popen) -> None:
    """Ends the process and all that it started (compiler workers)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Book:
    """What is known of the slices, in FOLDER/state.json and FOLDER/summary.md, of one state of the sources."""

    def __init__(self, folder: Path, todo: list[Slice]):
        self.folder, self.todo = folder, todo
        self.of = {"commit": results.commit()[0], "sources": results.sources()}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "state.json"
        try:
            kept = json.loads(path.read_text()) if path.exists() else {}
            self.state: dict[str, dict] = kept["slices"] if kept.items() >= self.of.items() else {}
        except (ValueError, KeyError, AttributeError) as problem:
            raise OSError(f"{path} is damaged ({problem}); remove it, and all slices are begun anew") from None

    def status(self, it: Slice) -> str:
        return self.state.get(it.name, {}).get("status", "")

    def is_open(self, it: Slice) -> bool:
        """Never begun, or ended in the middle by the budget or with the call."""
        return not self.status(it) or self.status(it).startswith(("running", "unfinished"))

    def note(self, it: Slice, done: dict) -> None:
        self.state[it.name] = done
        self._write("state.json", json.dumps({**self.of, "slices": self.state}, indent=1))
        self._write("summary.md", summary(self))

    def _write(self, name: str, text: str) -> None:
        aside = self.folder / "unfinished.part"  # a killed call leaves the old text or the new one
        aside.write_text(text)
        aside.replace(self.folder / name)


def run(book: Book, budget: float, again: bool = False, begun: float | None = None) -> None:
    """Runs what is left of the slices for `budget` seconds from `begun` (a time.monotonic(); now)."""
    ends = (time.monotonic() if begun is None else begun) + budget
    queue = [it for it in book.todo if book.is_open(it) or (again and book.status(it) != "passed")]
    for it in queue:
        left = ends - time.monotonic()
        if left < it.expected:
            print(f"{it.name}: not begun, {it.expected:.0f} s expected and {max(0.0, left):.0f} s left", flush=True)
            continue  # a later slice may be shorter
        print(f"{it.name}: begun, {it.expected:.0f} s expected, {left:.0f} s left", flush=True)
        begun = time.monotonic()
        book.note(it, {"status": "running"})
        done = execute(it, book.folder, ends)
        book.note(it, {**done, "seconds": round(time.monotonic() - begun, 1)})
        print(f"{it.name}: {done['status']}, {book.state[it.name]['seconds']:.0f} s", flush=True)
        if done["status"].startswith("unfinished") and it.resumes:
            queue.append(it)
        if done["status"].startswith("failed"):
            print("\n".join("    " + line for line in done["last"]), flush=True)


def summary(book: Book) -> str:
    made = results.provenance()
    lines = [line for line in results.load(book.folder) if line["sources"] == book.of["sources"]]
    text = [f"# commit {made['commit']}{' with changes' if made['dirty'] else ''}, sources {made['sources']}", ""]
    text += [f"{made['device']}, torch {made['torch']}, triton {made['triton']}, Python {made['python']}", ""]
    text += ["| slice | status | seconds | expected |", "| --- | --- | --- | --- |"]
    for it in book.todo:
        done = book.state.get(it.name, {"status": "left"})
        status = done["status"]
        status = status if status in ("passed", "left", "running") else f"**{status}**"
        text.append(f"| {it.name} | {status} | {done.get('seconds', '-')} | {it.expected:g} |")
    failures = [f"- {it.name}: {x}" for it in book.todo for x in book.state.get(it.name, {}).get("failures", [])]
    text += ["", *failures, "", report.steps_table(lines), "", predictions.comparison(lines), "", report.table(lines)]
    for it in book.todo:
        last = book.state.get(it.name, {}).get("last", [])[-it.shown :] if it.shown else []
        text += ["", f"{it.name}:", "", *(f"    {line}" for line in last)] if last else []
    return "\n".join([*text, ""])


def chosen(plans: dict[str, list[Slice]], plan: str, only: str | None) -> list[Slice] | str:
    """The slices of a plan or those named, in the order given; a text where there is no such name."""
    known = {it.name: it for of in plans.values() for it in of}
    if only is None:
        return [*known.values()] if plan == "all" else plans[plan]
    names = [*dict.fromkeys(filter(None, map(str.strip, only.split(","))))]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        return f"--only: no slice {', '.join(unknown) or 'named'}; there are {', '.join(known)}"
    return [known[name] for name in names]


def ended(number: int, _) -> None:
    """Ctrl-C, kill, or the terminal is gone: on the way out the slice at work is ended too."""
    with contextlib.suppress(OSError):
        print(f"bench.gpu: ended by {signal.Signals(number).name}; the same command goes on", file=sys.stderr)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", choices=("first", "second", "all"), help="default first; all with --rehearse")
    parser.add_argument("--only", metavar="NAME,NAME", help="these slices, in this order")
    parser.add_argument("--budget-seconds", type=float, help="of this call, default 470; with --rehearse 1200")
    parser.add_argument("--output", type=Path, help="folder for state and results, default build/gpu")
    parser.add_argument(
        "--again", action="store_true", help="also slices that failed, were skipped or had a gradient off"
    )
    parser.add_argument("--list", action="store_true", help="print the slices, seconds and commands; run nothing")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with a tiny model: tries this script itself"
    )
    asked = parser.parse_args()
    tiny = asked.rehearse
    if tiny:  # also beside a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    folder = (asked.output or ROOT / "build" / ("gpu-rehearsal" if tiny else "gpu")).resolve()
    plans = slices(folder, tiny)
    todo = chosen(plans, asked.plan or ("all" if tiny else "first"), asked.only)
    if isinstance(todo, str):
        print(f"bench.gpu: {todo}", file=sys.stderr)
        return 2
    if asked.list:
        for it in todo:
            print(f"{it.name:20} {it.expected:4.0f} s, at most {it.limit:4.0f} s: {shlex.join(it.command)}")
        print(f"{sum(it.expected for it in todo):.0f} s expected in all")
        return 0
    if not (tiny or torch.cuda.is_available()):
        print("bench.gpu: there is no CUDA device (torch.cuda.is_available() is False); --rehearse tries the script")
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, ended)
    try:
        book = Book(folder, todo)
        (folder / "log.txt").touch()
    except OSError as problem:
        print(f"bench.gpu: {problem}", file=sys.stderr)
        return 2
    budget = (1200 if tiny else 470) if asked.budget_seconds is None else asked.budget_seconds
    run(book, budget, asked.again, BEGUN)
    print((folder / "summary.md").read_text() if (folder / "summary.md").exists() else "nothing was begun")
    left = [it.name for it in todo if book.is_open(it)]
    print(f"left: {', '.join(left)}; the same command goes on" if left else "nothing left")
    print(f"everything is in {os.path.relpath(folder)}")
    return int(any("failed" in book.status(it) or "gradient off" in book.status(it) for it in todo))


if __name__ == "__main__":
    sys.exit(main())
