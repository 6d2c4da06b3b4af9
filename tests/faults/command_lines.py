"""Odd values for every option and key of every command: `python tests/faults/command_lines.py [COMMAND …]`.

Which there are is asked of the commands' own parsers and of the configuration's dataclasses. Each execution is a valid
tiny command with one value in the place of another, in a process of its own (forked with the imports done). Good are
exit status 0 (validate: 1 too), and exit status 2 with exactly one line on stderr; anything else is a finding: a
traceback, several lines, a value quoted at length, a signal, or no end within a time limit. No value leads out of the
temporary world but for what is only read (OUTSIDE, READ). Exit status 1 of this
program: there was one. --accepted lists the odd values that were taken, to be looked at by a person.
"""

import argparse
import contextlib
import gc
import importlib
import math
import os
import pkgutil
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import yaml
from tiny_runs import run_command, save_recipe
from tiny_world import save_pairs

import inpo_fast
from inpo_fast.config import RunConfig
from inpo_fast.config.values import leaves

SECONDS = 30  # of one execution; a tiny run takes one or two
MEMORY = 12 * 2**30
LONG = "a very long word " * 600
COMMANDS = ("train", "cache", "evaluate", "sample", "export", "profile", "model_card", "relabel", "validate", "vote")
CONFIGURED = ("train", "cache", "evaluate", "profile", "validate")  # take all keys of the configuration
WITH_KEYS = ("train",)  # and are given odd ones
# keys that are read only beside others
BESIDE = {
    "online.": ["--online.every=1", "--online.judge=pocket-rules", "--online.sampler_steps=2", "--online.batch=2"],
    "evaluate.": ["--evaluate.prompts=prompts.txt", "--evaluate.seeds=1", "--evaluate.sampler_steps=2"],
    "observe.images": ["--observe.images_every=1", "--observe.prompts=prompts.txt", "--evaluate.sampler_steps=2"],
    "observe.prompts": ["--observe.images_every=1", "--observe.images=1", "--evaluate.sampler_steps=2"],
    "observe.held_out": ["--observe.held_out=pairs.parquet", "--observe.held_out_pairs=2"],
    "inversion.refinements": ["--method=smpo", "--inversion.estimator=renoise"],
    "objective.gamma": ["--method=smpo", "--inversion.estimator=renoise"],
    "inversion.cache": ["--inversion.model=reference"],
    "inversion.frozen": ["--inversion.model=reference", "--inversion.cache=trajectories"],
    "models.lora.": ["--models.lora.rank=2"],
    "models.random": ["--models.base=", "--dry_run=true"],
    "models.cuda_graphs": ["--models.fast=compiled"],
    "data.labels": ["--data.labels=labels.parquet"],
    "data.filters.min_score": ["--data.filters.score=label_0"],
    "plan.": ["--dry_run=true"],
    "optim.ema_decay": ["--optim.average=ema"],
    "train.milestone_every": ["--train.checkpoint_every=1"],
    "observe.wandb": ["--dry_run=true"],
}
# a large number that is right takes long: of options it is left out, of keys it is planned only
LASTS = (
    "data.resolution",
    "--seeds",
    "--windows",
    "--pairs",
    "train.steps",
    "train.pairs_per_step",
    "evaluate.seeds",
    "online.candidates",
)
LASTS += (
    "evaluate.sampler_steps",
    "online.sampler_steps",
    "observe.images",
    "inversion.steps",
    "inversion.refinements",
)


@dataclass(frozen=True)
class Case:
    command: str
    key: str
    value: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.command} {self.key}={self.value[:60]}"


def make_world(folder: Path) -> None:
    """A tiny model, pairs, prompts, a finished run and things that are none of these."""
    save_recipe(
        folder,
        train={"steps": 1, "pairs_per_step": 2, "micro_batch": 2, "checkpoint_every": 1},
        models={"base": str(folder / "model")},
        data={"source": str(folder / "pairs.parquet")},
    )
    from tiny_world import one_level, tiny_pipeline

    one_level(tiny_pipeline()).save_pretrained(folder / "model")
    save_pairs(folder / "pairs.parquet", rows=12)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "folder").mkdir()
    (folder / "file.txt").write_text("nothing in particular\n")
    (folder / "empty").write_bytes(b"")
    (folder / "noise.safetensors").write_bytes(random.Random(0).randbytes(4096))
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0o500)


