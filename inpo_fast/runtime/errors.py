"""The one exception for what a user can mend: bad configuration, data, folders, a full disk; and what a command line
says to its user."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from inpo_fast.runtime.masking import mask_logs, masked
from inpo_fast.runtime.signals import Signals, exit_status, say_and_leave

VALUE = 200  # characters of a value that are quoted at most
LINE = 1000  # characters of a whole message: what stands at its beginning (where, what) and at its end (the remedy)
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_given: list[str] = []  # long values of this run, from its command line and its recipes
_LONG_WORD = re.compile(rf"\S{{{VALUE + 1},}}")
_LONG_QUOTE = re.compile(rf"(?<!\w)(?:'[^']{{{VALUE - 1},}}'|\"[^\"]{{{VALUE - 1},}}\")(?!\w)")


def shortened(value: object, most: int = VALUE) -> str:
    """A value as a message quotes it: its beginning and its end where it is longer than `most` characters."""
    text = value if isinstance(value, str) else str(value)
    if len(text) <= most:
        return text
    said = f" … {len(text):,} characters … "
    tail = (most - len(said)) // 3
    return text[: most - len(said) - tail] + said + text[len(text) - tail :]


def shorten_when_quoted(values: Iterable[str]) -> None:
    """From now on a message that quotes one of these quotes it shortened, whatever stands in it."""
    long = {_written(value) for value in values if len(value) > VALUE}
    _given[:] = sorted({*_given, *long}, key=len, reverse=True)


def one_line(message: object, quoted: Iterable[str] = ()) -> str:
    """A message on one line: line breaks are spaces, control characters are written out, long values shortened.
    quoted: what is in it of others, which may be long and have spaces."""
    text = _written(str(message))
    for value in (*(_written(value) for value in quoted if len(value) > VALUE), *_given):
        text = text.replace(value, shortened(value))
    for long in (_LONG_QUOTE, _LONG_WORD):
        text = long.sub(lambda found: shortened(found[0]), text)
    return shortened(text, LINE)


def _written(text: str) -> str:
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], _BREAKS.sub(" ", text.strip()))


class UserError(ValueError):
    """Says what is wrong, where, and how to mend it, in one line (`one_line`); secrets in it are masked. Raised from
    another exception, it quotes its words shortly."""

    def __init__(self, message: object = ""):
        super().__init__(masked(str(message)))

    def __str__(self) -> str:
        cause = self.__cause__
        return one_line(self.args[0], [] if cause is None or isinstance(cause, UserError) else [masked(str(cause))])


class Hang(UserError):
    """Another process does not answer: this one must end without waiting for anything that needs it."""


class CommandLine(argparse.ArgumentParser):
    """Its mistakes are one line too, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all options)")

    def parse_known_args(self, args=None, namespace=None):
        words, before = sys.argv[1:] if args is None else list(args), ""
        for word in words:
            option, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
            # as a path it would be the current folder; an empty prompt is one
            if equals and not value.strip() and option in self._option_string_actions and option != "--prompt":
                self.error(f"argument {option}: is empty; give it a value or leave it out")
            before = "" if word.startswith("--") and equals else word
            if word.startswith("--") and word.endswith("=--"):  # Python before 3.13 makes an empty list of it
                self.error(f"argument {word.removesuffix('=--')}: '--' is no value")
        return super().parse_known_args(args, namespace)


def command_line(program: str, about: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose --help is the file's docstring as it is written. Names are given in full: a short form could be
    the beginning of one of the trainer's keys."""
    kind = argparse.RawDescriptionHelpFormatter
    return CommandLine(prog=program, description=about, epilog=epilog, formatter_class=kind, allow_abbrev=False)


def run_command(program: str, main: Callable[[], None], again: str = "start it again") -> None:
    """Runs a command line; a UserError becomes one line on stderr and exit status 2, never a traceback. So do a GPU
    that is full where nobody knew a smaller batch, and a file or socket that the system refuses; what nobody foresaw is
    one line too, with exit status 70 (unforeseen.py). Asked to stop, it ends as signals.py says.

    again: how to go on after that, for the line that says so.
    """
    mask_logs()
    shorten_when_quoted(part for word in sys.argv[1:] for part in (word, word.partition("=")[2]))
    with Signals(program, again, stays=main.__module__ == "__main__") as signals:
        try:
            _check_words(sys.argv[1:])
            main()
        except BaseException as problem:
            if signals.raised or isinstance(problem, KeyboardInterrupt):  # what a library makes of it is another thing
                by = signals.asked or "SIGINT"
                say_and_leave(signals.line(by), exit_status(by))
            _tell(program, problem)


def _tell(program: str, problem: BaseException) -> NoReturn:
    if isinstance(problem, Hang):
        say_and_leave(f"{program}: {problem}", 2)  # threads and messages under way would wait for the other process
    if isinstance(problem, UserError):
        _end(program, str(problem), getattr(problem, "status", 2))
    if isinstance(problem, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has seen enough
        sys.exit(2)
    if isinstance(problem, OSError):
        if not isinstance(problem.filename, str | bytes):
            _unforeseen(program, problem, problem.strerror or str(problem) or type(problem).__name__, 2)
        _end(program, _shown(_refused_by_system(problem)), 2)
    if type(problem).__name__ == "OutOfMemoryError":  # torch's; importing it would slow down every error
        said = ". ".join(" ".join(str(problem).split()).split(". ")[:2]).rstrip(".")
        remedy = "take a smaller model, resolution or batch; --dry-run of inpo_fast.train counts what needs how much"
        _end(program, _shown(f"{said}; {remedy}"), 2)
    if isinstance(problem, Exception):
        _unforeseen(program, problem, None, 70)
    raise problem


def _check_words(words: list[str]) -> None:
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{word!a}: not text in UTF-8, as all names here must be; rename what it names") from None


def _refused_by_system(problem: OSError) -> str:
    """What could not be read or written, after the option or key that named it."""
    names = [os.fsdecode(name) for name in (problem.filename, problem.filename2) if isinstance(name, str | bytes)]
    option = ""
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        option, value = (key, value) if word.startswith("--") else (option, word)
        if value and names and (names[0] == value or names[0].startswith(value.rstrip("/") + "/")):
            return f"{option} {' and '.join(names)}: {problem.strerror}".strip()
    return f"{' and '.join(names)}: {problem.strerror}"


def _end(program: str, line: str, status: int) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # torchrun ends this process if the first one had the same error: said once
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def _unforeseen(program: str, problem: Exception, line: str | None, status: int) -> NoReturn:
    from inpo_fast.runtime import unforeseen

    if unforeseen.shown():
        raise problem
    _end(program, _shown(unforeseen.line(program, problem, line)), status)


def _shown(message: str) -> str:
    return one_line(masked(message))
