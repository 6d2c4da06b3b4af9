"""Reads parts of a model out of a single .safetensors file, under the names of the original checkpoints
(original_keys.py, which is that mapping's other direction), or under diffusers' own.

A part is built from its configuration without weights, every one of its tensors is looked up in the file's header, and
only when all are there, in the right shape and none is left over, the weights are read. UNets are found as ComfyUI,
A1111 and trainers save them: in a whole checkpoint, alone, with or without the prefix, as EMA weights alone (whose
names have lost their dots: ldm's LitEma). A file's own word on what it predicts, `v_pred` and `ztsnr` (NoobAI-XL and
our own export; ComfyUI reads them) or `modelspec.*` metadata, goes before what its configuration says.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from inpo_fast.models.files import recognise
from inpo_fast.models.files.alignable import ALIGNED
from inpo_fast.models.files.original_keys import clip_tensors, open_clip_tensors, unet_name, vae_tensors
from inpo_fast.models.files.safetensors_header import FLOAT8, SafetensorsFile
from inpo_fast.runtime.errors import UserError

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
EMA = "model_ema."
CLIP_PLACES = (  # prefix, whether its names are OpenCLIP's; of text_encoder, then of text_encoder_2
    (
        ("cond_stage_model.transformer.", False),
        ("cond_stage_model.model.", True),
        ("conditioner.embedders.0.transformer.", False),
        ("text_encoder.", False),
    ),
    (("conditioner.embedders.1.model.", True), ("text_encoder_2.", False)),
)
MARKS = {"v_pred", "ztsnr"}
BOOKKEEPING = re.compile(  # what trainers leave beside the weights
    r"(sqrt_|log_|lvlb_|posterior_|alphas_cumprod|betas|logvar|global_step|epoch|denoiser\.|loss\.|model_ema\."
    r"|optimizer|lr_sched|callbacks|pytorch-lightning|hyper_parameters|scale_factor|iteration|step)"
)
PARTS = ("model.", "diffusion_model.", "unet.", "first_stage_model.", "vae.", "cond_stage_model.", "conditioner.")
PARTS += ("text_encoder", "input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
PARTS += ("conv_in.", "conv_out.", "conv_norm_out.", "down_blocks.", "mid_block.", "up_blocks.", "time_embedding.")
PARTS += ("add_embedding.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
VAE_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # diffusers before 0.18


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: its name in the file, and what is done with it."""

    name: str
    take: Callable[[torch.Tensor], torch.Tensor] = lambda x: x


# ---- what a file holds -----------------------------------------------------------------------------------------------
def unet_prefix(file: SafetensorsFile) -> tuple[str, bool] | None:
    """The prefix of the UNet's names and whether they are the original ones; None where there is no UNet."""
    for prefix in UNET_PREFIXES:
        if f"{prefix}input_blocks.0.0.weight" in file:
            return prefix, True
        if f"{prefix}down_blocks.0.resnets.0.norm1.weight" in file and f"{prefix}conv_in.weight" in file:
            return prefix, False
    return (EMA, True) if f"{EMA}diffusion_modelinput_blocks00weight" in file else None


def vae_prefix(file: SafetensorsFile) -> tuple[str, bool] | None:
    for prefix in VAE_PREFIXES:
        if f"{prefix}encoder.down.0.block.0.norm1.weight" in file:
            return prefix, True
        if f"{prefix}encoder.down_blocks.0.resnets.0.norm1.weight" in file:
            return prefix, False
    return None


def has_texts(file: SafetensorsFile) -> int:
    """How many of text_encoder and text_encoder_2 are there."""
    return sum(any(file.starting(prefix) for prefix, _ in places) for places in CLIP_PLACES)


def shape_of_unet(file: SafetensorsFile) -> dict[str, int | bool]:
    """What the header tells: channels, width of the text (None without attention), numbers beside the text, LCM."""
    prefix, original = unet_prefix(file)

    def shape(theirs: str, ours: str) -> tuple[int, ...] | None:
        name = _stored_name(prefix, theirs) if original else prefix + ours
        return file.tensors[name].shape if name in file else None

    widths = {s.shape[-1] for n, s in file.tensors.items() if n.startswith(prefix) and n.endswith("attn2.to_k.weight")}
    widths |= {s.shape[-1] for n, s in file.tensors.items() if n.startswith(EMA) and n.endswith("attn2to_kweight")}
    beside = shape("label_emb.0.0.weight", "add_embedding.linear_1.weight")
    classes = shape("label_emb.weight", "class_embedding.weight") or shape("", "class_embedding.linear_1.weight")
    return {
        "in_channels": shape("input_blocks.0.0.weight", "conv_in.weight")[1],
        "out_channels": (shape("out.2.weight", "conv_out.weight") or (4,))[0],
        "text": max(widths, default=None),
        "beside": beside[1] if beside else None,
        "classes": classes is not None,
        "lcm": shape("time_embed.cond_proj.weight", "time_embedding.cond_proj.weight") is not None,
    }


