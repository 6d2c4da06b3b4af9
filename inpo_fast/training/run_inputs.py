"""What the meaning of a run rests on beside its settings, by content: a run goes on only with what it began with.

Fingerprints of the pairs, the labels, the words of a filter, the held-out pairs, the judge of online training, and the
files of the model: network, VAE, text encoders, tokenizers, scheduler, whichever of models.base, models.init and
models.vae they come from. They stand in manifest.json under `inputs`. Paths, times and names of folders do not count,
so a copy on another disk is the same. Left out is what decides nothing of the training: prompts and judges of the
evaluation, prompts of pictures, and the caches, which know themselves what they were made from.

Cost: the model's files are read once more, by one process, from the memory that opening them has just filled: at 1.8 GB
a second of each core (content_hash.py), SDXL in fp32 (13.9 GB) would take 4 s on two cores, in fp16 half of that.
What the pairs cost: data/identity.py.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from inpo_fast.config import RunConfig
from inpo_fast.data.identity import differences, identity_of
from inpo_fast.data.pair import Source
from inpo_fast.judges import Judge, judge_id
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.files.folder_weights import choose_in_folder
from inpo_fast.models.files.hub import base_folder
from inpo_fast.models.files.lora_place import lora_file
from inpo_fast.models.files.model_files import MODULES, TOKENIZERS
from inpo_fast.runtime.content_hash import content_hash
from inpo_fast.runtime.errors import UserError

SMALL = (".json", ".txt")  # of a part's folder, beside its weights: configuration, vocabulary
ACCEPT = "--accept-changed-inputs"
HELD_OUT = "observe.held_out"
PLACES = (  # settings that name a place of inputs: what lies there counts, not the name
    "data.source",
    "data.images",
    "data.labels",
    "data.filters.block_list",
    "models.base",
    "models.init",
    "models.vae",
    "models.single_file_config",
)
_OF_PAIRS = {"data.labels": "labels", "data.filters.block_list": "filters"}  # part of their fingerprint, where given


def fingerprints(config: RunConfig, source: Source, held_out: Source | None, judge: Judge | None) -> dict[str, dict]:
    """Input -> what it is, plain values. held_out: pairs that are not trained on; judge: of online training."""
    out: dict[str, dict] = {"data.source": identity_of(source)}
    if held_out is not None:
        out[HELD_OUT] = identity_of(held_out)
    if judge is not None:
        out["online.judge"] = {"content": judge_id(judge)}
    return out | model_fingerprints(config.models)


def model_fingerprints(config: ModelsConfig) -> dict[str, dict]:
    """Of the model's files, by key and part: `models.base (vae)`. UserError where one is gone."""
    return {name: {"content": _hash(name, files)} for name, files in _model_files(config).items()}


def _hash(name: str, files: dict[str, Path]) -> str:
    try:
        return content_hash(files)
    except OSError as problem:
        raise UserError(f"{name}: {problem.filename or ''} cannot be read ({problem.strerror})") from problem


def _model_files(config: ModelsConfig) -> dict[str, dict[str, Path]]:
    return dict(_files_by_part(config))


def _files_by_part(config: ModelsConfig) -> Iterator[tuple[str, dict[str, Path]]]:
    other_network = bool(config.init) and not lora_file(config.init, "models.init")
    if not config.random:
        leave_out = {*(["unet"] if other_network else []), *(["vae"] if config.vae else [])}
        yield from _pipeline_files("models.base", config.base, leave_out)
        if config.single_file_config:
            yield from _pipeline_files("models.single_file_config", config.single_file_config, {*MODULES})
    if config.init and not other_network:
        yield "models.init (LoRA)", {"": lora_file(config.init)}
    elif config.init:
        yield from _part_files("models.init", config.init, "unet")
    if config.vae:
        yield from _part_files("models.vae", config.vae, "vae")


def _pipeline_files(key: str, place: str, leave_out: set[str]) -> Iterator[tuple[str, dict[str, Path]]]:
    folder = base_folder(place)
    if folder is None:
        path = Path(place).expanduser()
        if path.is_file():
            yield key, {"": path}
        return
    for part in (*MODULES, *TOKENIZERS, "scheduler"):
        if part not in leave_out and (folder / part).is_dir():
            yield f"{key} ({part})", files_of_part(key, folder / part, has_weights=part in MODULES)


