"""bench.gpu: slices within their limits and the budget, a call that is ended goes on, few files, the rehearsal."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

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
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), at_work], cwd=results.ROOT)
    log, until = tmp_path / "log.txt", time.monotonic() + 60
    while not (log.exists() and (at_work := re.search(r"^on (\d+)\n", log.read_text(), re.MULTILINE))):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.kill()
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
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED, *words], cwd=results.ROOT, stderr=subprocess.PIPE, text=True
    )
    log, until = tmp_path / "log.txt", time.monotonic() + 60
    while not (log.exists() and (at_work := re.search(r"^on (\d+)\n", log.read_text(), re.MULTILINE))):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert said == f"bench.gpu: ended by {number.name}; the same command goes on\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(at_work[1]), 0)


@pytest.mark.parametrize("broken", ["a file", "a state"])
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, broken):
    if broken == "a file":
        tmp_path = tmp_path / "file"
        tmp_path.touch()
    else:
        (tmp_path / "state.json").write_text('{"commit": "a')
    ran = command_line("--rehearse", "--only", "machine", "--output", str(tmp_path))
    assert ran.returncode == 2 and ran.stderr.startswith("bench.gpu: ") and ran.stderr.count("\n") == 1
    assert str(tmp_path) in ran.stderr


def command_line(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.gpu", *words]
    return subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True)


def test_names_and_plans():
    ran = command_line("--list", "--only", "step-sdxl,nothing,machine")
    assert ran.returncode == 2 and not ran.stdout
    assert ran.stderr.startswith("bench.gpu: --only: no slice nothing; there are machine, step-sd15, kernel-tests, ")
    nothing = command_line("--only", ",", "--rehearse")
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
    benches = {path.stem for path in (results.ROOT / "bench" / "kernels").glob("bench_*.py")}
    assert {name for name in benches if any(f"bench/kernels/{name}.py" in it.command for it in every)} == benches


def test_rehearsal(tmp_path):
    """The command itself, on a few slices: the files that a call leaves, and their names."""
    names = "machine,attention,trainer-tests"
    ran = command_line("--rehearse", "--only", names, "--output", str(tmp_path))
    assert ran.returncode == 0 and "nothing left" in ran.stdout, ran.stdout + ran.stderr
    found = sorted(path.name for path in tmp_path.iterdir())
    assert len(found) == 4 and {"log.txt", "state.json", "summary.md"} < set(found)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in found)
    text = (tmp_path / "summary.md").read_text()
    assert [text.count(f"| {name} | passed |") for name in names.split(",")] == [1, 1, 1]
    assert "head size 40: torch" in text
    again = command_line("--rehearse", "--only", names, "--output", str(tmp_path))
    assert again.returncode == 0 and "begun" not in again.stdout


@pytest.mark.slow
def test_whole_rehearsal(tmp_path):
    ran = command_line("--rehearse", "--output", str(tmp_path))
    assert ran.returncode == 0 and "nothing left" in ran.stdout, ran.stdout + ran.stderr
    assert len(list(tmp_path.iterdir())) <= 8
