"""The table of model families: which one a pipeline, a network or a folder of diffusers' belongs to.

A new family is a file like unet.py and its lines here.
"""

from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from inpo_fast.models.denoiser import Denoiser
from inpo_fast.models.unet import UNet
from inpo_fast.runtime.files import parse_json, read_regular

PIPELINES: dict[str, type[Denoiser]] = {  # class in model_index.json -> family
    "StableDiffusionPipeline": UNet,
    "StableDiffusionImg2ImgPipeline": UNet,
    "StableDiffusionInpaintPipeline": UNet,
    "StableDiffusionPAGPipeline": UNet,
    "StableDiffusionXLPipeline": UNet,
    "StableDiffusionXLImg2ImgPipeline": UNet,
    "StableDiffusionXLInpaintPipeline": UNet,
    "StableDiffusionXLPAGPipeline": UNet,
}
FAMILIES = tuple(dict.fromkeys(PIPELINES.values()))
PARTS = tuple(dict.fromkeys(family.part for family in FAMILIES))
NETWORKS = {family.network_class: family for family in FAMILIES}  # class of diffusers -> family
ARCHITECTURES = {name: family for family in FAMILIES for name in family.architectures}  # models.random -> family
PUBLISHED = {hub_id: name for family in FAMILIES for hub_id, name in family.published.items()}


def denoiser_of(model: DiffusionPipeline | nn.Module) -> Denoiser:
    """Of a pipeline, or of a network alone."""
    if isinstance(model, nn.Module):
        return NETWORKS[type(model).__name__](model.config)
    family = PIPELINES[type(model).__name__]
    return family(getattr(model, family.part).config)


def denoiser_in(folder: Path) -> Denoiser | None:
    """Of a pipeline's folder, by its network's configuration; None where there is none of the table."""
    for family in FAMILIES:
        file = folder / family.part / "config.json"
        if file.is_file():
            config = parse_json(read_regular(file))
            if config.get("_class_name", UNet.network_class) == family.network_class:
                return family(config)
    return None
