"""Where a model lies: a path on this machine, or an id of the Hugging Face hub, which is asked for small files first.

The hub is tried once, for seconds: its client would try six times, twice over. Where it cannot be reached, what an
earlier run left in its cache is used.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from inpo_fast.runtime.errors import UserError

ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json", ".onnx", ".msgpack")
PATIENCE = 5.0  # seconds for the hub's first answer


class HubModel:
    """A model on the hub, or of its cache where the hub cannot be reached."""

    def __init__(self, key: str, id: str):
        """UserError where it is not there, may not be read, or the hub is out of reach and nothing of it here."""
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
        )

        self.key, self.id, self.commit, self._files = key, id, None, None
        self.folder: Path | None = None  # of the cache, whole or in part, where the hub is out of reach
        try:
            get_hf_file_metadata(hf_hub_url(id, "model_index.json"), timeout=PATIENCE)
        except GatedRepoError as problem:
            raise UserError(
                f"{key}: {id} asks for its licence to be accepted: do so at https://huggingface.co/{id}, then log in "
                "with `hf auth login`"
            ) from problem
        except RepositoryNotFoundError as problem:
            raise UserError(
                f"{key}: {id} is neither a folder here nor a model on the hub (a private one needs `hf auth login`); "
                "check the spelling"
            ) from problem
        except EntryNotFoundError:
            pass  # a repository of one part of a model
        except Exception as problem:
            if isinstance(problem, HfHubHTTPError) and problem.response.status_code < 500:
                raise UserError(
                    f"{key}: {id}: the hub answers {problem.response.status_code}; {_line(problem)}"
                ) from problem
            small = ("model_index.json", "config.json", "unet/config.json")
            cached = {name: try_to_load_from_cache(id, name) for name in small}
            found = (Path(path).parents[name.count("/")] for name, path in cached.items() if isinstance(path, str))
            self.folder = next(found, None)
            if self.folder is None:
                raise UserError(
                    f"{key}: {id} is no folder here, and the hub cannot be reached to ask for a model of that name "
                    f"({_line(problem)}); give the path of a folder or file, or try again with a network"
                ) from problem
            return
        info = self._ask(lambda: HfApi().model_info(id))
        self._files = [sibling.rfilename for sibling in info.siblings or []]

    def files(self, part: str = "") -> list[str]:
        """Names of the files in a part's folder, or at the top; not below."""
        if self.folder is not None:
            place = self.folder / part
            return [path.name for path in place.iterdir() if path.is_file()] if place.is_dir() else []
        prefix = f"{part}/" if part else ""
        inside = [name[len(prefix) :] for name in self._files or [] if name.startswith(prefix)]
        return [name for name in inside if "/" not in name]

    def fetch(self, names: Iterable[str]) -> Path:
        """These files (patterns with * too) and no others; the folder in the cache that they are in."""
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        wanted = list(names)
        # the first time by the branch, which leaves in the cache what it stands for: another day it may be needed
        # without a network; then by that commit, so that all files are of one
        folder = Path(self._ask(lambda: snapshot_download(self.id, revision=self.commit, allow_patterns=wanted)))
        self.commit = folder.name
        return folder

    def _ask(self, call: Callable):
        try:
            return call()
        except Exception as problem:  # whatever its HTTP client raises
            raise UserError(f"{self.key}: {self.id} cannot be fetched from the hub ({_line(problem)})") from problem


def path_or_id(key: str, place: str) -> Path | None:
    """The path of what is here; None for what looks like a hub id. UserError of anything else."""
    if not place or not place.strip():
        raise UserError(f"{key} is empty; give a diffusers folder, a .safetensors file or a hub id")
    if re.match(r"[a-z]+://", place):
        raise UserError(f"{key}: {place} is an address; download it and give its path, or give a hub id OWNER/NAME")
    path = Path(place).expanduser()
    if path.exists():
        return path
    if place.endswith(FILES):
        raise UserError(f"{key}: no such file: {place}")
    if ID.fullmatch(place) is None:
        raise UserError(f"{key}: no such folder: {place}; give a diffusers folder, a .safetensors file or a hub id")
    return None


def hub_id(base: str) -> str | None:
    """Of a base model given by its id, or by the folder of its snapshot in the hub's cache; None for anything else."""
    if ID.fullmatch(base) and not Path(base).exists():
        return base
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", str(Path(base).resolve()))
    return f"{found[1]}/{found[2]}" if found else None


def base_folder(base: str) -> Path | None:
    """The folder of a base model: itself, or a hub id's snapshot in the cache. None: a single file, or not there."""
    if Path(base).expanduser().is_dir():
        return Path(base).expanduser()
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(base, "model_index.json")
    except ValueError:  # not a hub id
        return None
    return Path(index).parent if isinstance(index, str) else None


def _line(problem: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(problem, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