def check_kind(key: str, file: SafetensorsFile) -> None:
    """UserError of a file without a UNet that can be aligned, by what it is."""
    what = recognise.other_than_a_unet(file)
    if what is not None:
        helps = {"a LoRA": "; name the model that it belongs to", "a VAE": "; give it as models.vae"}
        tail = next((text for start, text in helps.items() if what.startswith(start)), "")
        holds = "holds" if what.endswith("weights") or what.startswith(("weights", "quantized", "scaled")) else "is"
        raise UserError(f"{key}: {file.path} {holds} {what}{tail}; {ALIGNED}")
    unknown = [
        name
        for name, stored in file.tensors.items()
        if not name.startswith(PARTS)
        and name not in MARKS
        and not BOOKKEEPING.match(name)
        and _size(stored.shape) <= 64
    ]
    if unknown:
        raise UserError(
            f"{key}: {file.path} bears a mark that is not known here, {unknown[0]!r}: it may predict something else "
            "than noise or v; only such models can be aligned"
        )
    said = file.metadata.get("modelspec.prediction_type") or file.metadata.get("modelspec.predict_key")
    if said is not None and said not in ("epsilon", "v", "v_prediction"):
        raise UserError(f"{key}: {file.path} says that it predicts {said!r}; only epsilon and v models can be aligned")


def said_prediction(file: SafetensorsFile) -> dict | None:
    """Keys of a scheduler's configuration that the file itself gives; None where it says nothing."""
    said = file.metadata.get("modelspec.prediction_type") or file.metadata.get("modelspec.predict_key")
    if "v_pred" in file or said in ("v", "v_prediction"):
        out = {"prediction_type": "v_prediction"}
        if "v_pred" in file:  # the two keys go together: without the second, not
            out["rescale_betas_zero_snr"] = False
        if "ztsnr" in file:  # such a model starts from pure noise: arXiv 2305.08891, section 3.3
            out |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return out
    if "ztsnr" in file:
        return {"rescale_betas_zero_snr": True}
    return {"prediction_type": "epsilon"} if said == "epsilon" else None


# ---- parts -----------------------------------------------------------------------------------------------------------
def read_unet(key: str, file: SafetensorsFile, config: dict, dtype: torch.dtype) -> UNet2DConditionModel:
    """UserError which names the first tensor that does not fit."""
    try:
        with init_empty_weights():
            unet = UNet2DConditionModel.from_config(config)
    except (ValueError, TypeError, KeyError, IndexError) as problem:
        raise UserError(f"{key}: a UNet cannot be made from the configuration for {file.path} ({problem})") from problem
    prefix, original = unet_prefix(file)
    sources = {}
    for name in unet.state_dict():
        try:
            theirs = _stored_name(prefix, unet_name(name, names_config(unet.config))) if original else prefix + name
        except KeyError as problem:
            raise UserError(
                f"{key}: the configuration for {file.path} has the layer {name}, which no checkpoint of Stable "
                "Diffusion has; give the configuration of the model that the file is of"
            ) from problem
        sources[name] = Source(theirs)
    of_unet = [n for n in file.tensors if n.startswith(prefix)]
    if prefix == "":
        of_unet = [n for n in of_unet if n not in MARKS and not BOOKKEEPING.match(n)]
    if prefix == EMA:
        of_unet = [n for n in of_unet if n not in (f"{EMA}decay", f"{EMA}num_updates")]
    _fill(key, file, unet, sources, dtype, of_unet)
    return unet


def names_config(config) -> dict:
    """What original_keys.unet_name reads, with layers_per_block as one number where the blocks agree."""
    layers = config["layers_per_block"]
    if isinstance(layers, list | tuple) and len(set(layers)) == 1:
        layers = layers[0]
    return {"layers_per_block": layers, "up_block_types": config["up_block_types"]}


