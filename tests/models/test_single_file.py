"""Single files against diffusers' own reader, bit for bit, and what people's files have that it does not read."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_world import tiny_pipeline, tiny_xl

from inpo_fast.models.families import denoiser_of
from inpo_fast.models.files.model_files import find_model
from inpo_fast.models.loading import load_pipeline, load_unet
from inpo_fast.runtime.errors import UserError

STOCK = {"sd15": StableDiffusionPipeline, "sd21": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
UNET = "model.diffusion_model."


@dataclass
class World:
    folder: Path
    pipelines: dict
    files: dict  # kind -> tensors of its single file

    def config(self, kind: str) -> str:
        return str(self.folder / kind)

    def save(self, name: str, tensors: dict, **metadata) -> str:
        path = self.folder / f"{name}.safetensors"
        save_file({n: x.contiguous() for n, x in tensors.items()}, path, metadata or None)
        return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, pipelines, files = tmp_path_factory.mktemp("world"), {}, {}
    for kind in STOCK:
        pipeline = tiny_xl() if kind == "sdxl" else tiny_pipeline()
        if kind == "sd21":
            pipeline.text_encoder.config.hidden_act = "gelu"
        for name in PARTS:  # biases and norms begin as constants, which any mix-up would leave equal
            for parameter in getattr(pipeline, name).parameters() if hasattr(pipeline, name) else ():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        pipeline.save_pretrained(folder / kind)
        pipelines[kind], files[kind] = pipeline, denoiser_of(pipeline).single_file(pipeline)
    return World(folder, pipelines, files)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(pipeline) -> dict[str, torch.Tensor]:
    parts = {name: getattr(pipeline, name, None) for name in PARTS}
    return {f"{n}.{k}": x for n, part in parts.items() if part is not None for k, x in part.state_dict().items()}


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert not [n for n in ours if ours[n].dtype != theirs[n].dtype or not ours[n].equal(theirs[n])]


def settings(part) -> dict:
    config = part.config if isinstance(part.config, dict) else part.config.to_dict()
    return {name: value for name, value in config.items() if not name.startswith("_") and name != "dtype"}


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_opens_as_diffusers_opens_it(world, kind, dtype):
    path = world.save(f"whole-{kind}", {n: x.half() for n, x in world.files[kind].items()})
    ours = load_pipeline(path, dtype, world.config(kind))
    theirs = STOCK[kind].from_single_file(path, config=world.config(kind), local_files_only=True, dtype=dtype)
    assert type(ours) is STOCK[kind] and ours.opened_from is None
    same(weights(ours), weights(theirs))
    for name in PARTS[: 3 + (kind == "sdxl")]:
        assert settings(getattr(ours, name)) == settings(getattr(theirs, name))
    assert ours.scheduler.config == theirs.scheduler.config and type(ours.scheduler) is type(theirs.scheduler)
    assert ours.unet.training is False


def test_the_two_keys_of_a_file_say_what_it_predicts(world):
    """And an export that has them opens as what it was; diffusers' reader opens it as one that predicts noise."""
    pipeline = world.pipelines["sdxl"]
    own = pipeline.scheduler
    try:
        for zero in (False, True):
            pipeline.scheduler = DDIMScheduler.from_config(
                own.config, prediction_type="v_prediction", rescale_betas_zero_snr=zero
            )
            path = world.save("v", denoiser_of(pipeline).single_file(pipeline))
            assert {"v_pred", "ztsnr"} & load_file(path).keys() == ({"v_pred", "ztsnr"} if zero else {"v_pred"})
            opened = load_pipeline(path, single_file_config=world.config("sdxl")).scheduler.config
            assert opened.prediction_type == "v_prediction"
            assert opened.rescale_betas_zero_snr == zero
            assert opened.timestep_spacing == ("trailing" if zero else own.config.timestep_spacing)
    finally:
        pipeline.scheduler = own


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "PNDMScheduler", "DDPMScheduler"])
def test_the_two_keys_hold_whatever_sampler_the_configuration_names(world, name, tmp_path):
    import diffusers

    shutil.copytree(world.config("sdxl"), tmp_path / "xl", ignore=shutil.ignore_patterns("*.safetensors"))
    sampler = getattr(diffusers, name).from_config(world.pipelines["sdxl"].scheduler.config)
    sampler.save_pretrained(tmp_path / "xl" / "scheduler")
    edit(tmp_path / "xl" / "model_index.json", scheduler=["diffusers", name])
    path = world.save("marked", world.files["sdxl"] | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    opened = load_pipeline(path, single_file_config=str(tmp_path / "xl"))
    levels = DDIMScheduler.from_config(opened.scheduler.config)
    assert opened.scheduler.config.prediction_type == "v_prediction" and levels.alphas_cumprod[-1] == 0


def test_v_alone_is_no_zero_snr_whatever_the_configuration_says(world, tmp_path):
    shutil.copytree(world.config("sdxl"), tmp_path / "xl", ignore=shutil.ignore_patterns("*.safetensors"))
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    edit(tmp_path / "xl" / "scheduler" / "scheduler_config.json", **said)
    path = world.save("marked", world.files["sdxl"] | {"v_pred": torch.zeros(0)})
    opened = load_pipeline(path, single_file_config=str(tmp_path / "xl")).scheduler.config
    assert (opened.prediction_type, opened.rescale_betas_zero_snr) == ("v_prediction", False)


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
def test_metadata_say_what_a_file_predicts(world, key):
    for kind in ("sd15", "sd21", "sdxl"):
        path = world.save("said", world.files[kind], **{key: "v"})
        assert find_model("models.base", path, world.config(kind)).scheduler["prediction_type"] == "v_prediction"
    path = world.save("odd", world.files["sd15"], **{key: "flow"})
    with pytest.raises(UserError, match="says that it predicts 'flow'"):
        load_pipeline(path, single_file_config=world.config("sd15"))


def test_a_mark_that_nobody_knows_is_not_taken_for_noise(world):
    for name, words in {
        "rectified_flow": "'rectified_flow'",
        "edm_mean": "Playground",
        "edm_vpred.sigma_min": "CosXL",
    }.items():
        path = world.save("marked", world.files["sdxl"] | {name: torch.zeros(4)})
        with pytest.raises(UserError, match=words):
            load_pipeline(path, single_file_config=world.config("sdxl"))
    harmless = {
        "global_step": torch.tensor(840000),
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.decay": torch.zeros(1),
    }
    load_pipeline(world.save("books", world.files["sd15"] | harmless), single_file_config=world.config("sd15"))


def test_epsilon_with_zero_terminal_snr_is_refused(world):
    path = world.save("zero", world.files["sdxl"] | {"ztsnr": torch.zeros(0)})
    with pytest.raises(UserError, match=r"zero terminal SNR.*divides by 0"):
        load_pipeline(path, single_file_config=world.config("sdxl"))


def renamed(tensors: dict, rename) -> dict:
    return {rename(name): x for name, x in tensors.items()}


def emaless(name: str) -> str:
    if not name.startswith(UNET):
        return name
    return "model_ema." + ("diffusion_model." + name.removeprefix(UNET)).replace(".", "")


OLD_TEXT = "cond_stage_model.transformer.text_model."
NAMINGS = {
    "state_dict": lambda n: f"state_dict.{n}",
    "module": lambda n: f"module.{n}",
    "compiled": lambda n: n.replace(UNET, f"{UNET}_orig_mod."),
    "compiled whole": lambda n: f"_orig_mod.{n}",
    "EMA alone": emaless,
    "old text names": lambda n: n.replace(OLD_TEXT, "cond_stage_model.transformer."),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_wrapped_names_open(world, naming):
    tensors = renamed(world.files["sd15"], NAMINGS[naming])
    assert tensors.keys() != world.files["sd15"].keys()
    if naming == "EMA alone":
        tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    path = world.save("named", tensors)
    same(weights(load_pipeline(path, single_file_config=world.config("sd15"))), weights(world.pipelines["sd15"]))


def test_with_both_the_weights_are_taken_and_not_their_ema(world):
    """As diffusers does."""
    ema = {emaless(n): x + 1 for n, x in world.files["sd15"].items() if n.startswith(UNET)}
    path = world.save("both", world.files["sd15"] | ema)
    same(weights(load_pipeline(path, single_file_config=world.config("sd15"))), weights(world.pipelines["sd15"]))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_unet_alone_opens_beside_a_base(world, kind):
    """In every naming; without a configuration of its own. As a base it is refused for what it lacks."""
    pipeline = world.pipelines[kind]
    like, want = load_pipeline(world.config(kind)).unet, pipeline.unet.state_dict()
    original = {n.removeprefix(UNET): x for n, x in world.files[kind].items() if n.startswith(UNET)}
    files = {
        "ComfyUI": {UNET + n: x for n, x in original.items()},
        "bare": original,
        "bare, compiled": {f"_orig_mod.{n}": x for n, x in original.items()},
        "diffusers": want,
        "diffusers, prefixed": {f"unet.{n}": x for n, x in want.items()},
        "diffusers, compiled": {f"_orig_mod.{n}": x for n, x in want.items()},
        "EMA": {emaless(UNET + n): x for n, x in original.items()},
        "whole": world.files[kind],
    }
    for name, tensors in files.items():
        path = world.save("unet", tensors)
        unet = load_unet("--model", path, like)
        assert isinstance(unet, UNet2DConditionModel)
        same(unet.state_dict(), want)
        if name != "whole":
            with pytest.raises(
                UserError, match=r"holds a UNet and no VAE and no text encoder; give it as models\.init"
            ):
                load_pipeline(path, single_file_config=world.config(kind))


def test_what_is_missing_or_over_is_named(world):
    tensors = world.files["sd15"]
    inside = f"{UNET}middle_block.1.norm.weight"
    cases = {
        f"lacks {re.escape(inside)}": {n: x for n, x in tensors.items() if n != inside},
        r"lacks first_stage_model\.decoder\.mid\.block_1\.norm1\.weight": {
            n: x for n, x in tensors.items() if "decoder.mid.block_1.norm1.weight" not in n
        },
        r"lacks cond_stage_model\.transformer\.text_model\.final_layer_norm\.bias": {
            n: x for n, x in tensors.items() if "final_layer_norm.bias" not in n
        },
        "no VAE": {n: x for n, x in tensors.items() if not n.startswith("first_stage_model.")},
        "no text encoder": {n: x for n, x in tensors.items() if not n.startswith("cond_stage_model.")},
        r"holds model\.diffusion_model\.middle_block\.5\.x, which": tensors
        | {f"{UNET}middle_block.5.x": torch.zeros(100)},
        r"as \(7, 3\) where": tensors | {inside: torch.zeros(7, 3)},
        "told the guidance as well": tensors | {f"{UNET}time_embed.cond_proj.weight": torch.zeros(32, 256)},
        "told a class": tensors | {f"{UNET}label_emb.weight": torch.zeros(1000, 32)},
        "inpainting": tensors | {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
        "InstructPix2Pix": tensors | {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 8, 3, 3)},
        "upscaler": tensors | {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 7, 3, 3)},
        "depth": tensors | {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 5, 3, 3)},
        "not finite, in": tensors | {inside: torch.full_like(tensors[inside], float("nan"))},
    }
    for words, these in cases.items():
        with pytest.raises(UserError, match=words) as refusal:
            load_pipeline(world.save("broken", these), single_file_config=world.config("sd15"))
        assert "\n" not in str(refusal.value)
    xl = {n: x for n, x in world.files["sdxl"].items() if not n.startswith("conditioner.embedders.1.")}
    with pytest.raises(UserError, match="no text encoder"):
        load_pipeline(world.save("broken", xl), single_file_config=world.config("sdxl"))
    with pytest.raises(UserError, match="is the folder of a UNet alone"):
        load_pipeline(world.save("whole", tensors), single_file_config=world.config("sd15") + "/unet")
    with pytest.raises(UserError, match="not of this shape"):
        load_pipeline(world.save("whole", tensors), single_file_config=world.config("sdxl"))


