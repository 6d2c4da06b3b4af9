"""What a run gives away: a pipeline with the aligned UNet in fp32, and of LoRA the adapter."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict

from inpo_fast.loading import open_pipeline
from inpo_fast.models import Models


@torch.no_grad()
def whole_masters(models: Models, keep: bool = True) -> dict[str, torch.Tensor]:
    """The fp32 masters by name, on the CPU where they come from several processes. Every process must call it where
    the weights are split; one that does not `keep` them gets none."""
    weights, kept = models.weights, {}
    for name, master in weights.whole():
        if keep:
            kept[name] = master if weights.split is None else master.cpu()
    return kept


@torch.no_grad()
def output_pipeline(models: Models, masters: dict[str, torch.Tensor] | None = None) -> DiffusionPipeline:
    """The pipeline to save: the base's parts as they were loaded, the UNet from the fp32 masters; adapters merged.

    masters: what `whole_masters` gave, needed where the weights are split over processes.
    """
    config = models.config
    if config.precision == "fp32" and not models.adapters:
        pipeline = copy.copy(models.pipeline)
        pipeline.unet = models.policy
        return pipeline
    # the running pipeline holds rounded weights: the parts that were not trained are opened again
    if config.random:  # weights drawn in bf16 are not those drawn in fp32 and rounded
        pipeline = open_pipeline(config).to(torch.float32)
    else:
        pipeline = open_pipeline(replace(config, precision="fp32"))
    if models.adapters:
        pipeline.unet = merged(models, pipeline.unet, masters)
    else:
        masters = masters or whole_masters(models)
        pipeline.unet.load_state_dict({name: master.cpu() for name, master in masters.items()}, strict=False)
    return pipeline


def merged(models: Models, unet: torch.nn.Module, masters: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """The base `unet` in fp32 with the trained adapter added into its weights, in place."""
    from inpo_fast.models import add_adapter

    add_adapter(unet, models.config.lora)
    own = dict(unet.named_parameters())
    for name, master in (masters or whole_masters(models)).items():
        own[name].data.copy_(master)
    unet.fuse_lora()
    unet.unload_lora()
    return unet


def save_adapter(models: Models, folder: Path, masters: dict[str, torch.Tensor] | None = None) -> None:
    """pytorch_lora_weights.safetensors in diffusers' layout, fp32."""
    layers = get_peft_model_state_dict(models.policy, state_dict=masters or whole_masters(models))
    settings = models.policy.peft_config["default"]
    # alpha is not in the tensors: without it every reader takes alpha = rank. Only what every version of peft knows
    metadata = {"r": settings.r, "lora_alpha": settings.lora_alpha, "target_modules": sorted(settings.target_modules)}
    type(models.pipeline).save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata, safe_serialization=True
    )


def detach_policy(models: Models) -> torch.nn.Module:
    """The aligned UNet as a module of its own, in the working precision; models.pipeline keeps the untouched base."""
    if not models.adapters:
        return models.policy
    aligned = copy.deepcopy(models.policy)
    aligned.fuse_lora()
    aligned.unload_lora()
    models.policy.unload_lora()
    return aligned
