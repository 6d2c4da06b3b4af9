"""A pipeline as a diffusers folder that old and new readers open alike.

What was not trained is copied from the base's folder, the files as they were. What has no such files is written in the
names that all readers know: transformers 5 drops `text_model.` from CLIPTextModel's tensors and leaves out vocab.json
and merges.txt; transformers 5.5 then draws a new text encoder in silence, 4.54 stops for want of vocab.json, and
ComfyUI's folder loader finds no text encoder.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase

from inpo_fast.models.files.folder_weights import choose_in_folder
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import allow_reading, parse_json, read_regular, write_text

TEXT_PREFIX = "text_model."  # of every tensor of CLIPTextModel before transformers 5
LOADING = ("is_local", "local_files_only")  # of tokenizer_config.json: how it was opened here
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data", ".xml")


def write_folder(pipeline: DiffusionPipeline, folder: Path, untouched: Mapping[str, Path]) -> None:
    """Writes model_index.json and each part of the pipeline into `folder`.

    untouched: part -> the folder that it was loaded from, where it is as it was then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in pipeline.components.items():
        if part is None or not hasattr(part, "save_pretrained"):
            continue
        place = folder / name
        if not (name in untouched and copy_part(untouched[name], place)):
            _write_part(part, place)
        if isinstance(part, PreTrainedTokenizerBase):
            add_vocabulary(place)
    pipeline.save_config(folder)
    _forget_place(folder / "model_index.json")
    for path in folder.rglob("*"):
        if path.is_file():
            allow_reading(path)


def _write_part(part: object, folder: Path) -> None:
    if isinstance(part, PreTrainedModel):
        write_encoder(part, folder)
    elif isinstance(part, ModelMixin):
        part.save_pretrained(folder, max_shard_size="1TB")  # in one file: ComfyUI's folder loader knows no others
    else:
        part.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        _forget_place(folder / name)


def copy_part(source: Path, target: Path) -> bool:
    """Copies what a loader would take from `source`; False, and nothing copied, where its files do not do for every
    reader: weights as pickles only, or without `text_model.`."""
    if not source.is_dir():
        return False
    weights = _weights(source)
    if weights is None:
        return False
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        is_weights = path.suffix in (".safetensors", *PICKLES) or ".safetensors.index" in path.name
        if path.is_file() and not is_weights and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)  # what a link of the hub's cache points to, not the link
    for path, name in weights.items():
        shutil.copyfile(path, target / name)
    return True


def _weights(source: Path) -> dict[Path, str] | None:
    """The weights' files that a loader takes -> their names without variant; empty for a part without, None where they
    will not do."""
    if not any(path.suffix in (".safetensors", *PICKLES) for path in source.iterdir()):
        return {}
    try:
        chosen = choose_in_folder("models.base", source)
    except UserError:  # the part was opened from elsewhere, or is no longer whole: it is written
        return None
    if not chosen.safetensors or (chosen.variant and len(chosen.names) > 1):
        return None
    variant = f".{chosen.variant}" if chosen.variant else ""
    found = {source / name: name.replace(variant, "", 1) for name in chosen.names}
    return found if all(_opens_anywhere(path) for path in found if path.suffix == ".safetensors") else None


def _opens_anywhere(file: Path) -> bool:
    """Whether the tensors have the names that they had before transformers 5."""
    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
    except (OSError, SafetensorError):
        return False
    return not any(name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm.")) for name in names)


def write_encoder(encoder: PreTrainedModel, folder: Path) -> None:
    """config.json and model.safetensors, in one file, with the names of transformers 4.

    config.json says fp32 whatever the weights are stored in: without `dtype=` transformers 5 opens a model as that
    says, and diffusers everything as fp32, so that a pipeline of half-precision files would not run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(encoder.config)
    config.dtype = torch.float32
    config.architectures = [type(encoder).__name__]  # InvokeAI asks for it of a text encoder alone
    config.save_pretrained(folder)
    state = {name: x.contiguous() for name, x in encoder.state_dict().items()}
    if isinstance(encoder, CLIPTextModel):
        state = {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): x for name, x in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def add_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt beside a tokenizer.json: readers before transformers 5 take those."""
    fast = folder / "tokenizer.json"
    if fast.is_file() and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        model = Tokenizer.from_file(str(fast)).model
        if type(model).__name__ == "BPE":
            model.save(str(folder))


def _forget_place(path: Path) -> None:
    """Drops where and how a part was opened on this machine, which libraries write into what they save."""
    if not path.is_file():
        return
    config = parse_json(read_regular(path))
    place = config.get("_name_or_path")
    drop = set(LOADING) | ({"_name_or_path"} if isinstance(place, str) and Path(place).exists() else set())
    if drop & config.keys():
        kept = {name: value for name, value in config.items() if name not in drop}
        write_text(path, json.dumps(kept, indent=2) + "\n")