def test_sdxls_refiner(world):
    tensors = dict(world.files["sdxl"])
    tensors[f"{UNET}label_emb.0.0.weight"] = torch.zeros(32, 2560)
    for name in [n for n in tensors if n.endswith("attn2.to_k.weight")]:
        tensors[name] = torch.zeros(len(tensors[name]), 1280)
    with pytest.raises(UserError, match="SDXL's refiner"):
        load_pipeline(world.save("refiner", tensors), single_file_config=world.config("sdxl"))


def test_fp8_weights_are_opened_and_scaled_ones_refused(world):
    path = world.save("fp8", {n: x.to(torch.float8_e4m3fn) for n, x in world.files["sd15"].items()})
    opened = weights(load_pipeline(path, single_file_config=world.config("sd15")))
    want = {n: x.to(torch.float8_e4m3fn).float() for n, x in weights(world.pipelines["sd15"]).items()}
    same(opened, want)
    scaled = world.files["sd15"] | {"scaled_fp8": torch.zeros(2)}
    with pytest.raises(UserError, match="holds scaled fp8 weights"):
        load_pipeline(world.save("scaled", scaled), single_file_config=world.config("sd15"))


def test_offline_a_file_asks_for_its_configuration(world, monkeypatch):
    """The family is known, its hub id too; the hub is not there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = world.save("whole", world.files["sd15"])
    with pytest.raises(UserError, match=r"no checkpoint of SD 1\.x, 2\.x or XL in their own shape"):
        load_pipeline(path)
    for width, hub in {768: "stable-diffusion-v1-5", 1024: "stable-diffusion-2-1", 2048: "xl-base"}.items():
        wide = {
            n: torch.zeros(len(x), width) if n.endswith("attn2.to_k.weight") else x
            for n, x in world.files["sd15"].items()
        }
        with pytest.raises(UserError, match=rf"{hub}.* give models\.single_file_config, a diffusers folder") as refusal:
            load_pipeline(world.save("wide", wide))
        assert "\n" not in str(refusal.value)
        with pytest.raises(UserError, match=r"^--base: .* give --single-file-config"):
            load_pipeline(world.save("wide", wide), key="--base")


def test_a_part_in_the_names_of_an_old_diffusers(world):
    """VAEs saved before 0.18 call their attention's layers query, key, value and proj_attn."""
    from inpo_fast.models.loading import load_vae

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        return name

    base = load_pipeline(world.config("sd15"))
    path = world.save("vae", renamed(base.vae.state_dict(), rename))
    same(load_vae(path, base).state_dict(), base.vae.state_dict())


