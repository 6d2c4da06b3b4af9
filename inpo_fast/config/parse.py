"""Command line and YAML to a checked configuration: `--group.key=value`. Strict: an unknown key is an error."""

import difflib
import functools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from inpo_fast.config import shipped
from inpo_fast.config.rules import check
from inpo_fast.config.run import RunConfig, flat, to_dict, to_yaml
from inpo_fast.config.values import from_word, leaves, of_kind, quoted, types_of
from inpo_fast.runtime.errors import UserError, shorten_when_quoted, shortened
from inpo_fast.runtime.masking import keep_secrets_of
from inpo_fast.runtime.yaml_text import MOST, read_yaml

SWITCHES = {  # may stand without a value
    "--resume": "--resume",
    "--overwrite": "--overwrite",
    "--dry-run": "--dry_run",
    "--accept-changed-inputs": "--accept_changed_inputs",
}
SHOW = "--print_config"


def parse(program: str, arguments: list[str] | None = None) -> RunConfig:
    """Command line (and the YAML files it names) to a checked configuration; of the same key twice on the command line
    the later one counts, as with --config. UserError on any mistake."""
    words = sys.argv[1:] if arguments is None else arguments
    for word in words:
        if word in ("-h", "--help") or re.fullmatch(r"--[\w.]+\.help", word):
            _help(program, words)
    tree, named = {}, []
    left = iter(words)
    for word in left:
        if word == SHOW:
            continue
        key, equals, value = word.partition("=")
        if word in SWITCHES:
            key, value = SWITCHES[word], "true"
        elif not equals:
            value = _next(word, left)
        key = SWITCHES.get(key, key).removeprefix("--")
        if key == "config":
            settings, path = _of_config(value)
            named += [path] if path is not None else []
            _put(tree, settings)
        else:
            _put(tree, _of_word(key, value))
    name = named[-1].stem if named else "unnamed"
    config: RunConfig = _made(RunConfig, {"output": str(Path("runs") / name)} | _without_null(tree, "output"))
    for value in flat(to_dict(config)).values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                keep_secrets_of(text)
    check(config)
    if SHOW in words:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def _help(program: str, words: list[str]) -> None:
    """Ends with the --help that the dataclasses' docstrings make."""
    from jsonargparse import ArgumentParser, set_parsing_settings  # a sixth of a second, with what it does here

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its --help
    parser = ArgumentParser(prog=program, description=RunConfig.__doc__, allow_abbrev=False)
    about = "YAML file with any of the keys below, or a shipped recipe's name, such as sd15; later ones win"
    parser.add_argument("--config", action="config", help=about)
    parser.add_class_arguments(RunConfig, nested_key=None, as_group=False)
    parser.parse_args([word for word in words if word in ("-h", "--help") or word.endswith(".help")])


def _next(word: str, left) -> str:
    """The value of `--key value`."""
    if not word.startswith("--"):
        raise UserError(f"unrecognized arguments: {quoted(word)}; settings are given as --key=value (--help lists all)")
    value = next(left, None)
    if value is None or value.startswith("--"):
        if word != "--config":
            _check_key(word.removeprefix("--"))
        raise UserError(f"{shortened(word)} has no value; write {shortened(word)}=VALUE")
    return value


# ---- where settings come from ---------------------------------------------------------------------------------------
def _of_config(asked: str) -> tuple[dict, Path | None]:
    """The settings that --config means, and the file that they are in. A shipped recipe's paths lead into the
    package."""
    if _is_yaml_mapping(asked):
        return _checked("--config", read_yaml(asked, "--config")), None
    path = shipped.find(asked)
    tree = _read(path)
    return _checked(f"--config {path}", shipped.lead_home(tree) if shipped.is_shipped(path) else tree), path


