"""One rule for each kind of value, from the types of the dataclasses: a number is a finite number and no truth value, a
word is a word, a list has no more in it than it should."""

import math
import re
import reprlib
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from inpo_fast.runtime.errors import UserError, shortened
from inpo_fast.runtime.yaml_text import read_yaml

WHOLE = re.compile(r"[-+]?\d+(?:_\d+)*")
DIGITS = 400  # that a whole number has at most
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
PATH = 4096  # bytes; Linux takes no longer one
_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 3, 6, 12, 12
_short.maxstring, _short.maxother, _short.maxlong = 160, 160, 60


def quoted(value: object) -> str:
    """A value as a refusal says it, however large: of nested lists only the beginnings are looked at."""
    return shortened(_short.repr(value))


@cache
def types_of(kind: type) -> dict[str, type]:
    return get_type_hints(kind)


def leaves(kind: type, prefix: str = "") -> dict[str, type]:
    """Dotted key -> type, of all settings that are no groups."""
    found = {}
    for f in fields(kind):
        own = types_of(kind)[f.name]
        found |= leaves(own, f"{prefix}{f.name}.") if is_dataclass(own) else {prefix + f.name: own}
    return found


def from_word(key: str, kind: type, word: str) -> object:
    """A value as it stands on the command line. UserError where it is none of this kind."""
    kinds = _alternatives(kind)
    if NoneType in kinds and word in ("null", "None"):
        return None
    if str in kinds or any(get_origin(one) is Literal for one in kinds):
        return of_kind(key, kind, word)
    if any(get_origin(one) in (tuple, dict) for one in kinds):
        return of_kind(key, kind, read_yaml(word, key))
    return of_kind(key, kind, word.strip())


def of_kind(key: str, kind: type, value: object) -> object:
    """The value as plain YAML has it: a number in quotes is one. UserError where it is none of this kind."""
    kinds = _alternatives(kind)
    if value is None:
        if NoneType in kinds:
            return None
        raise UserError(f"{key} is null; give it a value, or leave the line out for the default")
    (own,) = (one for one in kinds if one is not NoneType)
    read = {bool: _switch, int: _whole, float: _number, str: _word}.get(own)
    if read is not None:
        return read(key, value)
    origin, arguments = get_origin(own), get_args(own)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool | int | float):
            raise UserError(f"{key}={quoted(value)}: must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        many = arguments[-1] is Ellipsis
        need = "a list such as [a, b]" if many else f"a list of {len(arguments)}"
        if not isinstance(value, list | tuple) or (not many and len(value) != len(arguments)):
            raise UserError(f"{key}={quoted(value)}: must be {need}")
        return [of_kind(f"{key}[{i}]", arguments[0], one) for i, one in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key}={quoted(value)}: must be a group such as {{word: 0.5}}")
        return {name: of_kind(f"{key}.{shortened(name, 60)}", arguments[1], one) for name, one in value.items()}
    raise TypeError(f"{key}: no rule for the kind {kind}")


def _alternatives(kind: type) -> tuple[type, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _switch(key: str, value: object) -> bool:
    if isinstance(value, str) and value.lower() in SWITCH:
        return SWITCH[value.lower()]
    if not isinstance(value, bool):
        raise UserError(f"{key}={quoted(value)}: must be true or false")
    return value


def _whole(key: str, value: object) -> int:
    if isinstance(value, str) and len(value) <= DIGITS and WHOLE.fullmatch(value):
        if len(value.lstrip("+-")) > 1 and value.lstrip("+-").startswith("0"):
            raise UserError(f"{key}={quoted(value)}: must be a whole number, without a 0 before it")
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{key}={quoted(value)}: must be a whole number")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{key}={quoted(value)}: must be a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key}={quoted(value)}: must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{key}={quoted(value)}: must be a finite number")
    return number


def _word(key: str, value: object) -> str:
    if not isinstance(value, str):
        more = "; if it is a name, put it in quotes" if isinstance(value, bool | int | float) else ""
        raise UserError(f"{key}={quoted(value)}: must be a text{more}")
    if any(ord(character) < 32 for character in value):
        raise UserError(f"{key}={quoted(value)}: holds a character that is no text (a line end, a tab, a zero)")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise UserError(f"{key}={quoted(value)}: not text in UTF-8") from None
    if size > PATH:
        raise UserError(f"{key}={quoted(value)}: {size:,} bytes long; {PATH:,} is the most")
    return value
