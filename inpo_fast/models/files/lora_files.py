"""A LoRA's file in whatever names it was saved: checked against its UNet and read (lora_place.py finds it).

Read are diffusers' names, peft's, kohya's (with the layers named as in diffusers or as in the original UNet) and those
of ComfyUI. Every tensor must belong to a layer of the UNet and be finite: a LoRA that fits in half would draw, without
a word, something between the base and what it was trained to be.
"""

import contextlib
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from inpo_fast.models.files.lora_place import DIFFUSERS_WEIGHTS, RELATIVES, lora_file
from inpo_fast.models.files.original_keys import unet_name
from inpo_fast.models.files.safetensors_header import read_header
from inpo_fast.models.lora import Lora
from inpo_fast.models.unet import UNETS, UNet
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import parse_json, read_regular
from inpo_fast.runtime.warn_once import warn_once

log = logging.getLogger(__name__)

PEFT_CONFIG = "adapter_config.json"
PREFIXES = (
    "module.",
    "_orig_mod.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "lora_unet_",
    "lycoris_",
)
TEXT = re.compile(r"(base_model\.model\.)?(lora_te\d?_|text_encoder|te\d?[._]|lora_prior_te_|conditioner\.|clip_[lg])")
SIDES = {"A": "A", "B": "B", "down": "A", "up": "B"}
TENSOR = re.compile(
    r"(?P<layer>.+?)(?:\.lora|_lora|\.lora_linear_layer)?[._](?:lora_)?(?P<side>A|B|down|up)(?:\.(?!weight)\w+)?\.weight"
)
ALPHA = re.compile(r"(?P<layer>.+?)\.alpha")
LAYERS = torch.nn.Linear | torch.nn.Conv2d


def read_lora(key: str, path: str | Path, unet: torch.nn.Module) -> Lora:
    """The LoRA of a file or folder for this UNet (which may be on the meta device).

    key: the setting that named it, for the error message. UserError where a tensor has no place in the UNet, does not
    fit, is not finite, or belongs to another kind of adapter.
    """
    shapes = {name: layer.weight.shape for name, layer in unet.named_modules() if isinstance(layer, LAYERS)}
    return _lora(key, path, layer_names(unet), shapes)


