"""YAML as recipes are written: the numbers and words of YAML 1.2, and no key twice.

PyYAML by itself keeps the last of two equal keys in silence and reads YAML 1.1, where `off` and `no` are false, 0123 is
83, 1:30 is 90, 1e-3 a text and 2024-01-01 a date.
"""

import re

import yaml

from inpo_fast.runtime.errors import UserError, one_line, shortened

MOST = 4 * 2**20  # characters; a recipe has a few thousand


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012


class Dumper(yaml.SafeDumper):
    """Writes what both readers, this one and PyYAML's own, take for the same."""


for tag, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*|(?=[eE])))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|"
              r"\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ("merge", r"<<", "<"),
):  # fmt: skip
    resolver = re.compile(rf"^(?:{pattern})$")
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", resolver, list(first))
    Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", resolver, list(first))


def _mapping(loader: Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen: dict[object, yaml.Node] = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue  # what a merge brings may be given again
        name = loader.construct_object(key, deep=True)
        if not isinstance(key, yaml.ScalarNode) or not isinstance(name, str):
            said = f"the key {shortened(str(name))!r} is no word; put it in quotes"
            raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
        if name in seen:
            first, again = seen[name].start_mark.line + 1, key.start_mark.line + 1
            lines = f"on lines {first} and {again}" if again != first else f"twice on line {first}"
            raise UserError(f"{name!r} stands {lines}: one of them would be lost; put what is below them together")
        seen[name] = key
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: _mapping(loader, node))


def read_yaml(text: str, where: str) -> object:
    """What a text holds. UserError, which begins with `where`, of what is no YAML or has a key twice."""
    if len(text) > MOST:
        raise UserError(f"{where}: {len(text):,} characters long; a recipe has a few thousand")
    try:
        return yaml.load(text, Loader)
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from problem
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        at = f" on line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        tab = mark is not None and text.splitlines()[mark.line : mark.line + 1] and "\t" in text.splitlines()[mark.line]
        more = "; tabs cannot indent a line: take spaces" if tab else ""
        raise UserError(f"{where}: not YAML{at} ({problem.problem or problem.context}{more})") from problem
    except yaml.YAMLError as problem:  # characters that no YAML may have
        raise UserError(f"{where}: not YAML ({one_line(problem)})") from problem
    except RecursionError as problem:
        raise UserError(f"{where}: not a recipe (lists or groups inside each other without end)") from problem
    except Exception as problem:  # PyYAML's constructors: a number of thousands of digits, a 13th month, `!!bool x`
        said = one_line(problem) or type(problem).__name__
        raise UserError(f"{where}: a value is not what it says that it is ({said})") from problem


def to_text(tree: object) -> str:
    """A tree of plain values as a recipe, keys in their order."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
