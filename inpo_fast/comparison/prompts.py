"""Sets of prompts to evaluate on, with the groups that results are told apart by.

    prompts.txt               one prompt a line
    FOLDER                    HPDv2's test set: anime.json, concept-art.json, paintings.json, photo.json, a list each
    PartiPrompts.tsv          columns Prompt, Category, Challenge, Note
    *.parquet, FOLDER, hf://… captions of Pick-a-Pic's schema, or a column prompt
    prompts.json              a list of texts
    prompts.jsonl, .csv       a line or row each, with prompt or caption

A prompt that is listed again is one prompt, told in one line: intervals take prompts to be independent. The same prompt
is what differs in white space, upper and lower case, or Unicode's form only; CLIP's tokenizer sees no difference. It
belongs to every group in which it is listed.

Parti and HPDv2 come from their GitHub repository and `hf://datasets/zhwang/HPDv2`; any fsspec URL of parquet is read as
it is.
"""

import csv
import io
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pyarrow.parquet as pq

from inpo_fast.data.places import find, is_url
from inpo_fast.data.text import unusable
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import parse_json, read_text
from inpo_fast.runtime.masking import keep_secrets_of, masked
from inpo_fast.runtime.warn_once import warn_once

log = logging.getLogger(__name__)

HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
PUBLISHED = {"hpdv2": 3200, "parti": 1632, "pickapic": 500}  # prompts of the published test sets, as they are listed
COLUMNS = ("prompt", "caption", "text")  # of a table of prompts, whatever their case
Rows = list[tuple[str, dict[str, str]]]  # a prompt and its group of each kind


@dataclass(frozen=True)
class PromptSet:
    """kind: text, hpdv2, parti or pickapic. prompts: each once. groups: "style" -> "anime" -> places in `prompts`, in
    which a prompt of two styles stands twice. repeated: listings that were left out. published: whether this is the
    whole published test set, as far as its size tells."""

    kind: str
    prompts: list[str]
    groups: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    repeated: int = 0
    published: bool = False


