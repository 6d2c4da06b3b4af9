"""What a model is and how it is made, by its small files: a folder's JSON, a single file's header, and of a hub id
what is fetched before any weights."""

import logging
import pickle
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import CLIPTextConfig

from inpo_fast.models.denoiser import Denoiser
from inpo_fast.models.families import PIPELINES
from inpo_fast.models.files import alignable, recognise, single_file
from inpo_fast.models.files.hub import HubModel, path_or_id
from inpo_fast.models.files.safetensors_header import FLOAT8, SafetensorsFile, read_header
from inpo_fast.models.unet import UNet
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError, one_line, shortened
from inpo_fast.runtime.files import json_or_none, parse_json, read_regular
from inpo_fast.runtime.warn_once import warn_once

log = logging.getLogger(__name__)

MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
SMALL_FILES = [  # of a hub id, what is fetched before its weights
    *("model_index.json", "config.json", "scheduler/*.json", "feature_extractor/*.json"),
    *(f"{part}/config.json" for part in MODULES),
    *(f"{part}/*.{kind}" for part in TOKENIZERS for kind in ("json", "txt")),
]
REFINER = "SDXL's refiner, which only finishes the base's pictures"
CONFIGURATIONS = {  # width of the text that a single file's UNet is told -> hub id whose configuration it has
    768: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    1024: "stabilityai/stable-diffusion-2-1",
    2048: "stabilityai/stable-diffusion-xl-base-1.0",
}


@dataclass(frozen=True)
class ModelFiles:
    """A model whose small files have been read and accepted; nothing large has.

    folder: with its configuration (of a single file, what models.single_file_config names). file: a single file's
    header. unet, vae, scheduler: configurations; texts: of one text encoder, or of SDXL's two.
    """

    key: str
    place: str
    folder: Path
    index: dict
    unet: dict
    vae: dict
    scheduler: dict
    texts: list[CLIPTextConfig]
    file: SafetensorsFile | None = None
    hub: HubModel | None = None

    @property
    def family(self) -> type[Denoiser]:
        return PIPELINES[alignable.pipeline_class(self.index)]

    @property
    def is_xl(self) -> bool:
        return UNet(self.unet).is_xl


def find_model(key: str, place: str, single_file_config: str | None = None) -> ModelFiles:
    """Reads a model's small files. UserError of what cannot be aligned, by what it is."""
    with opening(key, place):
        return _find_model(key, place, single_file_config)


def _find_model(key: str, place: str, single_file_config: str | None) -> ModelFiles:
    path = path_or_id(key, place)
    if path is not None and path.is_file():
        return _find_file(key, place, path, single_file_config)
    if single_file_config is not None:
        raise UserError(
            f"{_configuration_option(key)}={single_file_config} is for a base in one file, and {place} is none; leave "
            "it out"
        )
    hub = None
    if path is None:
        hub = HubModel(key, place)
        path = hub.fetch(["model_index.json", "config.json"])
    if not (path / "model_index.json").is_file():
        raise UserError(f"{key}: {place} {recognise.folder_without_index(path)}")
    index = read_json(key, path / "model_index.json")
    alignable.check_index(key, place, index)
    if hub is not None:
        path = hub.fetch(SMALL_FILES)
    return _configured(ModelFiles(key, place, path, index, {}, {}, {}, [], hub=hub))


def _find_file(key: str, place: str, path: Path, single_file_config: str | None) -> ModelFiles:
    file = read_header(key, path)
    check_unet_file(key, file)
    lacks = [
        name for name, there in (("VAE", single_file.vae_prefix(file)), ("text encoder", file_texts(file))) if not there
    ]
    if lacks:
        raise UserError(
            f"{key}: {place} holds a UNet and no {' and no '.join(lacks)}; give it as models.init (or --model), and as "
            f"{key} a whole model that it was made from"
        )
    option = _configuration_option(key)
    width = single_file.shape_of_unet(file)["text"]
    if single_file_config is None:
        if width not in CONFIGURATIONS:
            raise UserError(
                f"{key}: {place} is no checkpoint of SD 1.x, 2.x or XL in their own shape; give {option}, a diffusers "
                "folder with its configuration and tokenizer"
            )
        single_file_config = CONFIGURATIONS[width]
        try:
            hub = HubModel(key, single_file_config)
            folder = hub.fetch(SMALL_FILES)
        except UserError as problem:
            raise UserError(
                f"{key}: {place} is a single file, and its configuration and tokenizer cannot be had "
                f"({str(problem).removeprefix(f'{key}: ')}); give {option}, a diffusers folder of the same family"
            ) from problem
    else:
        folder = path_or_id(option, single_file_config)
        if folder is None:
            folder = HubModel(option, single_file_config).fetch(SMALL_FILES)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{option}: {single_file_config} {recognise.folder_without_index(folder)}")
    index = read_json(option, folder / "model_index.json")
    alignable.check_index(option, str(folder), index)
    found = ModelFiles(key, place, folder, index, {}, {}, {}, [], file=file)
    said = single_file.said_prediction(file)
    scheduler = json_or_none(folder / "scheduler" / "scheduler_config.json") or {}
    kind = scheduler.get("prediction_type", "epsilon")
    if said is None and (width == 1024 or kind != "epsilon"):  # files of SD 2.x seldom say it
        warn_once(
            log,
            "%s: %s does not say whether it predicts noise or v; %s is taken, which %s says",
            key,
            place,
            kind,
            single_file_config,
        )
    return _configured(found, said or {})


def _configuration_option(key: str) -> str:
    return "--single-file-config" if key.startswith("--") else "models.single_file_config"


