"""A diffusers folder, single file, hub id or named architecture becomes a pipeline.

What a model is, and whether it can be aligned, is told from its small files (recognise.py, alignable.py) before its
weights are read or fetched. Its parts are then opened one by one, so that a part that is not needed may be missing and
one that is damaged is named: nothing of it is ever left as it was drawn at random.
"""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTokenizer

from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.families import denoiser_of
from inpo_fast.models.files import alignable, recognise, single_file
from inpo_fast.models.files.folder_weights import NARROW, choose_files, choose_in_folder
from inpo_fast.models.files.hub import HubModel, path_or_id
from inpo_fast.models.files.lora_files import read_lora
from inpo_fast.models.files.lora_place import lora_file
from inpo_fast.models.files.model_files import (
    MODULES,
    TOKENIZERS,
    ModelFiles,
    check_unet_file,
    find_model,
    opening,
    read_json,
    scheduler_config,
)
from inpo_fast.models.files.safetensors_header import read_header
from inpo_fast.models.lora import merge_, with_lora
from inpo_fast.models.models import DTYPES
from inpo_fast.models.random_weights import random_pipeline
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.warn_once import warn_once

log = logging.getLogger(__name__)


def open_pipeline(config: ModelsConfig, device: torch.device | None = None) -> DiffusionPipeline:
    """What the configuration names: fp32, or for LoRA, which needs no masters, in the working precision.

    device: where random weights are drawn, None: on the CPU. What comes from files is opened on the CPU.

    Where models.init is a LoRA, its weights are merged, and it is kept as `pipeline.init_lora`.
    """
    dtype = DTYPES[config.precision] if config.lora.rank else torch.float32
    if config.random:
        if config.base:
            raise UserError(f"models.base={config.base} and models.random={config.random}: give one of them")
        pipeline = random_pipeline(config.random, dtype, device=device)
    else:
        pipeline = load_pipeline(config.base, dtype, config.single_file_config)
    denoiser = denoiser_of(pipeline)
    network = denoiser.module(pipeline)
    if config.init and lora_file(config.init, "models.init"):
        pipeline.init_lora = read_lora("models.init", config.init, network)
        merge_(network, pipeline.init_lora)
    elif config.init:
        own = pipeline.scheduler.config
        denoiser.put(pipeline, load_unet("models.init", config.init, network, scheduler=own))
    if config.vae:
        pipeline.vae = load_vae(config.vae, pipeline)
    return pipeline


def load_pipeline(
    base: str, dtype: torch.dtype = torch.float32, single_file_config: str | None = None, *, key: str = "models.base"
) -> DiffusionPipeline:
    """The stock pipeline of a model, without safety checker. UserError, which begins with the setting `key`, when it
    cannot be opened or is none that can be aligned.

    The pipeline's `opened_from` is the folder on this machine whose files its parts are, None for a single file.
    """
    with opening(key, base):
        return _load_pipeline(base, dtype, single_file_config, key)


def _load_pipeline(base: str, dtype: torch.dtype, single_file_config: str | None, key: str) -> DiffusionPipeline:
    found = find_model(key, base, single_file_config)
    parts = _parts_of_file(found, dtype) if found.file is not None else _parts_of_folder(found, dtype)
    folder = found.folder
    number = len(found.texts)
    for name, text in zip(TOKENIZERS[:number], found.texts, strict=True):
        parts[name] = _tokenizer(key, folder / name, text)
    parts["scheduler"] = alignable.scheduler_of(found.scheduler)
    kind = StableDiffusionXLPipeline if found.is_xl else StableDiffusionPipeline
    modules, flags = kind._get_signature_keys(kind)
    more = {name: value for name, value in found.index.items() if name in flags and not isinstance(value, list)}
    if not found.is_xl:
        more["requires_safety_checker"] = False
    parts |= _extras(found, modules - parts.keys())
    pipeline = kind(**parts, **more)
    pipeline.register_to_config(_name_or_path=base)
    pipeline.opened_from = None if found.file is not None else folder
    return pipeline


def _parts_of_folder(found: ModelFiles, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    key = found.key
    names = MODULES[: 2 + len(found.texts)]
    if found.hub is not None and found.hub.folder is None:
        wanted = [
            f"{part}/{file}"
            for part in names
            for file in choose_files(key, f"{found.place}/{part}", found.hub.files(part)).names
        ]
        found.hub.fetch(wanted)
    folder = found.folder
    parts = {}
    for part in names:
        kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}.get(part)
        kind = kind or getattr(transformers, alignable.class_of(found.index, part))
        parts[part] = _open_part(key, kind, folder / part, dtype)
    parts["unet"].register_to_config(sample_size=found.unet["sample_size"])
    return parts


