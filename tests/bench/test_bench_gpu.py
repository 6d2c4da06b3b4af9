"""bench.gpu: slices within their limits and the budget, a call that is ended goes on, few files, the rehearsal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import Forked, ran, run_code

from bench import gpu, report, results

RECORD = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a compiler that does not listen
from pathlib import Path
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
before = folder.joinpath("cpu.jsonl").exists()
with open(folder / "cpu.jsonl", "a") as file:
    file.write(json.dumps({"utc": "1", "kernel": "train_step", "sources": "other"}) + "\\n")
print("a result", flush=True)
time.sleep(0 if before else seconds)
"""


def part(name: str, code: str, expected: float = 0.1, limit: float = 20, *words: str, **more) -> gpu.Slice:
    return gpu.Slice(name, (sys.executable, "-c", code, *words), expected, limit, **more)


def status(todo: list[gpu.Slice], folder, budget: float = 60, again: bool = False) -> dict[str, str]:
    book = gpu.Book(folder, todo)
    gpu.run(book, budget, again)
    assert json.loads((folder / "state.json").read_text())["slices"] == book.state
    return {name: done["status"] for name, done in book.state.items()}


def test_gpu_run_goes_on_where_it_stopped(tmp_path):
    folder, seen = tmp_path / "out", tmp_path / "seen"
    note = f"open({str(seen)!r}, 'a').write"
    todo = [
        part("first", f"{note}('1')"),
        part("second", f"{note}('2'); print('FAILED tests/x.py::test_y[a b] - wrong'); raise SystemExit(1)"),
        part("long", f"{note}('3')", expected=100),
        part("slow", "import time; time.sleep(60)", limit=0.5),
        part("elsewhere", f"{note}('4')", needs=("no_such_module",)),
        part("inside", "import no_such_module"),
        part("off", "print('gradient off: fused 0.11 (allowed 0.1)'); raise SystemExit(1)"),
        part("in parts", RECORD, 0.1, 3, str(folder), "60", resumes=True),
    ]
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"commit": "another", "slices": {"first": {"status": "passed"}}}))
    found = status(todo, folder)
    assert seen.read_text() == "12" and "long" not in found  # of another commit: begun anew; the budget is too short
    assert found["first"] == "passed" and found["second"] == "failed (1)"
    assert found["slow"] == "failed (took more than 0 s; 0 results kept)"
    assert found["elsewhere"] == "skipped: there is no no_such_module"
    assert found["inside"] == "skipped: ModuleNotFoundError: No module named 'no_such_module'"
    assert found["off"] == "passed, gradient off: fused 0.11 (allowed 0.1)"
    assert found["in parts"] == "passed"  # the second time: it was not done when its time was up

    kept = json.loads((folder / "state.json").read_text())
    kept["slices"]["first"] = {"status": "running"}  # as a killed run leaves it
    (folder / "state.json").write_text(json.dumps(kept))
    found = status(todo, folder, budget=1000)
    assert seen.read_text() == "1213" and found["long"] == "passed"
    status(todo, folder, budget=1000)
    assert seen.read_text() == "1213"  # failures are not repeated ...
    status(todo[:2], folder, budget=1000, again=True)
    assert seen.read_text() == "12132"  # ... unless asked for
    text = (folder / "summary.md").read_text()
    assert "| second | **failed (1)** |" in text and "- second: tests/x.py::test_y[a b]" in text
    assert report.NOT_MEASURED in text


def test_the_budget_ends_a_slice_and_the_next_call_goes_on_with_it(tmp_path):
    todo = [part("cut", RECORD, 0.1, 30, str(tmp_path), "60"), part("after", "print(1)", expected=1)]
    begun = time.monotonic()
    found = status(todo, tmp_path, budget=3)
    assert time.monotonic() - begun < 6 and found == {"cut": "unfinished (cut off after 3 s, 1 results kept)"}
    assert "| cut | **unfinished (cut off after 3 s, 1 results kept)** |" in (tmp_path / "summary.md").read_text()
    assert status(todo, tmp_path) == {"cut": "passed", "after": "passed"}


KILLED = """
import sys
from pathlib import Path
from bench import gpu
folder = Path(sys.argv[1])
parts = [gpu.Slice("one", (sys.executable, "-c", "print(1)"), 0, 9),
         gpu.Slice("two", (sys.executable, "-c", sys.argv[2]), 0, 90)]
gpu.run(gpu.Book(folder, parts), 100)
"""


ENDED = """
import signal, sys
from bench import gpu
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
at_work = "import os, time; print('on', os.getpid(), flush=True); time.sleep(60)"
one = gpu.Slice("step-sd15-naive", (sys.executable, "-c", at_work), 0, 90)
gpu.slices = lambda *_: {"first": [one]}
sys.exit(gpu.main())
"""


def test_a_call_that_is_killed_leaves_summary_and_few_files(tmp_path):
    at_work = "import os, time; print('on', os.getpid(), flush=True); time.sleep(60)"
    process = Forked(beside(tmp_path), run_code, KILLED, str(tmp_path), at_work)
    log, until = tmp_path / "log.txt", time.monotonic() + 60
    while not (log.exists() and (at_work := re.search(r"^on (\d+)\n", log.read_text(), re.MULTILINE))):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(int(at_work[1]), signal.SIGKILL)  # the slice, which nobody was left to end
    state = json.loads((tmp_path / "state.json").read_text())["slices"]
    assert state["one"]["status"] == "passed" and state["two"]["status"] == "running"
    text = (tmp_path / "summary.md").read_text()
    assert "| one | passed |" in text and "| two | running |" in text
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "state.json", "summary.md"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_call_that_is_ended_ends_its_slice(tmp_path, number):
    words = ("--rehearse", "--only", "step-sd15-naive", "--output", str(tmp_path))
    process = Forked(beside(tmp_path), run_code, ENDED, *words)
    log, until = tmp_path / "log.txt", time.monotonic() + 60
    while not (log.exists() and (at_work := re.search(r"^on (\d+)\n", log.read_text(), re.MULTILINE))):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
    assert process.complaints.read_text() == f"bench.gpu: ended by {number.name}; the same command goes on\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(at_work[1]), 0)


