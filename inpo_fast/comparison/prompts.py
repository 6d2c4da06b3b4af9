"""Sets of prompts to evaluate on, with the groups that results are told apart by.

    prompts.txt               one prompt a line
    FOLDER                    HPDv2's test set: anime.json, concept-art.json, paintings.json, photo.json, a list each
    PartiPrompts.tsv          columns Prompt, Category, Challenge, Note
    *.parquet, FOLDER, hf://… captions of Pick-a-Pic's schema; each different one once, in their order
    prompts.json              a list of texts

Parti and HPDv2 come from their GitHub repository and `hf://datasets/zhwang/HPDv2`; any fsspec URL is read as it is.
"""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pyarrow.parquet as pq

from inpo_fast.data.places import find, is_url
from inpo_fast.data.text import unusable
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import read_text

HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
PUBLISHED = {"hpdv2": 3200, "parti": 1632, "pickapic": 500}  # prompts of the published test sets


@dataclass(frozen=True)
class PromptSet:
    """kind: text, hpdv2, parti or pickapic. groups: "style" -> the style of each prompt."""

    kind: str
    prompts: list[str]
    groups: dict[str, list[str]] = field(default_factory=dict)

    @property
    def published(self) -> bool:
        """Whether this is the whole published test set, as far as its size tells."""
        if self.kind == "hpdv2" and any(self.groups["style"].count(style) != 800 for style in HPD_STYLES):
            return False
        return PUBLISHED.get(self.kind) == len(self.prompts)


def read_prompt_set(path: str, limit: int | None = None) -> PromptSet:
    """limit: that many prompts, spread evenly over the set. UserError where there is none."""
    if not path.strip():
        raise UserError("evaluate: the place of the prompts is empty; name a file or folder")
    found = _read(path)
    if not found.prompts:
        raise UserError(f"evaluate: {path} has no prompt; write one a line")
    for number, prompt in enumerate(found.prompts, 1):
        if wrong := unusable(prompt):
            raise UserError(f"evaluate: {path}: prompt {number}: {wrong}; mend it or take it out")
    if limit is None or limit >= len(found.prompts):
        return found
    rows = [i * len(found.prompts) // limit for i in range(limit)]
    groups = {name: [values[i] for i in rows] for name, values in found.groups.items()}
    return PromptSet(found.kind, [found.prompts[i] for i in rows], groups)


def read_prompts(path: str) -> list[str]:
    return read_prompt_set(path).prompts


def _read(path: str) -> PromptSet:
    here = Path(path).expanduser()
    if here.is_dir() and (here / f"{HPD_STYLES[0]}.json").exists():
        return _hpd(here)
    if path.endswith(".parquet") or is_url(path) or here.is_dir():
        return _captions(path)
    text = _text(here)
    if here.suffix == ".tsv":
        return _parti(here, text)
    if here.suffix == ".json":
        return PromptSet("text", _list(here, text))
    return PromptSet("text", _unique(line.strip() for line in text.splitlines()))


def _hpd(folder: Path) -> PromptSet:
    prompts, styles = [], []
    for style in HPD_STYLES:
        path = folder / f"{style}.json"
        some = _list(path, _text(path))
        prompts += some
        styles += [style] * len(some)
    return PromptSet("hpdv2", prompts, {"style": styles})


def _parti(path: Path, text: str) -> PromptSet:
    # quotes stand for themselves in this file
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or "Prompt" not in rows[0]:
        raise UserError(f"evaluate: {path} has no column Prompt; expected Prompt, Category, Challenge, Note, with tabs")
    rows = [row for row in rows if (row["Prompt"] or "").strip()]
    groups = {
        name.lower(): [(row.get(name) or "none").strip() for row in rows]
        for name in ("Category", "Challenge")
        if name in rows[0]
    }
    return PromptSet("parti", [row["Prompt"].strip() for row in rows], groups)


def _captions(path: str) -> PromptSet:
    files = find(path, (".parquet",))
    if not files:
        raise UserError(f"evaluate: {path} is neither HPDv2's four lists nor a place with .parquet files")
    captions: list[str] = []
    for file in files:
        try:
            with fsspec.open(file.path, "rb") if file.fs is None else file.fs.open(file.path, "rb") as opened:
                captions += pq.read_table(opened, columns=["caption"])["caption"].to_pylist()
        except Exception as problem:  # pyarrow's and the file systems' own kinds
            if file.is_lfs_pointer():
                raise UserError(f"evaluate: {file} {git_lfs.WHAT}") from problem
            line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise UserError(f"evaluate: {file} has no readable column caption ({line})") from problem
    return PromptSet("pickapic", _unique(caption.strip() for caption in captions if caption))


def _list(path: Path, text: str) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError as problem:
        raise UserError(f"evaluate: {path} is not JSON ({problem})") from problem
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise UserError(f"evaluate: {path} is not a list of texts")
    return [prompt.strip() for prompt in found if prompt.strip()]


def _unique(prompts) -> list[str]:
    return list(dict.fromkeys(prompt for prompt in prompts if prompt))


def _text(path: Path) -> str:
    if git_lfs.is_pointer(path):
        raise UserError(f"evaluate: {path} {git_lfs.WHAT}")
    try:
        return read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"evaluate: cannot read the prompts in {path} ({problem})") from problem