def _open_part(key: str, kind: type, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A model of diffusers or transformers, every tensor of which was in its files."""
    weights = choose_in_folder(key, folder)
    if weights.variant in NARROW and dtype == torch.float32:
        warn_once(log, "%s: %s holds %s weights only: what was rounded stays so", key, folder, weights.variant)
    how = weights.options()
    if issubclass(kind, transformers.PreTrainedModel):
        how["ignore_mismatched_sizes"] = True  # named below; its own words point to a table in a log
    with opening(key, str(folder)):
        model, told = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True, **how)
    if missing := sorted(told["missing_keys"]):
        raise UserError(
            f"{key}: {folder} lacks {missing[0]} and {len(missing) - 1} more tensors of its {kind.__name__}"
        )
    if wrong := sorted(map(str, told.get("mismatched_keys") or [])):
        raise UserError(f"{key}: {folder} holds a tensor of another shape than its config.json says: {wrong[0]}")
    if kind is UNet2DConditionModel and (extra := sorted(told["unexpected_keys"])):
        raise UserError(f"{key}: {folder} holds {extra[0]}, which its config.json has no place for")
    check_finite(key, str(folder), model)
    return model.eval()


def _parts_of_file(found: ModelFiles, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    key, file = found.key, found.file
    parts = {"unet": single_file.read_unet(key, file, found.unet, dtype)}
    parts["vae"] = single_file.read_vae(key, file, found.vae, dtype)
    for number, (name, config) in enumerate(zip(MODULES[2:], found.texts, strict=False)):
        parts[name] = single_file.read_text(key, file, number, config, dtype)
    for part in parts.values():
        check_finite(key, found.place, part)
    return parts


def _extras(found: ModelFiles, names: set[str]) -> dict:
    """Parts that no training or drawing from text needs: kept where they are there, else None."""
    out = dict.fromkeys(names)
    folder = found.folder / "feature_extractor"
    if found.file is None and "feature_extractor" in names and (folder / "preprocessor_config.json").is_file():
        with opening(found.key, str(folder)):
            out["feature_extractor"] = transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    return out


def _tokenizer(key: str, folder: Path, text: CLIPTextConfig) -> CLIPTokenizer:
    """With the text encoder's length where it has none, or one that the encoder has no positions for."""
    if found := git_lfs.pointers_below(folder):
        raise UserError(f"{key}: {found[0]} {git_lfs.WHAT}")
    whole = (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))
    if not whole:
        raise UserError(f"{key}: {folder} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")
    with opening(key, str(folder)):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    own, most = tokenizer.model_max_length, text.max_position_embeddings
    if isinstance(own, bool) or not isinstance(own, int | float) or not 2 < own < most:  # two mark beginning and end
        tokenizer.model_max_length = most
    if (tokens := 1 + max(tokenizer.get_vocab().values(), default=0)) > text.vocab_size:
        raise UserError(
            f"{key}: the tokenizer in {folder} knows {tokens} tokens and the text encoder {text.vocab_size}; "
            "they do not belong together"
        )
    if tokenizer.pad_token is None:
        raise UserError(
            f"{key}: the tokenizer in {folder} has no pad_token, which prompts are filled up with; name one"
        )
    return tokenizer