def odd_numbers() -> list[str]:
    small = ["0", "-1", "1", "3", "7", "0.5", "-0.5", "1e-30", "010", "0x10", "1_000", "1e3", "true"]
    return [
        *small,
        "1000",
        "1001",
        "2000",
        "1000000",
        f"{10**18}",
        f"{10**30}",
        "9" * 5000,
        *["1e30", "1e400", "nan", "inf", "-inf"],
    ]


def odd_words() -> list[str]:
    yaml = ["null", "no", "[]", "[1, 2]", "{}", "{a: 1}", "{a: 1, a: 2}", "[[", "a: b: c", "!!python/none", "~"]
    odd = ["größer-😀", "two\nlines", "\x1b[31mred", "\udcff", "-", "--", "x" * 300, LONG, "y" * 5000]
    return ["", " ", "text", *yaml, *odd]


# never for what is written: a run in the root, or a file renamed onto a device, would stay there
OUTSIDE = ("/", "/dev/null", "../..", "/proc/nothing")
READ = ("models.base", "models.init", "models.vae", "data.source", "data.images", "data.labels", "evaluate.prompts")
READ += ("--base", "--model", "--source", "--images", "--prompts", "--pictures", "--lora", "--single-file-config")


def odd_places() -> list[str]:
    return ["folder", "file.txt", "empty", "noise.safetensors", "missing", "missing/deep/er", "file.txt/inside",
            "model", "pairs.parquet", "prompts.txt", "locked/inside",
            "http://127.0.0.1:9/x", "http://", "s3://", "file:///nowhere", "no-such-protocol://x", "owner/name",
            "d/" * 150 + "x", "z" * 256]  # fmt: skip


def values_of_key(kind: type) -> list[str]:
    kinds = [one for one in get_args(kind) or (kind,) if one is not type(None)]
    if kinds in ([int], [float], [bool]):
        return [*odd_numbers(), *odd_words()[:10], LONG]
    if kinds == [str]:
        return [*odd_words(), *odd_places(), "7", "nan"]
    return [*odd_words(), "[0.5, inf]", "[0.9, 0.99, 0.999]", "[nan, 0.5]", "[text]", "{text: -1}", "{text: nan}", "7"]


# ---- valid commands -------------------------------------------------------------------------------------------------
def valid(command: str) -> dict[str, list[str]]:
    """Option -> its words, of a command that works; "" holds positional ones and the configuration's."""
    recipe = ["--config", "tiny.yaml"]
    drawing = ["--evaluate.seeds=1", "--evaluate.sampler_steps=2"]
    return {
        "train": {"--config": recipe, "--output": ["--output", "out"]},
        "cache": {"": [*recipe, "--output=unused", "--data.cache=cache"]},
        "evaluate": {
            "": [*recipe, "--evaluate.prompts=prompts.txt", *drawing],
            "--model": ["--model", "model"],
            "--output": ["--output", "out"],
        },
        "sample": {
            "--base": ["--base", "model"],
            "--model": ["--model", "model"],
            "--prompt": ["--prompt", "a red circle"],
            "--steps": ["--steps", "2"],
            "--output": ["--output", "sheet.png"],
        },
        "export": {"--model": ["--model", "model"], "--output": ["--output", "out.safetensors"]},
        "profile": {"": [*recipe, "--output=unused"], "--windows": ["--windows", "1"], "--pairs": ["--pairs", "2"]},
        "model_card": {"run": ["run"]},
        "relabel": {
            "--source": ["--source", "pairs.parquet"],
            "--judge": ["--judge", "pocket-rules"],
            "--output": ["--output", "labels.parquet"],
        },
        "validate": {"--source": ["--source", "pairs.parquet"]},
        "vote": {
            "--source": ["--source", "pairs.parquet"],
            "--output": ["--output", "v.parquet"],
            "--port": ["--port", "0"],
        },
    }[command]


