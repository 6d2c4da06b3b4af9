#!/usr/bin/env bash
# pytest and torch.compile: torch writes a structured trace of what it compiles (graphs, guards, code) only where somebody
# reads it, that is, where the logger torch.__trace has a handler; without TORCH_TRACE it removes its own. pytest gives
# its capturing handler to every logger that does not propagate, and torch.__trace is one. So under pytest the whole
# trace is made, formatted and kept until the test ends, at level DEBUG whatever --log-level says. In our tests of
# torch.compile it was 8 % of the processor time; a failed test prints it all. `-p no:logging`, or
# logging.getLogger("torch.__trace").propagate = True before the first test, ends it.
#
# Seen (Python 3.11, x86_64, CPU):
#   plain python: 1 record (then torch removes its own handler)
#   pytest: 35 records at level DEBUG, of one compiled function
#   pytest, propagate = True: 1 record
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PIP_FIND_LINKS PIP_CONSTRAINT PIP_EXTRA_INDEX_URL
export PIP_CONFIG_FILE=/dev/null
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pytest==9.2.0
cat >"$folder/compiled.py" <<'PY'
import logging

import torch


def records(propagate: bool = False) -> int:
    """Of torch.__trace, while one function is compiled."""
    seen = []
    log = logging.getLogger("torch.__trace")
    log.propagate = log.propagate or propagate
    handle = log.handle
    log.handle = lambda record: (seen.append(record), handle(record))
    torch.compile(lambda x: (x + 1).relu(), backend="eager")(torch.ones(3))
    assert all(record.levelno == logging.DEBUG for record in seen)
    return len(seen)
PY
cat >"$folder/test_plain.py" <<'PY'
from compiled import records


def test_it():
    print(f"pytest: {records()} records")
PY
cat >"$folder/test_told.py" <<'PY'
import logging

import torch  # noqa: F401
from compiled import records

logging.getLogger("torch.__trace").propagate = True


def test_it():
    print(f"pytest, propagate = True: {records(propagate=True)} records")
PY
cd "$folder"
{
    venv/bin/python -c 'import compiled; print("plain python:", compiled.records(), "records")'
    venv/bin/python -m pytest -q -s test_plain.py
    venv/bin/python -m pytest -q -s test_told.py
} | grep records | tee seen.txt
grep -qE '^plain python: [01] records$' seen.txt
count=$(sed -nE 's/^pytest: ([0-9]+) records$/\1/p' seen.txt)
[ "$count" -gt 10 ]
grep -qE '^pytest, propagate = True: [01] records$' seen.txt