def open_network(key: str, path: str, pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The network that `path` stands for beside the pipeline's: a copy of it with the LoRA there, or another model's.

    On the pipeline's device. key: the setting that named it, for the error message.
    """
    base = denoiser_of(pipeline).module(pipeline)
    if lora_file(path, key):
        return with_lora(base, read_lora(key, path, base))
    return load_unet(key, path, base, scheduler=pipeline.scheduler.config).to(base.device)


def load_unet(
    key: str,
    path: str,
    like: UNet2DConditionModel,
    scheduler: Mapping | None = None,
) -> UNet2DConditionModel:
    """The UNet of another model of the same shape: a pipeline's folder, a UNet's folder, a file or a hub id.

    key: the setting that named it, for the error message. scheduler: configuration of the base's; a model that says of
    itself that it predicts something else, or knows other noise levels, is refused. A single file needs no
    configuration: it has the shape of `like`.
    """
    with opening(key, path):
        return _load_unet(key, path, like, scheduler)


def _load_unet(key: str, path: str, like: UNet2DConditionModel, scheduler: Mapping | None) -> UNet2DConditionModel:
    place = path_or_id(key, path)
    if place is not None and place.is_file():
        file = read_header(key, place)
        check_unet_file(key, file)
        said = single_file.said_prediction(file)
        if scheduler is not None and said is not None:
            own = {name: value for name, value in said.items() if name != "timestep_spacing"}
            alignable.check_same_noise(key, path, {**scheduler, **own}, dict(scheduler))
        elif scheduler is not None and scheduler.get("prediction_type") == "v_prediction":
            warn_once(
                log, "%s: %s does not say what it predicts; it is taken for v, which the base predicts", key, path
            )
        unet = single_file.read_unet(key, file, dict(like.config), like.dtype)
        check_finite(key, path, unet)
        return unet
    hub = None
    if place is None:
        hub = HubModel(key, path)
        place = hub.fetch(["model_index.json", "config.json", "unet/config.json"])
    index, inside = None, ""
    if (place / "model_index.json").is_file():
        index, inside = read_json(key, place / "model_index.json"), "unet"
        alignable.check_index(key, path, index)
        if hub is not None:
            place = hub.fetch(["model_index.json", "unet/config.json", "scheduler/*.json"])
    elif not (place / "config.json").is_file():
        inside = "unet"  # a UNet alone, as trainers save their checkpoints and some publish theirs
        if not (place / inside / "config.json").is_file():
            raise UserError(f"{key}: {path} {recognise.folder_without_index(place)}")
    config = read_json(key, place / inside / "config.json")
    alignable.check_unet(key, path, config)
    _check_same_shape(key, path, config, like)
    if scheduler is not None and index is not None and (place / "scheduler" / "scheduler_config.json").is_file():
        alignable.check_same_noise(key, path, scheduler_config(key, path, place, index), dict(scheduler))
    if hub is not None and hub.folder is None:
        names = choose_files(key, path, hub.files(inside)).names
        place = hub.fetch([f"{inside}/{name}" if inside else name for name in names])
    unet = _open_part(key, UNet2DConditionModel, place / inside, like.dtype)
    side = like.config.sample_size  # the rest is the base's, the size of the pictures too
    if config["sample_size"] != side:
        warn_once(log, "%s: %s has sample_size %s; the base's, %s, is taken", key, path, config["sample_size"], side)
    unet.register_to_config(sample_size=side)
    return unet


def _check_same_shape(key: str, path: str, config: dict, like: UNet2DConditionModel) -> None:
    with opening(key, path), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    theirs, ours = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (unet, like))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{key}: the UNet of {path} does not fit the base model ({name} is {theirs.get(name)}, "
                f"there {ours.get(name)})"
            )


def load_vae(path: str, pipeline: DiffusionPipeline, key: str = "models.vae") -> AutoencoderKL:
    """Another VAE for a pipeline: a pipeline's folder, a VAE's folder, a file or a hub id. fp32.

    A file has no configuration: it is taken for one of the pipeline's own VAE's kind, with its scaling factor.
    """
    with opening(key, path):
        return _load_vae(path, pipeline, key)


def _load_vae(path: str, pipeline: DiffusionPipeline, key: str) -> AutoencoderKL:
    own, unet = dict(pipeline.vae.config), dict(pipeline.unet.config)
    place = path_or_id(key, path)
    if place is not None and place.is_file():
        file = read_header(key, place)
        found = single_file.vae_prefix(file)
        if found is None:
            what = recognise.other_than_a_unet(file) or "a UNet without a VAE"
            raise UserError(f"{key}: {path} is {what}, not a VAE of Stable Diffusion")
        channels = file.tensors.get(f"{found[0]}decoder.conv_in.weight")
        if channels is not None:
            alignable.check_vae(key, path, {"latent_channels": channels.shape[1]}, unet)
        vae = single_file.read_vae(key, file, own)
        check_finite(key, path, vae)
        return vae
    hub = None
    if place is None:
        hub = HubModel(key, path)
        place = hub.fetch(["model_index.json", "config.json", "vae/config.json"])
    inside = "vae" if (place / "vae").is_dir() else ""
    if not (place / inside / "config.json").is_file():
        raise UserError(f"{key}: {path} {recognise.folder_without_index(place)}")
    config = read_json(key, place / inside / "config.json")
    if (name := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        what = recognise.family_of_class(str(name)) or "another network"
        raise UserError(f"{key}: {path} is {what} ({name}), not a VAE of Stable Diffusion (AutoencoderKL)")
    alignable.check_vae(key, path, config, unet)
    sides = [2 ** (len(each.get("block_out_channels", (64,))) - 1) for each in (config, own)]
    if sides[0] != sides[1]:
        raise UserError(
            f"{key}: the VAE of {path} makes pictures {sides[0]} times as wide as their latents, the base's {sides[1]} "
            "times; they do not belong together"
        )
    if hub is not None and hub.folder is None:
        names = choose_files(key, path, hub.files(inside)).names
        place = hub.fetch([f"{inside}/{name}" if inside else name for name in names])
    vae = _open_part(key, AutoencoderKL, place / inside, torch.float32)
    if "scaling_factor" not in config:  # folders of old: diffusers would say 0.18215, SD 1.x's, of any
        vae.register_to_config(scaling_factor=own["scaling_factor"])
    return vae


def check_finite(key: str, place: str, model: torch.nn.Module) -> None:
    """UserError of weights that are no numbers: a file that was saved after a training broke, or rounded to fp16."""
    for name, x in model.named_parameters():
        # a sum is quick, and tells but for sums that overflow
        if not x.sum(dtype=torch.float32).isfinite() and not x.isfinite().all():
            raise UserError(
                f"{key}: {place} holds values that are not finite, in {name}; it was saved so by a broken training, or "
                "rounded to fp16: take another file of it"
            )


def quiet_libraries() -> None:
    """Their progress bars and notices would tear ours."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    # of a model's old settings, which diffusers puts right by itself, fifty lines of them
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(deprecated|outdated|configuration).*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