class Asked(Exception):
    """Carries a command's parser out of it."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """What the command would parse its words with; of a command without one of its own an empty one."""
    module = importlib.import_module(f"inpo_fast.{command}")
    own, sys.argv = sys.argv, [command]
    parse = argparse.ArgumentParser.parse_known_args

    def ask(parser, *_):
        raise Asked(parser)

    argparse.ArgumentParser.parse_known_args = ask
    try:
        module.main()
    except Asked as found:
        return found.args[0]
    except Exception:
        return argparse.ArgumentParser(add_help=False)
    finally:
        argparse.ArgumentParser.parse_known_args, sys.argv = parse, own
    raise AssertionError(f"{command} did not parse")


def words_with(given: dict[str, list[str]], key: str, words: list[str]) -> tuple[str, ...]:
    return tuple(word for name, own in {**given, key: words}.items() for word in own)


def cases_of_options(command: str) -> Iterator[Case]:
    given = valid(command)
    for action in parser_of(command)._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if not action.option_strings:
            for value in [*odd_places(), *odd_words()]:
                yield Case(command, action.dest, value, words_with(given, action.dest, [value]))
            continue
        option = action.option_strings[-1]
        if action.nargs == 0:
            yield Case(command, option, "x", words_with(given, option, [f"{option}=x"]))
            continue
        if action.type is not None and action.type not in (str, Path):
            values = [*odd_numbers(), *odd_words()[:6], LONG]
            values = [
                value for value in values if option not in LASTS or value not in ("1_000", "1000", "1001", "2000")
            ]
        elif action.choices:
            values = odd_words()
        else:
            values = [*odd_words(), *odd_places(), "7", *(OUTSIDE if option in READ else ())]
        for value in values:
            pair = [option, value] if not value.startswith("-") else [f"{option}={value}"]
            many = pair if action.nargs is None else [option, value, value]
            yield Case(command, option, value, words_with(given, option, many))


def cases_of_keys(command: str) -> Iterator[Case]:
    given = valid(command)
    for key, kind in leaves(RunConfig).items():
        beside = [word for name, words in BESIDE.items() if key.startswith(name) for word in words]
        beside = [word for word in beside if not word.startswith(f"--{key}=")]
        beside += ["--dry_run=true"] if key in LASTS else []
        for value in [*values_of_key(kind), *(OUTSIDE if key in READ else ())]:
            words = [*words_with(given, "--output" if key == "output" else "", []), *beside, f"--{key}={value}"]
            yield Case(command, key, value, tuple(words))


def cases_of_yaml() -> Iterator[Case]:
    """Values in a recipe, where their kinds are YAML's; each in the place of the recipe's own."""
    plain = [None, True, 0, -1, 10**30, 0.5, math.nan, math.inf, "", " ", "text", "two\nlines", "nul\0", LONG]
    plain += [[], {}, [1, [2]], {"a": {"b": 1}}, "2024-01-01", "no", "0123", "\x85"]
    for key in leaves(RunConfig):
        for value in plain:
            tree: object = value
            for part in reversed(key.split(".")):
                tree = {part: tree}
            text = yaml.safe_dump(tree, allow_unicode=True)
            yield Case(
                "train",
                f"yaml {key}",
                repr(value),
                ("--config", "tiny.yaml", "--config", f"TEXT:{text}", "--dry_run=true"),
            )
    for group in sorted({key.split(".")[0] for key in leaves(RunConfig) if "." in key}):
        for value in ("3", "null", "[]", "text", "{unknown: 1}", "{? [1] : 2}", "{1: 2}", f"{{{LONG.strip()}: 1}}"):
            yield Case("train", f"yaml {group}", value, ("--config", "tiny.yaml", "--config", f"TEXT:{group}: {value}"))


def all_cases(commands: list[str]) -> list[Case]:
    found: list[Case] = []
    for command in commands:
        found += cases_of_options(command)
        if command in WITH_KEYS:
            found += cases_of_keys(command)
            found += cases_of_yaml()
        if command in CONFIGURED:
            unknown = ["stray", "--unknown", "--unknown=1", "--train.stepss=3", "--", "-x", LONG, "--seed"]
            files = ["", "folder", "file.txt", "empty", "noise.safetensors", "/dev/null"]
            for word in [*unknown, *(f"--config={file}" for file in files)]:
                found.append(Case(command, "", word, (*words_with(valid(command), "", []), word)))
    return found


# ---- executions -----------------------------------------------------------------------------------------------------
def execute(case: Case, place: Path) -> tuple[str, str]:
    """How it ended and what it said on stderr, in a folder of its own beside copies by link of what is there."""
    out, complaints = place / "stdout", place / "stderr"
    words = list(case.words)
    for number, word in enumerate(words):
        if word.startswith("TEXT:"):
            (place / "odd.yaml").write_text(word.removeprefix("TEXT:"), errors="surrogatepass")
            words[number] = "odd.yaml"
    for delay in (0.1, 1, 10, None):  # a machine that others keep busy
        try:
            pid = os.fork()
            break
        except BlockingIOError:
            if delay is None:
                raise
            time.sleep(delay)
    if pid == 0:
        _child(place, out, complaints, f"inpo_fast.{case.command}", words)
    try:
        return _watched(case, pid, out, complaints)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what it may have started


def _watched(case: Case, pid: int, out: Path, complaints: Path) -> tuple[str, str]:
    deadline, status, ended = time.monotonic() + SECONDS, 0, False
    while time.monotonic() < deadline and not ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        ended = done == pid
        if not ended:
            if case.command == "vote" and "Open http" in out.read_text(errors="replace") if out.exists() else False:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return "serves", ""
            select.select([], [], [], 0.01)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "no end", complaints.read_text(errors="replace")[-3000:]
    said = complaints.read_text(errors="surrogateescape")
    code = os.waitstatus_to_exitcode(status)
    good = code == 0 or (code == 1 and case.command == "validate" and "Traceback" not in said)
    lines = said.splitlines()
    if "Traceback" in said:
        return "traceback", said[-3000:]
    if good:
        return "taken", said
    if code != 2:
        return f"status {code}", said[-3000:]
    if len(lines) != 1:
        return f"{len(lines)} lines", said[-3000:]
    if len(lines[0]) > 1400 or LONG[:220] in said:
        return "long", said[:3000]
    return "refused", said


def _child(place: Path, out: Path, complaints: Path, module: str, words: list[str]) -> None:
    code = 0
    try:
        os.setsid()
        for number, path in ((1, out), (2, complaints)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(place)
        os.environ["INPO_FAST_TRACEBACK"] = "1"
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        run_command(module, *words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def sweep(
    cases: list[Case], world: Path, seconds: float = 1e9
) -> tuple[Counter, list[tuple[Case, str, str]], list[Case]]:
    """Ends by kind, the findings, and the odd values that were taken."""
    if len(cases) > 200:
        _import_all()
    ends, findings, taken = Counter(), [], []
    deadline = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > deadline:
            break
        with tempfile.TemporaryDirectory(dir=world.parent, ignore_cleanup_errors=True) as name:  # cheap: hard links
            place = Path(name)
            for thing in world.iterdir():
                if thing.name in ("locked", "folder"):
                    (place / thing.name).mkdir(mode=0o700 if thing.name == "folder" else 0o500)
                elif thing.is_dir():
                    shutil.copytree(thing, place / thing.name, copy_function=os.link)
                else:
                    shutil.copy2(thing, place / thing.name)
            end, said = execute(case, place)
            (place / "locked").chmod(0o700)
        ends[end] += 1
        if end == "taken":
            taken.append(case)
        elif end not in ("refused", "serves"):
            findings.append((case, end, said))
            print(f"FINDING {end}: {case}\n    {said[-1200:]}", flush=True)
    return ends, findings, taken


def in_a_world(cases: list[Case]) -> tuple[Counter, list[tuple[Case, str, str]], list[Case]]:
    """As `sweep`, in a temporary world of its own with a finished run."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        world, here = Path(name) / "world", os.getcwd()
        world.mkdir()
        make_world(world)
        end, said = execute(Case("train", "", "", ("--config", "tiny.yaml", "--output", "run")), world)
        assert end == "taken", said
        assert os.getcwd() == here
        return sweep(cases, world)


def _import_all() -> None:
    """What a command imports, once and not in every process."""
    for module in pkgutil.walk_packages(inpo_fast.__path__, "inpo_fast."):
        importlib.import_module(module.name)
    import peft  # noqa: F401

    gc.collect()
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=[], help="default: all")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--part", default="1/1", help="such as 2/4: each of several processes takes its share")
    parser.add_argument("--accepted", action="store_true", help="list the odd values that were taken")
    parser.add_argument("--refusals", action="store_true", help="show what is said")
    own = parser.parse_args()
    cases = all_cases(own.commands or list(COMMANDS))
    cases = [case for case in cases if own.only is None or own.only in str(case)]
    part, parts = map(int, own.part.split("/"))
    ends, findings, taken = in_a_world(cases[part - 1 :: parts])
    if own.accepted:
        for case in taken:
            print(f"taken: {case}")
    print(f"{ends.total()} executions, {dict(ends)}, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
