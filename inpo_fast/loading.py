"""A diffusers folder, single file, hub id or named architecture becomes a pipeline."""

import os
import pickle
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open

from inpo_fast.architectures import random_pipeline
from inpo_fast.lora import lora_file, merge_, read_lora, with_lora
from inpo_fast.models import DTYPES, ModelsConfig
from inpo_fast.refusal import Refusal


def open_pipeline(config: ModelsConfig) -> DiffusionPipeline:
    """What the configuration names, on the CPU: fp32, or for LoRA, which needs no masters, in the working precision.

    Where models.init is a LoRA, its weights are merged, and it is kept as `pipeline.init_lora`.
    """
    dtype = DTYPES[config.precision] if config.lora.rank else torch.float32
    if config.random:
        if config.base:
            raise Refusal(f"models.base={config.base} and models.random={config.random}: give one of them")
        pipeline = random_pipeline(config.random, dtype)
    else:
        pipeline = load_pipeline(config.base, dtype, config.single_file_config)
    if config.init and lora_file(config.init):
        pipeline.init_lora = read_lora("models.init", config.init, pipeline.unet)
        merge_(pipeline.unet, pipeline.init_lora)
    elif config.init:
        pipeline.unet = load_unet("models.init", config.init, pipeline.unet, config.single_file_config)
    if config.vae:
        pipeline.vae = load_vae(config.vae)
    return pipeline


def load_pipeline(
    base: str, dtype: torch.dtype = torch.float32, single_file_config: str | None = None
) -> DiffusionPipeline:
    """The stock pipeline of a model, without safety checker. Refusal when it cannot be opened."""
    if not base:
        raise Refusal("models.base is empty; give a diffusers folder, a .safetensors file or a hub id")
    if base.endswith(".safetensors"):
        pipeline = _load_single_file(base, dtype, single_file_config)
    else:
        with opening("models.base", base) as local:
            pipeline = DiffusionPipeline.from_pretrained(
                base, dtype=dtype, safety_checker=None, requires_safety_checker=False, **local
            )
    if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
        raise Refusal(
            f"models.base: {base} is a {type(pipeline).__name__}; only models with a UNet2DConditionModel "
            "(Stable Diffusion 1.x, 2.x, XL) can be aligned"
        )
    kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise Refusal(f"models.base: {base} predicts {kind!r}; only epsilon and v_prediction models can be aligned")
    return pipeline


def load_unet(
    key: str, path: str, like: UNet2DConditionModel, single_file_config: str | None = None
) -> UNet2DConditionModel:
    """The UNet of another model of the same shape: a pipeline's folder, a UNet's folder, a file or a hub id.

    key: the setting that named it, for the refusal.
    """
    if path.endswith(".safetensors"):
        unet = load_pipeline(path, like.dtype, single_file_config).unet
    else:
        with opening(key, path) as local:
            inside = {} if os.path.isfile(os.path.join(path, "config.json")) else {"subfolder": "unet"}
            unet = UNet2DConditionModel.from_pretrained(path, dtype=like.dtype, **inside, **local)
    theirs, ours = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (unet, like))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise Refusal(
                f"{key}: the UNet of {path} does not fit the base model ({name} is {theirs.get(name)}, "
                f"there {ours.get(name)})"
            )
    return unet


def open_unet(
    key: str, path: str, base: UNet2DConditionModel, single_file_config: str | None = None
) -> UNet2DConditionModel:
    """The UNet that `path` stands for beside `base`: a copy of it with the LoRA there, or another model's.

    On base's device. key: the setting that named it, for the refusal.
    """
    if lora_file(path):
        return with_lora(base, read_lora(key, path, base))
    return load_unet(key, path, base, single_file_config).to(base.device)


def load_vae(path: str) -> AutoencoderKL:
    """Another VAE: a pipeline's folder, a VAE's folder, a file or a hub id. fp32."""
    with opening("models.vae", path) as local:
        if path.endswith(".safetensors"):
            return AutoencoderKL.from_single_file(path, dtype=torch.float32)
        inside = {"subfolder": "vae"} if os.path.isdir(os.path.join(path, "vae")) else {}
        return AutoencoderKL.from_pretrained(path, dtype=torch.float32, **inside, **local)


def _load_single_file(path: str, dtype: torch.dtype, config: str | None) -> DiffusionPipeline:
    if not os.path.isfile(path):
        raise Refusal(f"models.base: no such file: {path}")
    with opening("models.base", path):
        with safe_open(path, "pt") as file:
            xl = any(key.startswith("conditioner.embedders.1.") for key in file.keys())  # noqa: SIM118
        kind, more = (StableDiffusionXLPipeline, {}) if xl else (StableDiffusionPipeline, {"safety_checker": None})
        local = {} if config is None else {"config": config, "local_files_only": True}
        return kind.from_single_file(path, dtype=dtype, **more, **local)


@contextmanager
def opening(key: str, path: str):
    """Gives the options that keep a folder from reaching for the network; what fails inside is refused in one line."""
    try:
        yield _offline(key, path)
    except (OSError, ValueError, KeyError, SafetensorError, pickle.UnpicklingError) as problem:
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        raise Refusal(f"{key}: cannot open {path!r} as a diffusers model ({lines[0]})") from problem


def _offline(key: str, path: str) -> dict:
    """A folder must not reach for the network; anything else that looks like a path must exist."""
    if os.path.isdir(path):
        return {"local_files_only": True}
    if os.path.sep in path and path.count(os.path.sep) != 1 and not os.path.isfile(path):
        raise Refusal(f"{key}: no such folder: {path}")
    return {}


def quiet_libraries() -> None:
    """Their progress bars and notices would tear ours."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