@pytest.mark.parametrize("broken", ["a file", "a state"])
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, broken):
    if broken == "a file":
        tmp_path = tmp_path / "file"
        tmp_path.touch()
    else:
        (tmp_path / "state.json").write_text('{"commit": "a')
    done = ran(beside(tmp_path), "bench.gpu", "--rehearse", "--only", "machine", "--output", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("bench.gpu: ") and done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr


def beside(folder: Path) -> Path:
    """For what a process says: not in the folder, of which a test says what is there."""
    return folder.with_name(f"{folder.name}-process")


def test_every_named_file_is_there():
    """No slice but those of the rehearsal is begun without a GPU."""
    plans = [gpu.slices(results.ROOT / "x", tiny) for tiny in (False, True)]
    words = {word.partition("::")[0] for plan in plans for of in plan.values() for it in of for word in it.command}
    named = {word.removeprefix("--ignore=") for word in words if re.match(r"(--ignore=)?(tests|bench)/", word)}
    assert len(named) > 10 and not [name for name in named if not (results.ROOT / name).exists()]


def test_names_and_plans(tmp_path):
    done = ran(tmp_path / "some", "bench.gpu", "--list", "--only", "step-sdxl,nothing,machine")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("bench.gpu: --only: no slice nothing; there are machine, step-sd15, kernel-tests, ")
    nothing = ran(tmp_path / "none", "bench.gpu", "--only", ",", "--rehearse")
    assert nothing.returncode == 2 and nothing.stderr.startswith(
        "bench.gpu: --only: no slice named; there are machine, "
    )
    plans, tiny = gpu.slices(results.ROOT / "x"), gpu.slices(results.ROOT / "x", tiny=True)
    names = lambda them: {plan: [it.name for it in of] for plan, of in them.items()}  # noqa: E731
    assert names(plans) == names(tiny)  # the rehearsal: the same slices in the same order
    every = [it for of in plans.values() for it in of]
    assert len({it.name for it in every}) == len(every) and all(it.expected < it.limit for it in every)
    assert [it.name for it in gpu.chosen(plans, "all", None)] == [it.name for it in every]
    assert [it.name for it in gpu.chosen(plans, "first", "attention, machine,attention")] == ["attention", "machine"]
    first = ["machine", "step-sd15", "kernel-tests", "gpu-tests", "attention", "step-sd15-compiled"]
    assert [it.name for it in gpu.chosen(plans, "first", None)] == first
    assert sum(it.expected for it in plans["first"]) <= 470 and sum(it.expected for it in plans["second"]) <= 230
    words = [
        word.partition("::")[0] for it in (*every, *(it for of in tiny.values() for it in of)) for word in it.command
    ]
    named = {word.removeprefix("--ignore=") for word in words if word.removeprefix("--ignore=").startswith("tests/")}
    assert named and not [name for name in named if not (results.ROOT / name).exists()]
    benches = {path.stem for path in (results.ROOT / "bench" / "kernels").glob("bench_*.py")}
    assert {name for name in benches if any(f"bench/kernels/{name}.py" in it.command for it in every)} == benches


def test_rehearsal(tmp_path):
    """The command itself, on a slice: the files that a call leaves, and their names."""
    words = ("bench.gpu", "--rehearse", "--only", "attention", "--output", str(tmp_path))
    done = ran(beside(tmp_path), *words)
    assert done.returncode == 0 and "nothing left" in done.stdout, done.stdout + done.stderr
    found = sorted(path.name for path in tmp_path.iterdir())
    assert len(found) == 4 and {"log.txt", "state.json", "summary.md"} < set(found)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in found)
    text = (tmp_path / "summary.md").read_text()
    assert text.count("| attention | passed |") == 1 and "head size 40: torch" in text
    again = ran(beside(tmp_path), *words)
    assert again.returncode == 0 and "begun" not in again.stdout


UNDER_XDIST = """
import os, sys, pytest
for name in [name for name in os.environ if name.startswith("PYTEST_")]:
    del os.environ[name]
os.chdir(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""


def test_rehearsal_of_a_kernels_benchmark(tmp_path):
    """The slice's own words, in a process that has imported all."""
    (errors,) = gpu.chosen(gpu.slices(tmp_path, tiny=True), "first", "errors")
    assert errors.command[1:3] == ("-m", "pytest")
    process = Forked(beside(tmp_path), run_code, UNDER_XDIST, str(results.ROOT), *errors.command[3:])
    code, said = process.wait(), process.said.read_text()
    assert code == 0 and re.search(r"\b[1-9]\d* passed", said), said + process.complaints.read_text()


def test_facts_of_the_machine(capsys):
    """What the slice `machine` runs."""
    (machine,) = gpu.chosen(gpu.slices(results.ROOT / "x", tiny=True), "first", "machine")
    assert machine.command[1] == "-c"
    exec(machine.command[2], {})
    said = capsys.readouterr().out
    assert "\ntorch " in said and "\ntriton " in said and "Triton's C compiler" in said


@pytest.mark.slow
def test_whole_rehearsal(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing left" in done.stdout, done.stdout + done.stderr
    assert len(list(tmp_path.iterdir())) <= 8