def read_vae(key: str, file: SafetensorsFile, config: dict, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    with init_empty_weights():
        vae = AutoencoderKL.from_config(config)
    prefix, original = vae_prefix(file)
    state = vae.state_dict()
    if original:
        theirs = zip(state, vae_tensors(state, vae.config), strict=True)
        sources = {name: Source(prefix + source) for name, source in theirs}
    else:
        sources = {name: Source(_vae_alias(file, prefix, name)) for name in state}
    # left over: no layers of a deeper VAE, whatever else a file may hold
    layers = [n for n in file.starting(prefix) if re.match(r"(encoder|decoder)\.", n.removeprefix(prefix))]
    _fill(key, file, vae, sources, dtype, [n for n in layers if n.startswith(prefix)])
    return vae


def read_text(
    key: str, file: SafetensorsFile, number: int, config: CLIPTextConfig, dtype: torch.dtype
) -> torch.nn.Module:
    """text_encoder (number 0) or text_encoder_2 (1)."""
    kind = CLIPTextModelWithProjection if number else CLIPTextModel
    with init_empty_weights():
        model = kind(config)
    prefix, open_clip = next((prefix, how) for prefix, how in CLIP_PLACES[number] if file.starting(prefix))
    sources = {}
    for name, x in model.state_dict().items():
        plain = name.removeprefix("text_model.")
        if open_clip:
            sources[name] = _open_clip_source(prefix, plain, x)
        else:
            (theirs,) = clip_tensors({plain: x}) if not plain.startswith("text_projection") else (plain,)
            old = prefix + theirs.removeprefix("text_model.")  # transformers before 4.x's text_model
            sources[name] = Source(old if prefix + theirs not in file and old in file else prefix + theirs)
    _fill(key, file, model, sources, dtype)
    return model


def _open_clip_source(prefix: str, name: str, x: torch.Tensor) -> Source:
    if fused := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
        number, which, kind = fused.groups()
        theirs = f"{prefix}transformer.resblocks.{number}.attn.in_proj_{kind}"
        return Source(theirs, lambda y: y.chunk(3)["qkv".index(which)])
    if name == "text_projection.weight":
        return Source(f"{prefix}text_projection", lambda y: y.T)
    (theirs,) = open_clip_tensors({name: x})
    return Source(prefix + theirs)


def _vae_alias(file: SafetensorsFile, prefix: str, name: str) -> str:
    """diffusers' name, or the one that its attention layers had before 0.18."""
    if prefix + name in file or ".attentions." not in name:
        return prefix + name
    for new, old in VAE_OLD_ATTENTION.items():
        name = name.replace(f".{new}.", f".{old}.")
    return prefix + name


def _stored_name(prefix: str, original: str) -> str:
    """An original name as it stands in the file: EMA weights are buffers, whose names may have no dots."""
    return EMA + f"diffusion_model.{original}".replace(".", "") if prefix == EMA else prefix + original


def _fill(
    key: str,
    file: SafetensorsFile,
    model: torch.nn.Module,
    sources: dict[str, Source],
    dtype: torch.dtype,
    expected: Iterable[str] = (),
) -> None:
    """Reads a model's weights in place. expected: names in the file of which none may be left over."""
    own = model.state_dict()
    kind = type(model).__name__
    for name, source in sources.items():
        if source.name not in file:
            raise UserError(
                f"{key}: {file.path} lacks {source.name}, of its {kind}; the file is not whole or not of this shape"
            )
        had = source.take(torch.empty(file.tensors[source.name].shape, device="meta"))
        if had.shape != own[name].shape and had.squeeze().shape != own[name].squeeze().shape:  # 1x1 convolutions
            raise UserError(
                f"{key}: {file.path} has {source.name} as {tuple(had.shape)} where {tuple(own[name].shape)} is "
                f"expected of this {kind}; the file is of another shape"
            )
    used = {source.name for source in sources.values()}
    if extra := [name for name in expected if name not in used]:
        raise UserError(
            f"{key}: {file.path} holds {extra[0]}, which this {kind} has no place for; the file is of another shape"
        )
    if odd := file.formats(used) - {"F64", "F32", "F16", "BF16", *FLOAT8}:
        raise UserError(
            f"{key}: {file.path} holds weights as {', '.join(sorted(odd))}; take a file in fp16, bf16 or fp32"
        )
    state = {}
    for name, source in sources.items():
        x = source.take(file.read(source.name)).to(dtype, copy=True)
        state[name] = x.reshape(own[name].shape).contiguous()
    model.load_state_dict(state, strict=True, assign=True)
    model.eval()


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
