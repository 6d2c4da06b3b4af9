"""Which models can be aligned, by their configurations alone: nothing here needs a weight.

A UNet2DConditionModel that is told a time and the hidden states of CLIP text encoders (SDXL: and their pooled state and
six sizes), in the latents of an AutoencoderKL, with the discrete noise levels of DDPM, that answers noise or v. That is
Stable Diffusion 1.x, 2.x, XL and their relatives by shape (SSD-1B, Vega, BK-SDM, KOALA). Everything else is refused
here in one line, by what it is.
"""

import math
from collections.abc import Mapping

import diffusers
import torch
from diffusers import DDIMScheduler, SchedulerMixin

from inpo_fast.models.families import PIPELINES
from inpo_fast.models.files import recognise
from inpo_fast.models.unet import UNet
from inpo_fast.runtime.errors import UserError

ALIGNED = "only Stable Diffusion 1.x, 2.x, XL and their relatives can be aligned"
CHANNELS = {  # what a UNet of this many input channels is given beside the noisy latents
    9: "an inpainting model: it is given a mask and a masked picture too",
    8: "an editing model like InstructPix2Pix or Marigold: it is given a picture too",
    7: "an upscaler: it is given a small picture too",
    5: "a depth-to-image model: it is given a depth map too",
    3: "a model of pixels, without a VAE",
}
SCHEDULERS = {  # of diffusers, with DDPM's discrete noise levels (`alphas_cumprod`)
    *("DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
    *("PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
    *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "KDPM2DiscreteScheduler", "LCMScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
    "TCDScheduler",
}
NOISE = (  # words in the class of a scheduler -> other noise than DDPM's
    ("EDM", "EDM's continuous noise levels (Playground v2.5, CosXL)"),
    ("Flow", "rectified flow"),
    ("ScoreSde", "a variance-exploding SDE's noise levels"),
    ("KarrasVe", "a variance-exploding SDE's noise levels"),
    ("CMStochastic", "a consistency model's noise levels"),
    ("Wuerstchen", "Würstchen's noise levels"),
)
STEPS = 1000  # noise levels of every Stable Diffusion
LARGEST = 4096  # latents along an edge


def check_index(key: str, place: str, index: dict) -> None:
    """Of a model_index.json: its pipeline and the classes of its parts."""
    name = pipeline_class(index)
    if not isinstance(name, str) or name not in PIPELINES:
        family = recognise.family_of_class(str(name))
        if name is None:
            raise UserError(
                f"{key}: the model_index.json of {place} names no pipeline class; write StableDiffusionPipeline or "
                "StableDiffusionXLPipeline as _class_name into it"
            )
        if family is not None:
            raise UserError(f"{key}: {place} is {family} ({name}); {ALIGNED}")
        raise UserError(
            f"{key}: {place} names the pipeline class {name}, which is none of Stable Diffusion's own; if its parts "
            "are those of Stable Diffusion, write StableDiffusionPipeline or StableDiffusionXLPipeline as _class_name "
            "into its model_index.json"
        )
    wanted = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",)}
    wanted |= dict.fromkeys(("text_encoder", "text_encoder_2"), ("CLIPTextModel", "CLIPTextModelWithProjection"))
    for part, classes in wanted.items():
        theirs = class_of(index, part)
        if theirs is None and (part == "text_encoder_2" or part == "text_encoder"):
            continue  # told by the UNet, which says how many it needs
        if theirs not in classes:
            given = "nothing" if theirs is None else f"a {theirs}"
            raise UserError(f"{key}: {place} has {given} as its {part}, not a {classes[0]}; {ALIGNED}")


def pipeline_class(index: dict) -> str | None:
    name = index.get("_class_name")
    return name[-1] if isinstance(name, list) and name else name  # a list: a pipeline with its own code


def class_of(index: dict, part: str) -> str | None:
    """The class that a model_index.json names for a part; None for [null, null] and where it is not named."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def check_unet(key: str, place: str, config: dict) -> None:
    """Of a UNet's configuration: what it is told and given. sample_size is made one number where it is two equal ones;
    `config` is changed so."""

    def refuse(what: str) -> None:
        raise UserError(f"{key}: the UNet of {place} is {what}; {ALIGNED}")

    inputs, outputs = config.get("in_channels", 4), config.get("out_channels", 4)
    name = config.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        refuse(f"a {name}, {recognise.family_of_class(str(name)) or 'another network'}")
    if config.get("time_cond_proj_dim") is not None:
        refuse("of a latent consistency model (LCM): it is told the guidance as well (time_cond_proj_dim)")
    if config.get("encoder_hid_dim_type") is not None or config.get("encoder_hid_dim") is not None:
        refuse(f"of Kandinsky, DeepFloyd or Kolors (encoder_hid_dim_type={config.get('encoder_hid_dim_type')})")
    if config.get("addition_embed_type") not in (None, "text_time"):
        refuse(f"of Kandinsky or DeepFloyd (addition_embed_type={config['addition_embed_type']})")
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        what = config.get("class_embed_type") or f"{config['num_class_embeds']} classes"
        refuse(f"told a class or an image embedding too, as unCLIP and upscalers are (class_embed_type: {what})")
    if config.get("time_embedding_type", "positional") != "positional":
        refuse(f"told the time in another way (time_embedding_type={config['time_embedding_type']})")
    if inputs != outputs:
        more = CHANNELS.get(inputs, "told more than noisy latents")
        refuse(f"one of {inputs} input channels and {outputs} output channels: {more}")
    if inputs == 3:
        refuse(f"one of 3 channels: {CHANNELS[3]}")
    size = config.get("sample_size")
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise UserError(
                f"{key}: the UNet of {place} has sample_size {list(size)}, which is no square; pictures are trained "
                "and drawn square here: give unet/config.json one number, the side in latents"
            )
        size = config["sample_size"] = size[0]
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST:
        raise UserError(
            f"{key}: the UNet of {place} has sample_size {size}; write the side of its pictures in latents into "
            "unet/config.json (64 for 512 pixels, 128 for 1024)"
        )


def check_texts(key: str, place: str, unet: dict, texts: list) -> None:
    """unet: its configuration. texts: CLIPTextConfig of text_encoder and, of SDXL, text_encoder_2."""
    told = unet.get("cross_attention_dim", 1280)
    told = max(told) if isinstance(told, list | tuple) else told
    width = sum(text.hidden_size for text in texts)
    if told != width:
        raise UserError(
            f"{key}: the UNet of {place} is told hidden states of width {told}, its text encoder"
            f"{'s give' if len(texts) > 1 else ' gives'} {width}; the parts do not belong together"
        )
    if UNet(unet).is_xl:
        sizes, given = 6 * unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]
        if given != sizes + texts[-1].projection_dim:
            raise UserError(
                f"{key}: the UNet of {place} is told {given} numbers beside the text where SDXL's is told "
                f"{sizes + texts[-1].projection_dim}; {ALIGNED}"
            )


def is_refiner(unet: dict) -> bool:
    """SDXL's refiner has one text encoder and is told five numbers of size and taste where the base is told six."""
    told, each = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    return UNet(unet).is_xl and (told, each) == (2560, 256)


def check_vae(key: str, place: str, config: dict, unet: dict) -> None:
    """Of a VAE's configuration beside its UNet's: channels, and numbers that diffusers' own pipeline would ignore."""
    channels, wanted = config.get("latent_channels", 4), unet.get("in_channels", 4)
    if channels != wanted:
        more = f" ({CHANNELS[wanted]})" if channels == 4 and wanted in CHANNELS else ""
        raise UserError(
            f"{key}: the VAE of {place} has latents of {channels} channels and the UNet takes {wanted}{more}; they do "
            "not belong together"
        )
    scale = config.get("scaling_factor", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not (math.isfinite(scale) and scale):
        raise UserError(f"{key}: the VAE of {place} has scaling_factor {scale!r}; must be a number, and not 0")
    is_xl = UNet(unet).is_xl
    if config.get("shift_factor"):
        raise UserError(
            f"{key}: the VAE of {place} shifts its latents (shift_factor={config['shift_factor']}), which no pipeline "
            "of Stable Diffusion 1.x, 2.x or XL does: it belongs to another family"
        )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None) or (mean is not None and not is_xl):
        raise UserError(
            f"{key}: the VAE of {place} normalises its latents by latents_mean and latents_std, and diffusers' "
            f"pipeline of this model ignores them{'' if is_xl else '; only that of SDXL knows them'}"
        )
    if mean is not None and not len(mean) == len(std) == channels:
        raise UserError(f"{key}: the VAE of {place} has latents_mean or latents_std of another length than {channels}")


def check_scheduler(key: str, place: str, config: Mapping) -> DDIMScheduler:
    """Of a scheduler's configuration: its class, then its noise levels."""
    name = str(config.get("_class_name"))
    for word, what in NOISE:
        if word in name:
            raise UserError(f"{key}: {place} is made for {what} ({name}); only DDPM's noise levels can be aligned")
    if name not in SCHEDULERS:
        known = "of diffusers' others" if hasattr(diffusers, name) else "that diffusers does not know"
        raise UserError(
            f"{key}: {place} has the scheduler {name}, one {known}; only DDPM's noise levels can be aligned"
        )
    if config.get("use_flow_sigmas"):
        raise UserError(
            f"{key}: {place} is made for rectified flow (use_flow_sigmas); only DDPM's noise can be aligned"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise UserError(
            f"{key}: {place} is told EDM's continuous noise levels (timestep_type={config['timestep_type']}); only "
            "DDPM's discrete ones can be aligned"
        )
    return noise_levels(key, place, config)


def noise_levels(key: str, place: str, config: Mapping) -> DDIMScheduler:
    """The discrete noise levels that a scheduler's configuration describes, as DDIM has them, and what is predicted
    there. UserError of those that cannot be aligned."""
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"{key}: {place} predicts {kind!r}; only epsilon and v_prediction models can be aligned")
    try:
        own = {name: value for name, value in config.items() if not name.startswith("_")}
        levels = DDIMScheduler.from_config(own)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as problem:
        raise UserError(f"{key}: {place} has a noise schedule that cannot be made ({problem})") from problem
    abar = levels.alphas_cumprod
    if len(abar) != STEPS:
        raise UserError(f"{key}: {place} has {len(abar)} noise levels; {STEPS} can be aligned")
    if not (abar.isfinite().all() and abar.min() >= 0 and (abar.diff() < 0).all()):
        raise UserError(
            f"{key}: {place} has a noise schedule that does not fall from image to noise; look at its betas"
        )
    if kind == "epsilon" and float(abar[-1]) == 0:
        raise UserError(
            f"{key}: {place} predicts noise and has zero terminal SNR (rescale_betas_zero_snr): at the last level "
            "there is nothing but noise, so the output says nothing of the image and sampling divides by 0 (arXiv "
            "2305.08891, section 3.2); if it was trained with v, write prediction_type=v_prediction into its "
            "scheduler_config.json, otherwise remove rescale_betas_zero_snr there"
        )
    return levels


def check_same_noise(key: str, place: str, theirs: Mapping, ours: Mapping) -> None:
    """Two scheduler configurations: what one model is asked and answers must be what the other is and does."""
    kinds = [config.get("prediction_type", "epsilon") for config in (theirs, ours)]
    if kinds[0] != kinds[1] and kinds[0] in ("epsilon", "v_prediction"):
        raise UserError(
            f"{key}: {place} predicts {kinds[0]} and the base {kinds[1]}: the same numbers would mean something else; "
            "take it as models.base, or another one"
        )
    if "_class_name" in theirs:
        check_scheduler(key, place, theirs)
    levels = [noise_levels(key, place, config).alphas_cumprod for config in (theirs, ours)]
    if not torch.allclose(levels[0], levels[1], atol=1e-4, rtol=0):
        differ = [
            f"{name}={theirs.get(name)} for {ours.get(name)}"
            for name in ("beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr", "trained_betas")
            if theirs.get(name) != ours.get(name)
        ]
        raise UserError(
            f"{key}: {place} has other noise levels than the base ({', '.join(differ) or 'its betas'}); if only its "
            "scheduler_config.json is wrong, give the unet/ folder in it"
        )


def scheduler_of(config: dict) -> SchedulerMixin:
    """The scheduler that a checked configuration names, or DDIM with its levels where that needs a package which is not
    here (scipy, torchsde): the sampler changes nothing in training, and pictures are drawn with DDIM."""
    try:
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))
    except ImportError:
        return DDIMScheduler.from_config(dict(config))
