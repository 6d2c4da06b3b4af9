"""A model's parts on the meta device, from its configuration files alone: for counts and estimates."""

import os
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL

from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.denoiser import Denoiser
from inpo_fast.models.families import ARCHITECTURES, PUBLISHED, denoiser_of
from inpo_fast.models.files.hub import path_or_id
from inpo_fast.models.files.lora_files import read_lora
from inpo_fast.models.files.lora_place import lora_file
from inpo_fast.models.files.model_files import find_model, opening


@dataclass(frozen=True)
class Shapes:
    """tokens: of a prompt."""

    network: torch.nn.Module
    vae: torch.nn.Module
    texts: list[torch.nn.Module]
    tokens: int

    @property
    def denoiser(self) -> Denoiser:
        return denoiser_of(self.network)


def open_shapes(models: ModelsConfig) -> Shapes:
    """What models.base or models.random names; what else the configuration names is looked for."""
    for key, place in (("models.init", models.init), ("models.vae", models.vae)):
        if place:
            path_or_id(key, place)
    shapes = _open_shapes(models)
    if models.init and lora_file(models.init, "models.init"):
        read_lora("models.init", models.init, shapes.network)
    return shapes


def _open_shapes(models: ModelsConfig) -> Shapes:
    if known := models.random or (None if os.path.isdir(models.base) else PUBLISHED.get(models.base)):
        family = ARCHITECTURES[known]
        texts = family.text_configs(known)
        with torch.device("meta"):
            network, vae = family.make_network(known), family.make_vae(known)
            return Shapes(network, vae, family.meta_encoders(texts), texts[0].max_position_embeddings)
    found = find_model("models.base", models.base, models.single_file_config)
    with opening("models.base", models.base), torch.device("meta"):
        network, vae = found.family.build(found.unet), AutoencoderKL.from_config(found.vae)
        texts = found.family.meta_encoders(found.texts)
        return Shapes(network, vae, texts, found.texts[0].max_position_embeddings)