def _read(path: Path) -> dict:
    """The settings in a file. UserError where it holds something else."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST + 1)
    except OSError as problem:
        raise UserError(f"--config {path}: cannot be read ({problem.strerror})") from problem
    except UnicodeDecodeError as problem:
        raise UserError(f"--config {path}: not text in UTF-8 ({problem})") from problem
    tree = read_yaml(text, f"--config {path}")
    shorten_when_quoted(_words_in(tree))
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: holds no settings; a recipe has lines such as `method: inpo`")
    return tree


def _words_in(tree: object) -> Iterator[str]:
    """Of the settings themselves; what is deeper than any setting is refused before it is quoted."""
    for value in tree.values() if isinstance(tree, dict) else ():
        if isinstance(value, str):
            yield value
        for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            if isinstance(below, str):
                yield below
            elif isinstance(below, dict):
                yield from (word for word in below.values() if isinstance(word, str))


def _is_yaml_mapping(text: str) -> bool:
    """Settings on the command line, `--config '{seed: 3}'`, and not a file's name."""
    if os.path.exists(text):
        return False
    try:
        return isinstance(read_yaml(text, ""), dict)
    except UserError:
        return text.lstrip().startswith("{")


def _of_word(key: str, value: str) -> dict:
    """The settings of `--key=value`; a group takes them as YAML, `--train='{steps: 3}'`."""
    kind = _check_key(key)
    if is_dataclass(kind):
        tree: object = read_yaml(value, f"--{key}")
        for part in reversed(key.split(".")):
            tree = {part: tree}
        return _checked("", tree)
    tree = from_word(key, kind, value)
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def _checked(where: str, tree: dict, kind: type = RunConfig, prefix: str = "") -> dict:
    """Settings as YAML has them, with values of the dataclasses' types. `train.steps: 3` is `train: {steps: 3}`."""
    found, begin = {}, f"{where}: " if where else ""
    for name, value in tree.items():
        key = prefix + name
        if key == "config":
            raise UserError(f"{begin}config is of the command line, where it may be given several times")
        if key not in _kinds():
            below = key
            while isinstance(value, dict) and value:  # the group may be the one that is misspelt
                name, value = next(iter(value.items()))
                below += f".{name}"
            _check_key(below if below.count(".") <= 4 else key, begin)
        own = _kinds()[key]
        if is_dataclass(own):
            if not isinstance(value, dict):
                raise UserError(f"{begin}{key} is {quoted(value)}, expected keys below it or no such line")
            value = _checked(where, value, own, f"{key}.")
        else:
            try:
                value = of_kind(key, own, value)
            except UserError as problem:
                raise UserError(f"{begin}{problem}") from problem
        first, *below = name.split(".")
        for part in reversed(below):
            value = {part: value}
        _put(found, {first: value}, begin, prefix)
    return found


def _put(tree: dict, settings: dict, where: str | None = None, prefix: str = "") -> None:
    """Adds settings to others, the new ones in place of the old. where: in one file no key may be given twice, as
    `train.steps` and below `train`."""
    for name, value in settings.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict) and is_dataclass(_kinds().get(prefix + name)):
            _put(tree[name], value, where, f"{prefix}{name}.")
        elif where is not None and name in tree:
            raise UserError(f"{where}{prefix}{name} stands twice: one of them would be lost")
        else:
            tree[name] = value


# ---- keys -----------------------------------------------------------------------------------------------------------
@functools.cache
def _kinds(kind: type = RunConfig, prefix: str = "") -> dict[str, type]:
    """Dotted key -> type, groups too."""
    found = {}
    for f in fields(kind):
        own = types_of(kind)[f.name]
        found[prefix + f.name] = own
        if is_dataclass(own):
            found |= _kinds(own, f"{prefix}{f.name}.")
    return found


def _check_key(key: str, where: str = "") -> type:
    known = _kinds()
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key[:100], list(known), n=1, cutoff=0.6) or [
        name for name in leaves(RunConfig) if name.split(".")[-1] == key.split(".")[-1]
    ]
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(f"{where}unknown key '{shortened(key)}'{hint} (--help lists all)")


def _without_null(tree: dict, key: str) -> dict:
    return {name: value for name, value in tree.items() if name != key or value is not None}


def _made(kind: type, tree: dict):
    """The dataclass, with its defaults where the tree says nothing."""
    given = {}
    for f in fields(kind):
        if f.name in tree:
            value, own = tree[f.name], types_of(kind)[f.name]
            value = _made(own, value) if is_dataclass(own) else tuple(value) if isinstance(value, list) else value
            given[f.name] = value
    return kind(**given)