def _part_files(key: str, place: str, part: str) -> Iterator[tuple[str, dict[str, Path]]]:
    """Of a network alone, which may lie in a pipeline's folder."""
    path = Path(place).expanduser()
    if path.is_file():
        yield f"{key} ({part})", {"": path}
        return
    folder = path if path.is_dir() else _snapshot(place, part)
    if folder is not None:
        own = folder / part
        yield f"{key} ({part})", files_of_part(key, own if own.is_dir() else folder, has_weights=True)


def _snapshot(id: str, part: str) -> Path | None:
    """Of a hub id, the folder in its cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", f"{part}/config.json", "config.json"):
        found = try_to_load_from_cache(id, name)
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return None


def files_of_part(key: str, folder: Path, has_weights: bool) -> dict[str, Path]:
    """What a loader takes of a part's folder. UserError where its weights are gone."""
    names = {path.name for path in folder.iterdir() if path.suffix in SMALL and path.is_file()}
    if has_weights:
        names |= set(choose_in_folder(key, folder).names)
    return {name: folder / name for name in names}


def other_places(old: dict, new: dict, then: dict[str, dict] | None) -> list[str]:
    """Of PLACES, those that are not what they were and of which `then`, the fingerprints of before, cannot decide.

    old, new: settings of before and now, keys joined by dots.
    """
    keys = [key for key in PLACES if key in new and _address(old.get(key)) != _address(new[key])]
    return [key for key in keys if not _is_decided(key, old.get(key), new[key], then or {})]


def _address(place: object) -> object:
    """One name for each place of this machine, such as with and without a slash at the end."""
    if not isinstance(place, str) or not place or "://" in place.removeprefix("file://"):
        return place
    return os.path.abspath(os.path.expanduser(place.removeprefix("file://")))


def _is_decided(key: str, old: object, new: object, then: dict[str, dict]) -> bool:
    if key.startswith("models."):
        return any(name.split(" (")[0] == key for name in then) or (old is None and bool(then))
    known = then.get("data.source", {})
    if key in _OF_PAIRS:  # of a digest that only one of the two has nothing is said
        return old is not None and new is not None and _OF_PAIRS[key] in known
    return {"rows", "pictures"} <= known.keys()


def check_held_out(inputs: dict[str, dict]) -> None:
    """UserError where the held-out pairs are the training pairs under another name, whatever labels they have."""
    trained, held_out = (inputs.get(name, {}).get("pictures") for name in ("data.source", HELD_OUT))
    if held_out is not None and held_out == trained:
        raise UserError(
            f"{HELD_OUT} has the very pictures of data.source: pairs that are trained on tell nothing; name others"
        )


def changes(then: dict[str, dict], now: dict[str, dict], leave_out: set[str]) -> dict[str, dict]:
    """Input -> {then, now} of each that is not what it was."""
    names = [name for name in {**then, **now} if name not in leave_out and _differ(then.get(name), now.get(name))]
    return {name: {"then": then.get(name), "now": now.get(name)} for name in names}


def _differ(then: dict | None, now: dict | None) -> bool:
    if then is None or now is None or "content" in then or "content" in now:
        return then != now
    return bool(differences(then, now))  # pairs


def refusal(changed: dict[str, dict]) -> str:
    """Every change in a few words, for one line."""
    return "; ".join(_in_words(name, change["then"], change["now"]) for name, change in changed.items())


def _in_words(name: str, then: dict | None, now: dict | None) -> str:
    if then is None or now is None:
        return f"{name}: {'not there' if then is None else 'there'} when the run began"
    if then.get("pairs") != now.get("pairs"):
        return f"{name}: {then.get('pairs'):,} pairs when the run began, {now.get('pairs'):,} now"
    if "content" not in then:
        said = ", ".join(differences(then, now)).replace("data.source", name)
        return f"{name}: as many pairs as when the run began, but other ones: {said}"
    return f"{name}: not what it was when the run began"


def replaced_since(config: ModelsConfig, then: dict[str, dict]) -> list[str]:
    """At the end of a run, before parts that were not trained are read again and copied: the files of the model that
    are no longer what they were in `then`, or gone."""
    try:
        now = model_fingerprints(config)
    except UserError:  # half of a part is there
        now = {}
    return sorted(name for name in then if name.startswith("models.") and now.get(name) != then[name])
