"""A LoRA (arXiv 2106.09685): W + B A for some layers of a network; used, merged, trained, and written in two programs'
names.

alpha / rank is part of B, inside and in what is written, whatever a reader believes of alpha. diffusers 0.32,
OneTrainer and SimpleTuner ignore the metadata in which diffusers keeps alpha, and diffusers 0.34 to 0.39 stop at
metadata of a newer peft. lora_files.py reads what others wrote.
"""

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inpo_fast.models.config import LoraSettings
from inpo_fast.models.denoiser import Denoiser
from inpo_fast.runtime.errors import UserError, shortened

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)  # that may have a LoRA


@dataclass(frozen=True)
class Lora:
    """layers: diffusers' name of a layer -> A (rank, in, …) and B (out, rank, …) in fp32; the layer's weight becomes
    W + B A. Convolutions have their kernel in A and 1 x 1 in B."""

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
def with_lora(network: torch.nn.Module, lora: Lora) -> torch.nn.Module:
    """A copy of the network with the LoRA beside its weights, as `load_lora_weights` has it."""
    adapted = copy.deepcopy(network)
    adapted.load_lora_adapter({name: x.to(network.dtype) for name, x in tensors(lora).items()}, prefix=None)
    own, layers = dict(adapted.named_parameters()), lora.padded().layers
    for name, sides in layers.items():
        for side, x in zip("AB", sides, strict=True):
            landed = next((p for n, p in own.items() if n.startswith(f"{name}.lora_{side}.")), None)
            assert landed is not None and torch.equal(landed.cpu(), x.to(landed.dtype)), f"{name} did not get its LoRA"
    return adapted.to(network.device)


@torch.no_grad()
def merge_(network: torch.nn.Module, lora: Lora) -> None:
    """Adds the LoRA into the weights, in place; the sum is rounded once where they are narrower than fp32."""
    modules = dict(network.named_modules())
    for name in lora.layers:
        weight = modules[name].weight
        weight.copy_(weight.float() + lora.delta(name).to(weight.device))


# ---- training -------------------------------------------------------------------------------------------------------
def add_adapter(network: torch.nn.Module, settings: LoraSettings) -> list:
    """Adds trainable adapters in place; returns the layers that have one. UserError of targets that the network does
    not have, or where no adapter can be."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_targets(network, settings.targets)
    alpha = settings.rank if settings.alpha is None else settings.alpha
    network.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(settings.targets), init_lora_weights=True)
    )
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def check_targets(network: torch.nn.Module, targets: Sequence[str]) -> None:
    """peft takes a name for every layer whose own ends with it, refuses where none of all names has a layer, and leaves
    out in silence those of several that have none."""
    layers = {name: isinstance(module, LAYERS) for name, module in network.named_modules() if name}
    short = {".".join(re.search(r"[^.]+(\.\d+)*$", name)[0].split(".")) for name, good in layers.items() if good}
    if not targets:
        raise UserError(f"models.lora.targets is empty; there are {', '.join(sorted(short))}")
    for target in targets:
        found = [good for name, good in layers.items() if name == target or name.endswith(f".{target}")]
        if not found or not all(found):
            near = difflib.get_close_matches(target, sorted(short), n=len(short), cutoff=0)
            what = "no layer" if not found else "no linear layer or convolution"
            raise UserError(
                f"models.lora.targets: the network has {what} of the name {shortened(target)!r}; there are "
                f"{', '.join(near)}"
            )


def zero_factors(adapters: list) -> list[tuple[torch.nn.Module, torch.nn.Parameter]]:
    """The last layer of each adapter, and a weight of zeros for it: with it in place the model is its base."""
    last = [factor for layer in adapters for factor in layer.lora_B.values()]
    return [(factor, torch.nn.Parameter(torch.zeros_like(factor.weight))) for factor in last]


# ---- writing --------------------------------------------------------------------------------------------------------
def tensors(lora: Lora, prefix: str = "") -> dict[str, torch.Tensor]:
    """In diffusers' names, all with one rank. prefix: "unet." in a file."""
    layers = lora.padded().layers
    return {f"{prefix}{name}.lora_{s}.weight": x for name, ab in layers.items() for s, x in zip("AB", ab, strict=True)}


def kohya_tensors(lora: Lora, denoiser: Denoiser, diffusers_layers: bool = False) -> dict[str, torch.Tensor]:
    """In kohya's names (Denoiser.kohya_name), alpha being the rank. KeyError for a layer without a name there."""
    out = {}
    for layer, (down, up) in lora.layers.items():
        name = denoiser.kohya_name(layer, diffusers_layers)
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = down, up
        out[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return out
