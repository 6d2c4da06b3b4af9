"""Every command's --help: it says how the command is written, and imports no library that takes seconds."""

import json
import subprocess
import sys

import pytest
from test_imports import NEEDS, ROOT

COMMANDS = sorted(f"inpo_fast.{path.stem}" for path in (ROOT / "inpo_fast").glob("*.py") if path.stem != "__init__")
OLD_NAMES = {"inpo_fast.data.validate": "inpo_fast.validate"}
SLOW = {"bitsandbytes", "diffusers", "matplotlib", "peft", "tensorboard", "transformers", "wandb"}
PROGRAM = """
import contextlib, io, json, runpy, sys
found = {}
for name in sys.argv[1:]:
    sys.argv, said = [name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__")
    found[name] = said.getvalue(), list(sys.modules)
print(json.dumps(found))
"""


def test_what_takes_seconds_is_imported_when_signals_are_answered():
    """Ctrl-C while torch is imported: every command imports it within run_command, which has the handlers."""
    words = [sys.executable, "-c", "import sys, importlib; [importlib.import_module(name) for name in sys.argv[1:]];"]
    words[-1] += "print([name for name in ('torch', 'numpy', 'pyarrow', 'jsonargparse') if name in sys.modules])"
    done = subprocess.run([*words, *COMMANDS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def helps():
    """name -> (what its --help says, what is imported after it): one process for all, one after the other."""
    words = [sys.executable, "-c", PROGRAM, *COMMANDS, *OLD_NAMES]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_commands_are_found():
    assert {"inpo_fast.train", "inpo_fast.evaluate", "inpo_fast.validate"} <= set(COMMANDS)


@pytest.mark.parametrize("name", [*COMMANDS, *OLD_NAMES])
def test_help_is_quick_and_says_how_the_command_is_written(helps, name):
    said, imported = helps[name]
    assert said.startswith(f"usage: python -m {OLD_NAMES.get(name, name)} ")
    assert not SLOW & set(imported)


def test_nothing_imports_a_command():
    commands = {*COMMANDS, *OLD_NAMES, "inpo_fast.pocket.build"}
    assert not {name for name, needs in NEEDS.items() if needs & commands}
