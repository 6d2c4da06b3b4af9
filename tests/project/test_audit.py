""".ci/audit.py: green only when every pinned version was looked up. The answers are in pip-audit 2.10's format."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
audit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)

PINS = """# a remark
numpy==2.1.0 ; python_version < "3.12"
numpy==2.4.0 ; python_version >= "3.12"
Torch_Thing==1.2+cpu
fsspec[s3,gcs]==2025.3
"""
WEAKNESS = {"id": "PYSEC-2025-1", "fix_versions": ["2.4.1"], "aliases": [], "description": "…"}


def answers(change):
    """What stands in for pip-audit: every version is known and good, but for what `change` makes of it."""

    def ask(part, service):
        assert not any("+" in version for _, version in part)  # no index has 1.2+cpu
        known = [{"name": name, "version": version, "vulns": []} for name, version in part]
        return SimpleNamespace(stdout=json.dumps({"dependencies": [change(one) for one in known]}), stderr="")

    return ask


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "constraints.txt").write_text(PINS)
    return ["--constraints", str(tmp_path / "constraints.txt")]


def unknown(one):
    return {"name": one["name"], "skip_reason": f"Dependency not found on PyPI and could not be audited: {one['name']}"}


def test_every_pin_is_looked_up_whatever_python_it_is_for(listed, capsys):
    assert audit.main(listed, answers(lambda one: one)) == 0
    assert capsys.readouterr().out == "audit: 4 of 4 pinned versions checked, 0 known weaknesses\n"


def test_green_is_not_what_a_service_that_knows_nothing_gives(listed, capsys):
    assert audit.main(listed, answers(unknown)) == audit.UNKNOWN
    said = capsys.readouterr().out
    assert "0 of 4 pinned versions checked" in said and "numpy 2.1.0" in said and "could not be audited" in said


def test_one_that_is_unknown_is_named(listed, capsys):
    change = answers(lambda one: unknown(one) if one["name"] == "fsspec" else one)
    assert audit.main(listed, change) == audit.UNKNOWN
    assert "3 of 4 pinned versions checked, 0 known weaknesses; not checked: fsspec 2025.3" in capsys.readouterr().out


def test_a_weakness_is_named_with_what_mends_it(listed, capsys):
    change = answers(lambda one: one | {"vulns": [WEAKNESS]} if one["version"] == "2.4.0" else one)
    assert audit.main(listed, change) == audit.WEAK
    assert "numpy 2.4.0: PYSEC-2025-1, mended in 2.4.1" in capsys.readouterr().out


def test_no_answer_says_so(listed, capsys):
    silent = SimpleNamespace(stdout="", stderr="requests.exceptions.ConnectionError: no route\n")
    assert audit.main(listed, lambda part, service: silent) == audit.NO_SERVICE
    assert "0 of 4 pinned versions checked: pypi does not answer" in capsys.readouterr().out


def test_nothing_pinned_is_nothing_checked(tmp_path):
    (tmp_path / "empty.txt").write_text("# none\n")
    assert audit.main(["--constraints", str(tmp_path / "empty.txt")], answers(lambda one: one)) == audit.UNKNOWN


def test_the_projects_own_pins_are_read():
    pinned = audit.pins([ROOT / "constraints.txt"])
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line.partition("#")[0]]
    assert len(pinned) >= 100 and {name for name, _ in pinned} >= {"torch", "diffusers", "transformers"}
    assert len(pinned) <= len(lines)
