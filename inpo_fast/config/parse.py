"""Command line and YAML to a checked configuration: `--group.key=value`. Strict: an unknown key is an error."""

import difflib
import functools
import re
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from inpo_fast.config import shipped
from inpo_fast.config.rules import check
from inpo_fast.config.run import RunConfig, flat, to_dict
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.masking import keep_secrets_of

SWITCHES = {"--resume": "--resume", "--overwrite": "--overwrite", "--dry-run": "--dry_run"}  # may stand without a value

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its --help


class StrictParser(ArgumentParser):
    """Errors are one line: the key, the nearest known name, the remedy."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_explain(message, _keys(RunConfig)))


@functools.cache  # it takes a sixth of a second, most of what parsing takes
def make_parser(program: str) -> StrictParser:
    parser = StrictParser(prog=program, description=RunConfig.__doc__, exit_on_error=False, allow_abbrev=False)
    about = "YAML file with any of the keys below, or a shipped recipe's name, such as sd15; later ones win"
    parser.add_argument("--config", action="config", help=about)
    parser.add_class_arguments(RunConfig, nested_key=None, as_group=False)
    return parser


def parse(program: str, arguments: list[str] | None = None) -> RunConfig:
    """Command line (and the YAML files it names) to a checked configuration. UserError on any mistake."""
    parser = make_parser(program)
    arguments = sys.argv[1:] if arguments is None else arguments
    words, named = _find_files([f"{SWITCHES[word]}=true" if word in SWITCHES else word for word in arguments])
    space = parser.parse_args(words)
    space.pop("config", None)
    config: RunConfig = _instantiate(RunConfig, parser.instantiate(space))
    if config.output is None:
        name = named[-1].stem if named else "unnamed"
        config = replace(config, output=str(Path("runs") / name))
    for value in flat(to_dict(config)).values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                keep_secrets_of(text)
    check(config)
    return config


def _find_files(words: list[str]) -> tuple[list[str], list[Path]]:
    """The words as the parser is to read them, and the files that --config means. A shipped recipe whose paths lead
    elsewhere than they say goes as text."""
    out, named, last = [], [], ""
    for word in words:
        key, equals, asked = word.partition("=") if word.startswith("--config=") else ("", "", word)
        if (key or last) == "--config" and not _is_yaml_mapping(asked):
            named.append(path := shipped.find(asked))
            tree = _read(path)
            led = shipped.lead_home(tree) if shipped.is_shipped(path) else tree
            asked = str(path) if led == tree else yaml.safe_dump(led, sort_keys=False)
        out.append(f"{key}{equals}{asked}")
        last = word
    return out, named


def _read(path: Path) -> dict:
    """The settings in a file. UserError where it holds something else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"--config {path}: cannot be read ({problem.strerror})") from problem
    except UnicodeDecodeError as problem:
        raise UserError(f"--config {path}: not text in UTF-8 ({problem})") from problem
    except yaml.YAMLError as problem:  # jsonargparse reads some of it otherwise
        raise UserError(f"--config {path}: not YAML ({' '.join(str(problem).split())})") from problem
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: holds no settings; a recipe has lines such as `method: inpo`")
    _check_groups(str(path), RunConfig, tree)
    return tree


def _is_yaml_mapping(text: str) -> bool:
    """Settings on the command line, `--config '{seed: 3}'`, and not a file's name."""
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False


def _check_groups(path: str, kind: type, tree: dict, prefix: str = "") -> None:
    """`train: 3` where a group of keys belongs: jsonargparse ignores it or fails in its own way."""
    for f in fields(kind):
        if is_dataclass(f.type) and f.name in tree:
            if not isinstance(tree[f.name], dict):
                raise UserError(f"{path}: {prefix}{f.name} is {tree[f.name]!r}, expected keys below it or no such line")
            _check_groups(path, f.type, tree[f.name], f"{prefix}{f.name}.")


def _instantiate(kind: type, space: Namespace):
    return kind(**{f.name: space[f.name] for f in fields(kind)})


# how jsonargparse words an unknown key, on the command line and in a file
UNKNOWN_KEY = (
    (r"[Uu]nrecognized arguments: --(?P<key>[\w.\-]+)", False),
    (r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", True),
    (r"Option '(?P<key>[\w.]+)' is not accepted", False),
)


def _keys(kind: type, prefix: str = "") -> list[str]:
    names = []
    for f in fields(kind):
        names.append(prefix + f.name)
        if is_dataclass(f.type):
            names += _keys(f.type, prefix + f.name + ".")
    return names


def _explain(message: str, known: list[str]) -> str:
    """jsonargparse's message in one line, with the nearest key when one is unknown."""
    line = " ".join(message.split())
    for pattern, prefix in UNKNOWN_KEY:
        if found := re.search(pattern, line):
            key = ".".join(part for part in (found["group"] if prefix else "", found["key"]) if part)
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
                name for name in known if name.split(".")[-1] == key.split(".")[-1]
            ]
            hint = f"; did you mean '{near[0]}'?" if near else ""
            return f"unknown key '{key}'{hint} (--help lists all)"
    return line