def check_unet_file(key: str, file: SafetensorsFile) -> None:
    """Of a header: what the file is, and what its UNet is told."""
    single_file.check_kind(key, file)
    shape = single_file.shape_of_unet(file)
    config = {"in_channels": shape["in_channels"], "out_channels": shape["out_channels"], "sample_size": 64}
    config |= {"time_cond_proj_dim": 1} if shape["lcm"] else {}
    config |= {"class_embed_type": "learned"} if shape["classes"] else {}
    if shape["beside"] and shape["text"] == 1024:  # SD 2.1 unCLIP and upscalers: an embedding in SDXL's place
        config |= {"class_embed_type": "projection"}
    alignable.check_unet(key, str(file.path), config)
    if shape["beside"] == 2560 and shape["text"] == 1280:
        raise UserError(
            f"{key}: {file.path} is SDXL's refiner, which only finishes the base's pictures; {alignable.ALIGNED}"
        )
    if file.formats() & set(FLOAT8):
        warn_once(
            log, "%s: %s holds fp8 weights, three or four bits fine; a file in fp16 is better to train", key, file.path
        )  # fmt: skip


def file_texts(file: SafetensorsFile) -> int:
    """Text encoders in a single file, 0 where one of SDXL's two is missing."""
    number = single_file.has_texts(file)
    is_xl = single_file.shape_of_unet(file)["beside"] is not None
    return number if number == 1 + is_xl else 0


def _configured(found: ModelFiles, said: Mapping = {}) -> ModelFiles:
    """With its parts' configurations, checked against each other. said: keys that go before the scheduler's own."""
    key, place, folder = found.key, found.place, found.folder
    unet = read_json(key, folder / "unet" / "config.json")
    alignable.check_unet(key, place, unet)
    if alignable.is_refiner(unet):
        raise UserError(f"{key}: {place} is {REFINER}; {alignable.ALIGNED}")
    is_xl = UNet(unet).is_xl
    texts = []
    for name in ("text_encoder", "text_encoder_2")[: 1 + is_xl]:
        if found.file is None and alignable.class_of(found.index, name) is None:
            raise UserError(f"{key}: {place} has no {name}, which its UNet needs; {alignable.ALIGNED}")
        _check_text_class(found, name, is_xl)
        read_json(key, folder / name / "config.json")
        with opening(key, str(folder / name)):
            texts.append(CLIPTextConfig.from_pretrained(folder / name, local_files_only=True))
    alignable.check_texts(key, place, unet, texts)
    vae = read_json(key, folder / "vae" / "config.json")
    alignable.check_vae(key, place, vae, unet)
    scheduler = scheduler_config(key, place, folder, found.index) | dict(said)
    if said.get("rescale_betas_zero_snr") and scheduler["_class_name"] in ("PNDMScheduler", "LMSDiscreteScheduler"):
        scheduler["_class_name"] = "DDIMScheduler"  # those know no zero terminal SNR
    alignable.check_scheduler(key, place, scheduler)
    return replace(found, unet=unet, vae=vae, texts=texts, scheduler=scheduler)


def _check_text_class(found: ModelFiles, name: str, is_xl: bool) -> None:
    """The second text encoder of SDXL has a projection, whose result is told too; that of SD 1.x and 2.x has none, or
    its result would be taken for the hidden states."""
    own = alignable.class_of(found.index, name)
    wanted = "CLIPTextModelWithProjection" if name == "text_encoder_2" else "CLIPTextModel"
    if own is not None and own != wanted and not (is_xl and name == "text_encoder"):
        raise UserError(
            f"{found.key}: {found.place} has a {own} as its {name}, not a {wanted}; if it is one, write that into its "
            "model_index.json"
        )


def scheduler_config(key: str, place: str, folder: Path, index: dict) -> dict:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise UserError(
            f"{key}: {place} has no scheduler/scheduler_config.json, which says whether it predicts noise or v, and at "
            "which noise levels; copy the one of the model that it was made from"
        )
    config = read_json(key, path)
    return {"_class_name": alignable.class_of(index, "scheduler") or "DDIMScheduler"} | config


def read_json(key: str, path: Path) -> dict:
    """UserError of a file that is missing, a Git LFS pointer, or no JSON object."""
    if git_lfs.is_pointer(path):
        raise UserError(f"{key}: {path} {git_lfs.WHAT}")
    try:
        found = parse_json(read_regular(path))
    except FileNotFoundError as problem:
        raise UserError(f"{key}: no such file: {path}; the model is not whole") from problem
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{key}: {path} is not readable JSON ({problem})") from problem
    if not isinstance(found, dict):
        raise UserError(f"{key}: {path} is not a JSON object")
    return found


@contextmanager
def opening(key: str, path: str):
    """What diffusers and transformers raise inside is refused in one line."""
    try:
        yield
    except pickle.UnpicklingError as problem:  # torch's own words advise to let the pickle run code
        raise UserError(f"{key}: {path} is damaged, or holds more than tensors; take .safetensors files") from problem
    except UserError:
        raise
    except Exception as problem:  # each library has its own, also for numbers that a configuration cannot have
        said = shortened(one_line(problem)) or type(problem).__name__
        if "weights_only" in str(problem):
            said = "it is damaged, or holds more than tensors; take .safetensors files"
        elif isinstance(problem, KeyError | IndexError | AttributeError | TypeError | ArithmeticError):
            said = f"a value of its configuration cannot be: {type(problem).__name__}, {said}"
        raise UserError(f"{key}: cannot open {path!r} as a diffusers model ({said})") from problem
