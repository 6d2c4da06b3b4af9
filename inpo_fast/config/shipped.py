"""The recipes that come with the package: found by name from anywhere, their paths leading into the package.

A recipe names files of the package (the pocket model, its pairs and prompts) by their path from the folder that holds
`inpo_fast/`. In a checkout that is the current folder, and the path stands as it is written; elsewhere it becomes the
package's own. Paths in any other file, and on the command line, are the user's: relative to the current folder.
"""

import os
import re
from pathlib import Path

from inpo_fast.runtime.errors import UserError

FOLDER = Path(__file__).parents[1] / "configs"
HOME = Path(__file__).parents[2]  # what a recipe's paths start from
_OURS = re.compile(r"(?P<kind>(?:[\w-]+:)?)(?P<path>inpo_fast/.+)")  # a judge has its kind before it: clip:FOLDER


def shipped() -> list[str]:
    """Their names, in the alphabet's order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(asked: str) -> Path:
    """The file that --config means: the one there is at this path, otherwise the shipped recipe of that name (`sd15`,
    `sd15.yaml`, `configs/sd15.yaml`). UserError where there is neither."""
    if os.path.exists(asked) and not os.path.isdir(asked):
        return Path(asked)
    folder, name = os.path.split(os.path.normpath(asked))
    name = name.removesuffix(".yaml")
    if folder in ("", "configs", "inpo_fast/configs") and name in shipped():
        return FOLDER / f"{name}.yaml"
    what = "a folder, not a YAML file" if os.path.isdir(asked) else "no such file"
    raise UserError(f"--config {asked}: {what}; give a YAML file or one of the shipped recipes: {', '.join(shipped())}")


def is_shipped(path: Path) -> bool:
    return path.resolve().parent == FOLDER.resolve()


def lead_home(value: object) -> object:
    """A value of a shipped recipe, or a tree of them, with the package's paths as they hold from the current folder."""
    if isinstance(value, dict):
        return {key: lead_home(below) for key, below in value.items()}
    if isinstance(value, list):
        return [lead_home(below) for below in value]
    if isinstance(value, str) and (ours := _OURS.fullmatch(value)):
        place = HOME / ours["path"]
        if place.resolve() != Path(ours["path"]).resolve():
            return f"{ours['kind']}{place}"
    return value


def from_home(value: object) -> object:
    """The inverse, for a comparison of two runs' settings: the same file of the package, wherever a run was started."""
    if isinstance(value, list):
        return [from_home(below) for below in value]
    home = f"{HOME}{os.sep}"
    if isinstance(value, str) and _OURS.fullmatch(value.replace(home, "", 1)):
        return value.replace(home, "", 1)
    return value