def test_a_unets_file_beside_a_base_of_another_prediction(world, caplog):
    base = load_pipeline(world.config("sdxl"))
    own = {n: x for n, x in world.files["sdxl"].items() if n.startswith(UNET)}
    v = DDIMScheduler.from_config(base.scheduler.config, prediction_type="v_prediction").config
    zero = DDIMScheduler.from_config(v, rescale_betas_zero_snr=True).config
    empty = torch.zeros(0)
    cases = [
        (own | {"v_pred": empty}, base.scheduler.config, "predicts v_prediction and the base epsilon"),
        (own | {"v_pred": empty, "ztsnr": empty}, v, "other noise levels than the base .*rescale_betas_zero_snr"),
        (own | {"v_pred": empty, "ztsnr": empty}, zero, None),
        (own | {"v_pred": empty}, v, None),
        (own, base.scheduler.config, None),
    ]
    for tensors, scheduler, words in cases:
        path = world.save("unet", tensors)
        if words is None:
            load_unet("--model", path, base.unet, scheduler=scheduler)
        else:
            with pytest.raises(UserError, match=words):
                load_unet("--model", path, base.unet, scheduler=scheduler)
    assert not caplog.records
    load_unet("--model", world.save("unet", own), base.unet, scheduler=v)
    assert "does not say what it predicts" in caplog.text
