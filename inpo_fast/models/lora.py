"""A LoRA (arXiv 2106.09685): W + B A for some layers of a UNet; used, merged, and written in two programs' names.

alpha / rank is part of B, inside and in what is written, whatever a reader believes of alpha. diffusers 0.32,
OneTrainer and SimpleTuner ignore the metadata in which diffusers keeps alpha, and diffusers 0.34 to 0.39 stop at
metadata of a newer peft. lora_files.py reads what others wrote.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from inpo_fast.models.files.original_keys import unet_name


@dataclass(frozen=True)
class Lora:
    """layers: name of a layer of UNet2DConditionModel -> A (rank, in, …) and B (out, rank, …) in fp32; the layer's
    weight becomes W + B A. Convolutions have their kernel in A and 1 x 1 in B."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(len(down) for down, _ in self.layers.values())

    def padded(self) -> "Lora":
        """All layers with one rank, the rest zeros. diffusers before 0.42 takes the first layer's rank for the alpha of
        all where ranks differ."""
        rank = self.rank
        return Lora({name: (_padded(a, rank, 0), _padded(b, rank, 1)) for name, (a, b) in self.layers.items()})

    def plus(self, other: "Lora") -> "Lora":
        """Both at once: their ranks side by side. A layer that one of them lacks is the other's."""
        layers = {}
        for name in [*self.layers, *(name for name in other.layers if name not in self.layers)]:
            own = [lora.layers[name] for lora in (self, other) if name in lora.layers]
            layers[name] = torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], 1)
        return Lora(layers)

    def delta(self, name: str) -> torch.Tensor:
        """B A of one layer in fp32, in the shape of its weight."""
        a, b = self.layers[name]
        return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


def _padded(x: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    missing = list(x.shape)
    missing[dim] = rank - x.shape[dim]
    return torch.cat([x, x.new_zeros(missing)], dim)


# ---- using ----------------------------------------------------------------------------------------------------------
def with_lora(unet: UNet2DConditionModel, lora: Lora) -> UNet2DConditionModel:
    """A copy of the UNet with the LoRA beside its weights, as `load_lora_weights` has it."""
    adapted = copy.deepcopy(unet)
    adapted.load_lora_adapter({name: x.to(unet.dtype) for name, x in tensors(lora).items()}, prefix=None)
    own, layers = dict(adapted.named_parameters()), lora.padded().layers
    for name, sides in layers.items():
        for side, x in zip("AB", sides, strict=True):
            landed = next((p for n, p in own.items() if n.startswith(f"{name}.lora_{side}.")), None)
            assert landed is not None and torch.equal(landed.cpu(), x.to(landed.dtype)), f"{name} did not get its LoRA"
    return adapted.to(unet.device)


@torch.no_grad()
def merge_(unet: torch.nn.Module, lora: Lora) -> None:
    """Adds the LoRA into the weights, in place; the sum is rounded once where they are narrower than fp32."""
    modules = dict(unet.named_modules())
    for name in lora.layers:
        weight = modules[name].weight
        weight.copy_(weight.float() + lora.delta(name).to(weight.device))


# ---- writing --------------------------------------------------------------------------------------------------------
def tensors(lora: Lora, prefix: str = "") -> dict[str, torch.Tensor]:
    """In diffusers' names, all with one rank. prefix: "unet." in a file."""
    layers = lora.padded().layers
    return {f"{prefix}{name}.lora_{s}.weight": x for name, ab in layers.items() for s, x in zip("AB", ab, strict=True)}


def kohya_tensors(lora: Lora, config: Mapping, diffusers_layers: bool = False) -> dict[str, torch.Tensor]:
    """In kohya's names, alpha being the rank. config: of the UNet; XL's layers are named as in the original UNet, those
    of 1.x and 2.x as in diffusers, as sd-scripts trains them.

    diffusers_layers: XL's as in diffusers too, which ai-toolkit wants, and InvokeAI and OneTrainer of XLs with other
    blocks than SDXL's. KeyError for a layer without a name in the original.
    """
    out = {}
    is_xl = config.get("addition_embed_type") == "text_time" and not diffusers_layers
    for module, (down, up) in lora.layers.items():
        name = "lora_unet_" + (unet_name(module, config) if is_xl else module).replace(".", "_")
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = down, up
        out[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return out
