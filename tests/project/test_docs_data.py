"""The examples of docs/data.md, each run as it stands there, in an empty folder."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = {s.splitlines()[0]: s for s in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
EXAMPLES = [
    pytest.param(code, id=f"{title}-{number}")
    for title, section in SECTIONS.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "assert " in code
    exec(compile(code, "docs/data.md", "exec"), {})


def test_every_source_has_an_example():
    for title in ("Parquet", "Folder", "HPDv2 and HPDv3", "Webdataset"):
        assert "```python" in SECTIONS[title]
