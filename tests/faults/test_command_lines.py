"""Odd values for options and keys of every command: a result, or one line. All: tests/faults/command_lines.py."""

import random

import pytest
from faults.command_lines import COMMANDS, LONG, READ, all_cases, in_a_world
from tiny_runs import Forked

SHORT = 40  # executions, spread over all commands
REFUSED = ("nan", "-inf", "-0.5", f"{10**30}", "9" * 5000, LONG, "[[", "{a: 1, a: 2}", "two\nlines", "d/" * 150 + "x")


def swept(place, number: int, seed: int) -> None:
    draw = random.Random(seed)
    cases = all_cases(list(COMMANDS))
    if number == SHORT:  # values that are seldom taken: a run takes a hundred times as long as a refusal
        cases = [case for case in cases if case.value in REFUSED and not case.key.startswith("--prompt")]
    ends, findings, _ = in_a_world(draw.sample(cases, min(number, len(cases))))
    print(f"{ends.total()} executions, {dict(ends)}, {len(findings)} findings")


def test_every_command_and_most_keys_are_tried():
    cases = all_cases(list(COMMANDS))
    assert {case.command for case in cases} == set(COMMANDS)
    assert len({case.key for case in cases if case.command == "train"}) > 150 and len(cases) > 5000
    for option in ("--steps", "--seeds", "--batch", "--output", "--prompts"):
        assert sum(case.key == option for case in cases if case.command == "sample") > 20


def test_no_value_leads_out_of_the_world_but_for_what_is_read():
    """As root, `--json=/dev/null` once put a file in the device's place, and `--output=/` a run into the root."""
    for case in all_cases(list(COMMANDS)):
        if case.key and case.key not in READ:
            assert not case.value.startswith("/") and ".." not in case.value.split("/"), case


def test_odd_values(tmp_path):
    process = Forked(tmp_path / "sweep", swept, None, SHORT, 0)
    assert process.wait() == 0, process.complaints.read_text()[-2000:]
    said = process.said.read_text()
    assert f"{SHORT} executions" in said and said.rstrip().endswith(" 0 findings"), said


@pytest.mark.slow
def test_odd_values_at_length(tmp_path):
    process = Forked(tmp_path / "sweep", swept, None, 1500, 1)
    assert process.wait(3600) == 0, process.complaints.read_text()[-2000:]
    said = process.said.read_text()
    assert said.rstrip().endswith(" 0 findings"), said
