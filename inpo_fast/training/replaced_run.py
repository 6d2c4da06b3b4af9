"""The earlier run that --overwrite replaces: kept in the folder's `.replaced` until its successor has a checkpoint that
was due. That of an interruption does not count: who stops a run at once may have started it by mistake.

Only names that a run writes are touched, in a folder whose manifest.json is a run's, and nothing that the new run
reads. Each name is moved by one rename, manifest.json last on the way out and first on the way back. So whenever a
process is killed it is known whose the names outside are: the new run's if `.replaced` has a manifest.json, else the
earlier one's.
"""

import glob
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from inpo_fast.config import RunConfig, flat, to_dict
from inpo_fast.data.folder import ListedSource
from inpo_fast.data.pair import Source
from inpo_fast.data.places import find
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import json_or_none

MANIFEST = "manifest.json"
FILES = (
    "config.yaml",
    "metrics.jsonl",
    "evaluation.json",
    "samples.png",
    "report.html",
    "warnings.json",
    "wandb-id",
    MANIFEST,
)
FOLDERS = {  # with the names that a run writes in them; what else lies there is somebody's
    "checkpoints": r"step-\d{4,}",
    "model": r"model_index\.json|README\.md|unet|vae|scheduler|safety_checker|feature_extractor|image_encoder|"
    r"(tokenizer|text_encoder)(_\d)?",
    "lora": r"pytorch_lora_weights\.safetensors|kohya-for-comfyui-a1111-forge\.safetensors|README\.md",
    "tensorboard": r"events\.out\.tfevents\..*",
    "images": r"\d{6,}\.png",
    "online": r"\d{6,}",
    "wandb": r".*",
    ".evaluation": r".*",
}
NAMES = (*FOLDERS, *FILES)  # manifest.json last
ASIDE, GOING = ".replaced", ".tmp-replaced"
KEYS = ("variant", "config_sha256", "data", "model")  # of every manifest.json that a run wrote


def there(folder: Path) -> list[str]:
    """The names of a run that there are in a folder."""
    return [name for name in (*FILES, *FOLDERS) if os.path.lexists(folder / name)]


def is_run(folder: Path) -> bool:
    """Whether a run wrote what is in the folder: by its manifest.json."""
    content = json_or_none(folder / MANIFEST) or {}
    return all(key in content for key in KEYS)


def is_kept(folder: Path) -> bool:
    """Whether an earlier run, or a part of it, is aside."""
    return (folder / ASIDE).is_dir()


def is_whole(folder: Path) -> bool:
    """Whether all of an earlier run is aside, so that what lies outside is its successor's."""
    return (folder / ASIDE / MANIFEST).exists()


def way_back(folder: Path) -> str:
    """Words for a run that stopped with a checkpoint while the one that it replaces is aside; "" where none is."""
    if not is_whole(folder):
        return ""
    return (
        f"{folder / ASIDE} still has the run that this one replaces, until a checkpoint that is due; to bring that "
        f"back, remove {folder / 'checkpoints'} and start without --resume"
    )


def successor_began(folder: Path) -> bool:
    """Whether the names outside are those of a run that replaces the one aside."""
    return is_whole(folder) and is_run(folder) and (folder / "config.yaml").exists()


def check(folder: Path, config: RunConfig) -> None:
    """UserError where --overwrite would touch what no run wrote, or what the new run reads."""
    names = there(folder)
    if names and not is_run(folder) and not (is_kept(folder) and is_run(folder / ASIDE)):
        raise UserError(
            f"--overwrite: {folder} holds {', '.join(names[:3])} and no {MANIFEST} of a run, so it may be somebody's; "
            "move it away, or choose another --output"
        )
    for key, value in _texts(to_dict(config)):
        if inside := _inside(key, value, folder, _places(folder)):
            raise UserError(
                f"--overwrite: {key}={value} lies in what would be replaced ({inside}); move it away, or choose "
                "another --output"
            )


def check_pictures(folder: Path, key: str, source: Source) -> None:
    """UserError where a picture that the new run's pairs have lies in what --overwrite would replace."""
    while hasattr(source, "source"):  # with labels of a sidecar, filtered
        source = source.source
    if isinstance(source, ListedSource) and (found := source.picture_below(folder, _places(folder))):
        raise UserError(
            f"--overwrite: {key} lists {found}, which lies in what would be replaced; move it away, or choose another "
            "--output"
        )