def read_lora_alone(key: str, path: str | Path, layout: bool = True) -> tuple[Lora, UNet]:
    """The LoRA of a file or folder whose UNet is not at hand, and what it shows of the UNet.

    layout: with what the names of its layers in the original UNet need. UserError where the LoRA does not show that.
    """
    file = _find(key, path)
    with safe_open(file, "pt") as opened:
        found = [match["layer"] for name in opened.keys() if (match := TENSOR.fullmatch(name))]  # noqa: SIM118
    if any("." not in _bare(name) for name in found):  # underscores: only the shapes' own names tell what is what
        # XL has no attention at full resolution; a smaller XL has a part of XL's own layers, if they are diffusers'
        kind = "sd15" if any("down_blocks_0_attentions" in name for name in found) else "sdxl"
        with torch.device("meta"):
            unet = UNet.make_network(kind)
        try:
            lora = _lora(key, path, layer_names(unet), None)
        except UserError as problem:
            raise UserError(f"{problem}; if it is one, name the folder of the model with --model") from problem
    else:
        lora = _lora(key, path, {_bare(name): _bare(name) for name in found}, None)
    config = _layout(key, file, lora) if layout else {}
    widths = {a.shape[1] for name, (a, _) in lora.layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    if len(widths) == 1:
        config["cross_attention_dim"] = width = widths.pop()
        if width == 2048:
            config.setdefault("addition_embed_type", "text_time")
    return lora, UNet(config)


def _find(key: str, path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{key}: no such file or folder: {path}")
    file = lora_file(path, key)
    if file is not None or path.is_file():
        read_header(key, path if file is None else file)  # says of a Git LFS pointer, or half a file, what it is
    if file is None and path.is_dir():
        raise UserError(f"{key}: {path} holds no LoRA: neither {DIFFUSERS_WEIGHTS} nor another LoRA's .safetensors")
    if file is None:
        raise UserError(f"{key}: {path} is not a LoRA in a .safetensors file")
    return file


def _layout(key: str, file: Path, lora: Lora) -> dict:
    """The configuration of the UNet as far as the names of its layers in the original need it."""
    if any(name.startswith("down_blocks.0.attentions.") for name in lora.layers):  # XL has none at full resolution
        return UNETS["sd15"] | {"layers_per_block": 2}
    if any(".transformer_blocks.1." in name for name in lora.layers):  # one a layer in SD 1.x and 2.x
        last: dict[str, int] = {}
        for name in lora.layers:
            if at := re.match(r"((?:down|up)_blocks\.\d)\.attentions\.(\d+)", name):
                last[at[1]] = max(last.get(at[1], 0), int(at[2]))
        # an up block has one layer more than a down block; only if all agree was nothing left out of the LoRA
        layers = {number + block.startswith("down") for block, number in last.items()}
        if len(last) > 1 and len(layers) == 1 and min(layers):
            return UNETS["sdxl"] | {"layers_per_block": layers.pop()}
    raise UserError(
        f"{key}: {file} does not show whether it belongs to SD or SDXL, or to one with other blocks; name the folder "
        "of the model with --model"
    )


def _lora(key: str, path: str | Path, names: dict[str, str], shapes: dict[str, torch.Size] | None) -> Lora:
    """names: what a layer goes by -> its name in diffusers. shapes: of the layers' weights, where they are known."""
    file = _find(key, path)
    found, metadata = _read(key, file)
    sides, alphas, unknown = _sorted(key, file, found, names)
    if unknown:
        raise UserError(_misfit(key, file, unknown, len(found)))
    is_peft = not alphas and all(name.startswith("base_model.model.") for name in found)
    layers, scale = {}, _scales(key, file, metadata, is_peft)
    for name, own in sides.items():
        if own.keys() != {"A", "B"}:
            raise UserError(f"{key}: {file}: layer {name} has one of its two matrices only; the file is incomplete")
        a, b = _shaped(key, file, name, own["A"], own["B"], None if shapes is None else shapes[name])
        layers[name] = a, b * (alphas[name] / len(a) if name in alphas else scale(name, len(a)))
    return Lora(layers)


def _read(key: str, file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata() or {}
            for pattern, kind in RELATIVES.items():
                if found := next((name for name in names if re.search(pattern, name)), None):
                    raise UserError(
                        f"{key}: {file} is {kind}: {found}; only LoRA is read, so merge it into its model with the "
                        "program that made it and give that model"
                    )
            tensors = {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{key}: {file} cannot be read ({problem})") from problem
    for name, x in tensors.items():
        if not x.float().isfinite().all():
            raise UserError(f"{key}: {file}: {name} has values that are not finite; the LoRA is broken")
    return tensors, metadata


def layer_names(unet: torch.nn.Module) -> dict[str, str]:
    """Every name that a linear layer or convolution of the UNet goes by -> its name in diffusers.

    With dots or underscores, in diffusers' words or the original UNet's, where that has a name for it.
    """
    names: dict[str, str] = {}
    for module, layer in unet.named_modules():
        if isinstance(layer, LAYERS):
            alike = [module]
            with contextlib.suppress(KeyError):  # a layer that the original UNet does not have
                alike.append(unet_name(module, unet.config))
            if found := re.fullmatch(r"(.+\.attn\d)\.(to_q|to_k|to_v|to_out)(\.0)?", module):
                alike.append(f"{found[1]}.processor.{found[2]}")  # diffusers before 0.22: processor.to_q_lora
            names |= {name: module for each in alike for name in (each, each.replace(".", "_"))}
    return names


def _sorted(key: str, file: Path, tensors: Mapping[str, torch.Tensor], names: dict[str, str]):
    """layer -> its A and B; layer -> alpha; the names that have no place. UserError of a text encoder's tensors."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown: list[str] = []
    if text := [name for name in tensors if TEXT.match(name)]:
        raise UserError(
            f"{key}: {file} trains the text encoder too ({len(text)} of {len(tensors)} tensors, the first {text[0]}); "
            "only LoRAs of the UNet are read: give the model that it was merged into"
        )
    for name, x in tensors.items():
        found, is_alpha = TENSOR.fullmatch(name), ALPHA.fullmatch(name)
        layer = _layer((found or is_alpha)["layer"], names) if found or is_alpha else None
        if layer is None:
            unknown.append(name)
        elif is_alpha:
            alphas[layer] = float(x)
        else:
            side = SIDES[found["side"]]
            if side in sides.setdefault(layer, {}):
                raise UserError(f"{key}: {file}: layer {layer} stands there twice ({name})")
            sides[layer][side] = x.float()
    return sides, alphas, unknown


def _layer(name: str, names: dict[str, str]) -> str | None:
    return names.get(name) or names.get(_bare(name))


def _bare(name: str) -> str:
    """Without what programs put in front of the UNet's own names."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _misfit(key: str, file: Path, unknown: list[str], count: int) -> str:
    why = "it belongs to a model of another layout" if len(unknown) < count else "it is not a LoRA of this kind of UNet"
    missing = f"tensors without a place in the UNet: {len(unknown)} of {count}, the first {unknown[0]}"
    return f"{key}: {file}: {missing}; {why}"


def _shaped(key: str, file: Path, name: str, a: torch.Tensor, b: torch.Tensor, weight: torch.Size | None):
    """A and B in the shape that the layer wants: a 1 x 1 convolution and a linear layer are the same thing."""
    weight = torch.Size([len(b), *a.shape[1:]]) if weight is None else weight
    around = (1,) * (len(weight) - 2)
    if a.ndim != len(weight) and math.prod(a.shape[2:]) == math.prod(weight[2:]) == 1:
        a = a.reshape(*a.shape[:2], *around)
    if math.prod(b.shape[2:]) == 1:
        b = b.reshape(*b.shape[:2], *around)
    if a.shape[1:] != weight[1:] or b.shape != (weight[0], len(a), *around):
        raise UserError(
            f"{key}: {file}: layer {name} is {tuple(a.shape)} and {tuple(b.shape)}, which does not fit a weight of "
            f"{tuple(weight)}; the LoRA belongs to a model of another size"
        )
    return a, b


def _scales(key: str, file: Path, metadata: dict[str, str], is_peft: bool):
    """(layer, rank) -> what B is multiplied by where the file has no alpha tensors: diffusers' metadata or peft's
    configuration beside it, else 1."""
    try:
        settings = parse_json(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        settings = {name.removeprefix("unet."): value for name, value in settings.items()}
        beside = file.parent / PEFT_CONFIG
        if not settings and is_peft and beside.is_file():
            settings = parse_json(read_regular(beside))
        elif not settings and is_peft:
            warn_once(
                log, "%s: %s is peft's, without %s beside it: alpha is taken for the rank", key, file, PEFT_CONFIG
            )
        if settings.get("use_dora"):
            raise UserError(f"{key}: {file} is a DoRA; only LoRA is read")
        alphas, common = settings.get("alpha_pattern") or {}, settings.get("lora_alpha")

        def scale(layer: str, rank: int) -> float:
            pattern = get_pattern_key(alphas.keys(), layer)
            alpha = alphas.get(pattern, common)
            if alpha is None:
                return 1.0
            return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)

        scale("", 1)
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"{key}: {file}: its settings of alpha cannot be read ({problem!r})") from problem
    return scale
