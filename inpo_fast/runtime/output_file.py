"""Where a command may write its file: never over what it reads, nor over what is there unless it is told to."""

from collections.abc import Callable, Mapping
from pathlib import Path

from inpo_fast.runtime.errors import UserError


def check_output(
    output: Path,
    overwrite: bool,
    inputs: Mapping[str, str | Path | None],
    is_ours: Callable[[Path], bool] = lambda path: False,
) -> None:
    """UserError before anything is done. inputs: what the command reads, by the option that names it; links are
    followed. is_ours: of a file that is there, whether the command may replace it without a word."""
    solid = output.resolve()
    for option, named in inputs.items():
        place = None if named is None else Path(named).expanduser()
        if place is not None and place.exists() and (solid == place.resolve() or solid.is_relative_to(place.resolve())):
            if place.is_dir() and not output.exists():
                continue
            where = "lies in" if place.is_dir() else "is"
            raise UserError(
                f"--output {output} {where} {option} {named}, which would be overwritten; name another file"
            )
    if output.exists() and not overwrite and not is_ours(output):
        raise UserError(f"--output {output} is there already; --overwrite replaces it, or name another file")