def _places(folder: Path) -> list[Path]:
    return [place for place in (*(folder / name for name in NAMES), folder / ASIDE) if os.path.lexists(place)]


def _texts(tree: dict) -> Iterator[tuple[str, str]]:
    """Every setting that may name a file or folder: all that are text, so that none is forgotten."""
    for key, value in flat(tree).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text and key != "output":
                yield key, text


def _inside(key: str, text: str, folder: Path, places: list[Path]) -> Path | None:
    """Which of the places something that `text` names lies in, links followed; None: in none, or it names nothing.

    A judge's kind (`scores:FILE`), file:// and patterns are looked through.
    """
    solid = {place: place.resolve() for place in places}
    text = text.removeprefix("file://")
    for form in {text, text.partition(":")[2]} - {""}:
        try:
            named = list(_named(key, form, folder))
        except (OSError, ValueError, RuntimeError):
            continue
        if folder.resolve() in named:
            return folder
        for place, inside in solid.items():
            if any(one.is_relative_to(inside) for one in named):
                return place
    return None


def _named(key: str, text: str, folder: Path) -> Iterator[Path]:
    """What is read of a place: itself, what links in it lead to, and of pairs around the run's folder those inside."""
    path = Path(text).expanduser()
    if os.path.lexists(path):
        yield path.resolve()
    elif glob.has_magic(text):
        yield from (Path(found).resolve() for found in glob.glob(str(path), recursive=True))
    if not path.is_dir():
        return
    for place, folders, files in os.walk(path):
        yield from (Path(place, name).resolve() for name in (*folders, *files) if os.path.islink(Path(place, name)))
        if not key.startswith("models."):  # there may be millions of pictures
            break
    if key in ("data.source", "observe.held_out") and folder.resolve().is_relative_to(path.resolve()):
        yield from (Path(file.path).resolve() for file in find(str(path), (".parquet", ".tar")) or ())


def set_aside(folder: Path) -> None:
    """Moves the run in the folder away. One that has replaced another and has had no checkpoint that was due, with
    which that other would have gone, is dropped instead."""
    aside = folder / ASIDE
    if is_whole(folder):
        _drop(folder)
        return
    if there(folder):
        aside.mkdir(exist_ok=True)
        for name in NAMES:
            if os.path.lexists(folder / name):
                (folder / name).rename(aside / name)


def restore(folder: Path) -> None:
    """Puts the run that is aside back; what its successor left goes, if that began."""
    aside = folder / ASIDE
    if is_whole(folder):
        _drop(folder)
        (aside / MANIFEST).rename(folder / MANIFEST)
    for name in NAMES:
        if os.path.lexists(aside / name):
            (aside / name).rename(folder / name)
    aside.rmdir()


def forget(folder: Path) -> None:
    """Removes the run that is aside, for good. What somebody else had put into its folders comes back."""
    clear(folder)
    if (folder / ASIDE).is_dir():
        (folder / ASIDE).rename(folder / GOING)
        clear(folder)


def _drop(folder: Path) -> None:
    """Removes a run's names, but for what somebody else put into its folders."""
    clear(folder)
    (folder / GOING).mkdir()
    for name in NAMES:
        if os.path.lexists(folder / name):
            (folder / name).rename(folder / GOING / name)
    clear(folder)


def clear(folder: Path) -> None:
    """Removes what is on its way out, also what a killed process left of it."""
    if (folder / GOING).is_dir():
        carry_foreign(folder / GOING, folder)
        shutil.rmtree(folder / GOING, ignore_errors=True)


def carry_foreign(old: Path, new: Path) -> None:
    """Moves what no run wrote in the folders of a run at `old` to the same place at `new`."""
    for name in FOLDERS:
        if (old / name).is_dir() and not (old / name).is_symlink():
            carry(name, old / name, new / name)


def carry(name: str, old: Path, new: Path) -> None:
    """Moves what no run wrote in one of a run's folders to the one that takes its place."""
    for path in old.iterdir():
        if not re.fullmatch(FOLDERS[name], path.name) and not path.name.startswith(".tmp-"):
            new.mkdir(parents=True, exist_ok=True)
            target = new / path.name
            while os.path.lexists(target):
                target = target.with_name(f"{target.name}~")
            path.rename(target)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