def read_prompt_set(path: str, limit: int | None = None) -> PromptSet:
    """limit: that many prompts, spread evenly over the set. UserError where there is none."""
    if not path.strip():
        raise UserError("evaluate: the place of the prompts is empty; name a file or folder")
    keep_secrets_of(path)
    kind, rows = _read(path)
    found = _once(kind, rows)
    if not found.prompts:
        raise UserError(f"evaluate: {path} has no prompt; write one a line")
    for number, prompt in enumerate(found.prompts, 1):
        if wrong := unusable(prompt):
            raise UserError(f"evaluate: {masked(path)}: prompt {number}: {wrong}; mend it or take it out")
    if found.repeated:
        said = "prompts is listed again; it counts" if found.repeated == 1 else "prompts are listed again; each counts"
        warn_once(log, "%s: %d of %d %s once", masked(path), found.repeated, found.repeated + len(found.prompts), said)
    if limit is None or limit >= len(found.prompts):
        return found
    kept = {i * len(found.prompts) // limit: row for row, i in enumerate(range(limit))}
    groups = {
        name: {label: own for label, places in labels.items() if (own := [kept[i] for i in places if i in kept])}
        for name, labels in found.groups.items()
    }
    return PromptSet(found.kind, [found.prompts[i] for i in kept], groups, found.repeated)


def read_prompts(path: str) -> list[str]:
    return read_prompt_set(path).prompts


def same(prompt: str) -> str:
    """Equal for prompts that are one and the same."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _once(kind: str, rows: Rows) -> PromptSet:
    """Each prompt once, as it is written first, in the order of the listing."""
    places: dict[str, int] = {}
    prompts: list[str] = []
    groups: dict[str, dict[str, list[int]]] = {}
    rows = [(prompt.strip(), labels) for prompt, labels in rows if prompt.strip()]
    for prompt, labels in rows:
        place = places.setdefault(same(prompt), len(prompts))
        if place == len(prompts):
            prompts.append(prompt)
        for name, label in labels.items():
            own = groups.setdefault(name, {}).setdefault(label, [])
            if place not in own:
                own.append(place)
    return PromptSet(kind, prompts, groups, len(rows) - len(prompts), _published(kind, rows))


def _published(kind: str, rows: Rows) -> bool:
    if kind == "hpdv2" and any(sum(labels["style"] == style for _, labels in rows) != 800 for style in HPD_STYLES):
        return False
    return PUBLISHED.get(kind) == len(rows)


def _read(path: str) -> tuple[str, Rows]:
    """The kind of set, and what it lists."""
    here = Path(path).expanduser()
    if here.is_dir() and (here / f"{HPD_STYLES[0]}.json").exists():
        return "hpdv2", _hpd(here)
    if path.endswith(".parquet") or is_url(path) or here.is_dir():
        return "pickapic", _captions(path)
    text = _text(here)
    suffix = here.suffix.lower()
    if suffix == ".tsv":
        return "parti", _parti(here, text)
    if suffix == ".json":
        return "text", _plain(_list(here, text))
    if suffix == ".jsonl":
        return "text", _plain(_lines_of_json(here, text))
    if suffix == ".csv":
        return "text", _plain(_csv(here, text))
    return "text", _plain(text.splitlines())


def _plain(prompts: Iterable[str]) -> Rows:
    return [(prompt, {}) for prompt in prompts]


def _hpd(folder: Path) -> Rows:
    rows = []
    for style in HPD_STYLES:
        path = folder / f"{style}.json"
        rows += [(prompt, {"style": style}) for prompt in _list(path, _text(path))]
    return rows


def _parti(path: Path, text: str) -> Rows:
    # quotes stand for themselves in this file
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or "Prompt" not in rows[0]:
        raise UserError(f"evaluate: {path} has no column Prompt; expected Prompt, Category, Challenge, Note, with tabs")
    names = [name for name in ("Category", "Challenge") if name in rows[0]]
    return [(row["Prompt"] or "", {name.lower(): (row.get(name) or "none").strip() for name in names}) for row in rows]


def _csv(path: Path, text: str) -> list[str]:
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as problem:
        raise UserError(f"evaluate: {path} is not CSV ({problem})") from problem
    column = _column([name for name in (rows[0] if rows else {}) if name])
    if column is None:
        raise UserError(
            f"evaluate: {path} has no column {' or '.join(COLUMNS)}; name one so, or write one prompt a line"
        )
    return [row[column] or "" for row in rows]


def _column(names: Sequence[str]) -> str | None:
    by_name = {name.strip().lower(): name for name in reversed(names)}
    return next((by_name[name] for name in COLUMNS if name in by_name), None)


def _lines_of_json(path: Path, text: str) -> list[str]:
    out = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = parse_json(line)
        except (ValueError, RecursionError) as problem:
            raise UserError(f"evaluate: {path}:{number} is not JSON ({problem})") from problem
        column = _column([*found]) if isinstance(found, dict) else None
        found = found[column] if column is not None else found
        if not isinstance(found, str):
            raise UserError(f"evaluate: {path}:{number} has no text under {' or '.join(COLUMNS)}")
        out.append(found)
    return out


def _captions(path: str) -> Rows:
    files = find(path, (".parquet",))
    if not files:
        raise UserError(f"evaluate: {path} is neither HPDv2's four lists nor a place with .parquet files")
    captions: list[str] = []
    for file in files:
        try:
            with fsspec.open(file.path, "rb") if file.fs is None else file.fs.open(file.path, "rb") as opened:
                table = pq.ParquetFile(opened)
                column = next((name for name in ("caption", "prompt") if name in table.schema_arrow.names), "caption")
                captions += table.read(columns=[column])[column].to_pylist()
        except Exception as problem:  # pyarrow's and the file systems' own kinds
            if file.is_lfs_pointer():
                raise UserError(f"evaluate: {file} {git_lfs.WHAT}") from problem
            line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise UserError(f"evaluate: {file} has no readable column caption ({line})") from problem
    if not all(caption is None or isinstance(caption, str) for caption in captions):
        raise UserError(f"evaluate: {path}: captions are no texts")
    return _plain(dict.fromkeys(caption.strip() for caption in captions if caption))  # many pairs have one prompt


def _list(path: Path, text: str) -> list[str]:
    try:
        found = parse_json(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"evaluate: {path} is not JSON ({problem})") from problem
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise UserError(f"evaluate: {path} is not a list of texts")
    return found


def _text(path: Path) -> str:
    if git_lfs.is_pointer(path):
        raise UserError(f"evaluate: {path} {git_lfs.WHAT}")
    try:
        return read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"evaluate: cannot read the prompts in {path} ({problem})") from problem
