"""What a run gives away: a pipeline with the aligned network in fp32, and of LoRA the adapter."""

import copy
import logging
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.families import PARTS
from inpo_fast.models.files.hub import base_folder
from inpo_fast.models.files.lora_place import lora_file
from inpo_fast.models.files.safetensors_metadata import About, kohya_metadata, write_tensors
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.lora import Lora, add_adapter, kohya_tensors, tensors
from inpo_fast.models.models import Models
from inpo_fast.report.start import ITSELF, WITH_LORA, public_name
from inpo_fast.runtime.files import parse_json
from inpo_fast.runtime.warn_once import warn_once

log = logging.getLogger(__name__)

KOHYA_NAME = "kohya-for-comfyui-a1111-forge.safetensors"


@torch.no_grad()
def whole_masters(models: Models, keep: bool = True) -> dict[str, torch.Tensor]:
    """The fp32 masters by name, on the CPU where they come from several processes. Every process must call it where
    the weights are partitioned; one that does not `keep` them gets none."""
    weights, kept = models.weights, {}
    for name, master in weights.whole():
        if keep:
            kept[name] = master if weights.partition is None else master.cpu()
    return kept


def reopens_base(config: ModelsConfig) -> bool:
    """Whether `output_pipeline` reads the base's files again: memory has them rounded, or with an adapter."""
    return config.precision != "fp32" or config.lora.rank > 0


def reference_in_words(config: ModelsConfig) -> str:
    """What the frozen reference is; the policy starts as the same."""
    if not config.init:
        return "models.base"
    return WITH_LORA if lora_file(config.init) else ITSELF


@torch.no_grad()
def output_pipeline(models: Models, masters: dict[str, torch.Tensor] | None = None) -> DiffusionPipeline:
    """The pipeline to save: the base's parts as they were loaded, the network from the fp32 masters; adapters merged.

    masters: what `whole_masters` gave, needed where the weights are partitioned over processes.
    """
    config, denoiser = models.config, models.denoiser
    if not reopens_base(config):
        pipeline = copy.copy(models.pipeline)
        denoiser.put(pipeline, models.policy)
        return pipeline
    # the running pipeline holds rounded weights: the parts that were not trained are opened again
    if config.random:  # weights drawn in bf16 are not those drawn in fp32 and rounded
        pipeline = open_pipeline(config).to(torch.float32)
    else:
        pipeline = open_pipeline(replace(config, precision="fp32"))
    if models.adapters:
        merge_adapter_(models, denoiser.module(pipeline), masters)
    else:
        masters = masters or whole_masters(models)
        denoiser.module(pipeline).load_state_dict({name: x.cpu() for name, x in masters.items()}, strict=False)
    return pipeline


def merge_adapter_(
    models: Models, network: torch.nn.Module, masters: dict[str, torch.Tensor] | None = None
) -> torch.nn.Module:
    """Adds the trained adapter into the weights of the base's network in fp32, in place."""
    add_adapter(network, models.config.lora)
    own = dict(network.named_parameters())
    for name, master in (masters or whole_masters(models)).items():
        own[name].data.copy_(master)
    network.fuse_lora()
    network.unload_lora()
    return network


def untouched_parts(config: ModelsConfig) -> dict[str, Path]:
    """Part of the pipeline -> the folder that it was loaded from, where there is one. Everything but the network."""
    base = None if config.random else base_folder(config.base)
    parts = {path.name: path for path in base.iterdir() if path.is_dir()} if base else {}
    for part in PARTS:
        parts.pop(part, None)
    if config.vae:
        vae = Path(config.vae).expanduser()
        parts["vae"] = vae / "vae" if (vae / "vae").is_dir() else vae
        if not _names_its_scale(parts["vae"]):
            del parts["vae"]
    return {name: path for name, path in parts.items() if path.is_dir()}


def _names_its_scale(vae: Path) -> bool:
    """Whether a VAE's folder says what its latents are multiplied by: without a word it is the base's here, but 1.x's
    to whoever opens a copy of it."""
    try:
        return "scaling_factor" in parse_json((vae / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def trained_lora(models: Models, masters: dict[str, torch.Tensor] | None = None) -> Lora:
    """The adapter in fp32, alpha / rank inside; with the LoRA that the run started from, so that it fits the base."""
    settings = models.policy.peft_config["default"]
    scale, layers = settings.lora_alpha / settings.r, {}
    masters = {name: x.detach().cpu() for name, x in (masters or whole_masters(models)).items()}
    for name, a in masters.items():
        if ".lora_A." in name:
            layers[name.partition(".lora_A.")[0]] = a, scale * masters[name.replace(".lora_A.", ".lora_B.")]
    lora = Lora(layers)
    return lora if models.init_lora is None else models.init_lora.plus(lora)


def save_adapter(models: Models, folder: Path, masters: dict[str, torch.Tensor] | None = None) -> None:
    """The LoRA in fp32, once for each kind of reader: diffusers' names without metadata, which `load_lora_weights`
    takes, and kohya's, which ComfyUI, A1111, Forge, InvokeAI and sd-scripts read whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lora, denoiser = trained_lora(models, masters), models.denoiser
    write_tensors(tensors(lora, f"{denoiser.part}."), {}, folder / LORA_WEIGHT_NAME_SAFE)
    config, predicts = models.config, models.noise_path.output
    base = public_name({"base": config.base, "init": config.init, "reference": reference_in_words(config)})
    about = About(denoiser, folder.parent.name, models.resolution, predicts, base)
    try:
        write_tensors(kohya_tensors(lora, denoiser), kohya_metadata(about, lora.rank), folder / KOHYA_NAME)
    except KeyError as problem:
        warn_once(log, "lora/: no kohya file, the original UNet has no name for the layer %s", problem.args[0])


def detach_policy(models: Models) -> torch.nn.Module:
    """The aligned network as its own module, in the working precision; models.pipeline keeps the untouched base."""
    if not models.adapters:
        return models.policy
    aligned = copy.deepcopy(models.policy)
    aligned.fuse_lora()
    aligned.unload_lora()
    models.policy.unload_lora()
    return aligned
