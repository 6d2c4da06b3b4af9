"""Models that cannot be aligned are called by what they are, from their small files alone: no weights lie there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
from tiny_world import tiny_pipeline, tiny_xl

from inpo_fast.config import parse
from inpo_fast.cost.plan import make_plan
from inpo_fast.models.files import alignable
from inpo_fast.models.files.model_files import find_model
from inpo_fast.models.loading import load_pipeline, load_unet, load_vae
from inpo_fast.models.models import Models
from inpo_fast.models.unet import UNet
from inpo_fast.runtime.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, pipeline in (("sd", tiny_pipeline()), ("xl", tiny_xl())):
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def base(saved):
    """saved/sd, opened; nobody changes it."""
    return load_pipeline(str(saved / "sd"))


@pytest.fixture
def like(base):
    return base.unet


@pytest.fixture
def small(saved, tmp_path):
    """kind, file, changes -> a folder of small files alone, one of them changed; None removes a key."""

    def make(kind: str, file: str = "unet/config.json", **changes) -> str:
        for path in (saved / kind).rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                copy = tmp_path / path.relative_to(saved)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        if changes:
            edit(tmp_path / kind / file, **changes)
        return str(tmp_path / kind)

    return make


def edit(path: Path, **changes) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "remove"}))


def refused(words: str, call, *arguments, **more) -> str:
    with pytest.raises(UserError, match=words) as refusal:
        call(*arguments, **more)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_small_files_are_enough_to_accept_a_model_and_to_plan_a_run(small):
    for kind in ("sd", "xl"):
        assert find_model("models.base", small(kind)).is_xl == (kind == "xl")
        config = parse("test", ["--config", "configs/pocket.yaml", f"--models.base={small(kind)}"])
        assert make_plan(config, 1).parameters > 0
        refused("holds no weights", load_pipeline, small(kind))


UNETS = {
    "inpainting": {"in_channels": 9},
    "InstructPix2Pix": {"in_channels": 8},
    "upscaler": {"in_channels": 7},
    "depth map": {"in_channels": 5},
    "noisy latents": {"in_channels": 12},
    "6 output channels": {"out_channels": 6},
    "a model of pixels": {"in_channels": 3, "out_channels": 3},
    "LCM": {"time_cond_proj_dim": 256},
    "DeepFloyd or Kolors": {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 4096},
    "Kandinsky or DeepFloyd": {"addition_embed_type": "text_image"},
    "addition_embed_type=image": {"addition_embed_type": "image"},
    "addition_embed_type=text": {"addition_embed_type": "text"},
    "unCLIP": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    "1000 classes": {"num_class_embeds": 1000},
    "fourier": {"time_embedding_type": "fourier"},
    "16 channels|latents of 4 channels": {"in_channels": 16, "out_channels": 16},
    "told hidden states of width 512": {"cross_attention_dim": 512},
    "which is no square": {"sample_size": [8, 12]},
    "sample_size None": {"sample_size": None},
    "MotionModel": {"_class_name": "UNetMotionModel"},
}


@pytest.mark.parametrize("words", UNETS)
def test_unets(small, like, words):
    folder = small("sd", **UNETS[words])
    refused(f"^models.base: .*({words})", find_model, "models.base", folder)
    alone = f"{folder}/unet"
    if not words.startswith(("16", "told hidden")):  # those belong to another part of the pipeline
        refused(f"^--model: .*({words})", load_unet, "--model", alone, like)
        refused(f"^models.init: .*({words})", load_unet, "models.init", folder, like)


def test_two_equal_sizes_are_one(saved, small, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(sample_size=[8, 8])
    pipeline.save_pretrained(tmp_path / "list")
    opened = load_pipeline(str(tmp_path / "list"))
    assert opened.unet.config.sample_size == 8
    assert Models(opened, torch.device("cpu")).resolution == 32
    assert load_unet("--model", str(tmp_path / "list"), opened.unet).config.sample_size == 8
    config = parse("test", ["--config", "configs/pocket.yaml", f"--models.base={tmp_path / 'list'}"])
    assert make_plan(config, 1).parameters > 0


def test_sdxls_refiner(small):
    folder = small("xl", projection_class_embeddings_input_dim=2560, addition_time_embed_dim=256)
    refused("SDXL's refiner", find_model, "models.base", folder)
    folder = small("xl", projection_class_embeddings_input_dim=8 * 5 + 96)
    refused("is told 136 numbers beside the text where SDXL's is told 144", find_model, "models.base", folder)
    folder = small("xl", "model_index.json", text_encoder_2=[None, None])
    refused("has no text_encoder_2, which its UNet needs", find_model, "models.base", folder)


FAMILIES = {
    "StableDiffusion3Pipeline": "is Stable Diffusion 3",
    "FluxPipeline": "is FLUX",
    "SanaPipeline": "is Sana",
    "PixArtSigmaPipeline": "is PixArt",
    "KandinskyV22CombinedPipeline": "is Kandinsky",
    "IFPipeline": "is DeepFloyd",
    "StableCascadePriorPipeline": "is Stable Cascade",
    "WanPipeline": "is Wan",
    "QwenImagePipeline": "is Qwen-Image",
    "ZImagePipeline": "is Z-Image",
    "LatentConsistencyModelPipeline": "is a latent consistency model",
    "StableUnCLIPPipeline": "unCLIP",
    "StableDiffusionInstructPix2PixPipeline": "InstructPix2Pix",
    "StableDiffusionXLInstantIDPipeline": "names the pipeline class StableDiffusionXLInstantIDPipeline",
    "MyPipeline": "names the pipeline class MyPipeline",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_by_their_class(small, like, name):
    """The folder's other files do not count: they are those of Stable Diffusion here."""
    folder = small("sd", "model_index.json", _class_name=name)
    refused(FAMILIES[name], find_model, "models.base", folder)
    refused(FAMILIES[name], load_unet, "--model", folder, like)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_other_uses_of_the_same_parts_open_as_the_stock_pipeline(tmp_path, name):
    tiny_pipeline().save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", _class_name=name)
    assert type(load_pipeline(str(tmp_path))).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("part", "class_name", "words"),
    [
        ("vae", "AutoencoderTiny", "a AutoencoderTiny as its vae"),
        ("text_encoder", "T5EncoderModel", "a T5EncoderModel as its text_encoder"),
        ("text_encoder", "RobertaSeriesModelWithTransformation", "Roberta"),
        ("text_encoder", "CLIPTextModelWithProjection", "not a CLIPTextModel"),
        ("unet", "UNet2DModel", "a UNet2DModel as its unet"),
        ("unet", None, "nothing as its unet"),
    ],
)
def test_parts_of_other_kinds(small, part, class_name, words):
    folder = small("sd", "model_index.json", **{part: [class_name and "diffusers", class_name]})
    refused(words, find_model, "models.base", folder)


SCHEDULERS = {
    "EDMEulerScheduler": "EDM's",
    "EDMDPMSolverMultistepScheduler": "EDM's",
    "FlowMatchEulerDiscreteScheduler": "rectified flow",
    "ScoreSdeVeScheduler": "variance-exploding",
    "KarrasVeScheduler": "variance-exploding",
    "CMStochasticIterativeScheduler": "consistency",
    "DDPMWuerstchenScheduler": "Würstchen",
    "IPNDMScheduler": "IPNDMScheduler, one of diffusers' others",
    "MyScheduler": "MyScheduler, one that diffusers does not know",
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(small, name):
    refused(
        SCHEDULERS[name], find_model, "models.base", small("sd", "scheduler/scheduler_config.json", _class_name=name)
    )


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("predicts 'sample'", {"prediction_type": "sample"}),
        ("predicts 'flow_prediction'", {"prediction_type": "flow_prediction"}),
        ("rectified flow", {"use_flow_sigmas": True}),
        ("timestep_type=continuous", {"timestep_type": "continuous", "_class_name": "EulerDiscreteScheduler"}),
        ("has 500 noise levels", {"num_train_timesteps": 500}),
        ("cannot be made", {"beta_schedule": "nonsense"}),
        ("does not fall", {"trained_betas": [0.0] * 1000}),
        ("zero terminal SNR", {"rescale_betas_zero_snr": True}),
    ],
)
def test_noise_that_cannot_be_aligned(small, words, changes):
    refused(words, find_model, "models.base", small("sd", "scheduler/scheduler_config.json", **changes))


@pytest.mark.parametrize("name", sorted(alignable.SCHEDULERS))
def test_every_sampler_of_ddpms_noise_opens(small, name):
    """And says at which levels the model was trained: as DDIM has them, whatever the sampler makes of the last one."""
    for changes in ({}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}):
        folder = small("sd", "scheduler/scheduler_config.json", _class_name=name, **changes)
        found = find_model("models.base", folder).scheduler
        want = DDIMScheduler.from_config(DDIMScheduler.load_config(folder, subfolder="scheduler"))
        scheduler = alignable.scheduler_of(found)
        assert type(scheduler).__name__ in (name, "DDIMScheduler")
        levels = DDIMScheduler.from_config(scheduler.config)  # what Models does
        assert levels.alphas_cumprod.equal(want.alphas_cumprod) and (levels.alphas_cumprod[-1] == 0) == bool(changes)
        if name == "EulerDiscreteScheduler" and changes:
            pipeline = tiny_pipeline()
            pipeline.scheduler = scheduler
            assert scheduler.alphas_cumprod[-1] == 2**-24  # so that its first sigma is finite
            assert Models(pipeline, torch.device("cpu")).noise_path.abar.equal(want.alphas_cumprod)
        assert levels.config.prediction_type == changes.get("prediction_type", "epsilon")


def test_missing_small_files_are_named(small):
    for file, words in {
        "scheduler/scheduler_config.json": "no scheduler/scheduler_config.json, which says whether it predicts noise",
        "unet/config.json": "no such file: .*unet/config.json",
        "vae/config.json": "no such file: .*vae/config.json",
        "text_encoder/config.json": "no such file: .*text_encoder/config.json",
        "model_index.json": "holds no model_index.json",
    }.items():
        folder = small("sd")
        (Path(folder) / file).unlink()
        refused(words, find_model, "models.base", folder)
        (Path(folder) / "unet/config.json").write_text("{")
        if file == "vae/config.json":
            refused("not readable JSON", find_model, "models.base", folder)


# ---- another model's noise -------------------------------------------------------------------------------------------
def test_a_start_that_predicts_something_else_is_refused(saved, base, tmp_path):
    tiny_pipeline(3).save_pretrained(tmp_path / "same")
    for name, changes, words in (
        ("v", {"prediction_type": "v_prediction"}, "predicts v_prediction and the base epsilon"),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}, "other noise levels than the base .*beta_schedule"),
        ("edm", {"_class_name": "EDMEulerScheduler"}, "EDM's"),
    ):
        shutil.copytree(tmp_path / "same", tmp_path / name)
        edit(tmp_path / name / "scheduler/scheduler_config.json", **changes)
        for key in ("models.init", "--model"):
            refused(
                f"^{key}: .*{words}", load_unet, key, str(tmp_path / name), base.unet, scheduler=base.scheduler.config
            )
        # a UNet alone says nothing of noise
        load_unet("models.init", str(tmp_path / name / "unet"), base.unet, scheduler=base.scheduler.config)
    for changes in ({"_class_name": "EulerDiscreteScheduler"}, {"timestep_spacing": "trailing"}, {"steps_offset": 0}):
        edit(tmp_path / "same/scheduler/scheduler_config.json", **changes)
        load_unet("models.init", str(tmp_path / "same"), base.unet, scheduler=base.scheduler.config)
    edit(saved / "sd/scheduler/scheduler_config.json", prediction_type="v_prediction")
    try:
        from inpo_fast.models.config import ModelsConfig
        from inpo_fast.models.loading import open_pipeline

        config = ModelsConfig(base=str(saved / "sd"), init=str(tmp_path / "same"))
        refused("^models.init: .*predicts epsilon and the base v_prediction", open_pipeline, config)
    finally:
        edit(saved / "sd/scheduler/scheduler_config.json", prediction_type="epsilon")


# ---- VAEs ------------------------------------------------------------------------------------------------------------
def other_vae(**settings):
    vae = tiny_pipeline(9).vae
    vae.register_to_config(**settings)
    return vae


def test_a_vaes_file_has_the_scaling_of_the_bases_own(saved, tmp_path):
    """Which diffusers would take for SD 1.x's 0.18215."""
    base = load_pipeline(str(saved / "xl"))
    base.vae.register_to_config(scaling_factor=0.13025)
    other_vae(scaling_factor=0.5).save_pretrained(tmp_path)
    vae = load_vae(str(tmp_path / "diffusion_pytorch_model.safetensors"), base)
    assert vae.config.scaling_factor == 0.13025
    want = other_vae().state_dict()
    assert all(x.equal(want[name]) for name, x in vae.state_dict().items())
    # a folder has a word of its own; one of old, without it, is like a file
    assert load_vae(str(tmp_path), base).config.scaling_factor == 0.5
    edit(tmp_path / "config.json", scaling_factor="remove")
    assert load_vae(str(tmp_path), base).config.scaling_factor == 0.13025


def test_latents_are_what_the_pipeline_undoes(saved, tmp_path):
    """Mean, spread and factor of a VAE, against diffusers' SDXL pipeline: what it decodes is what was encoded."""
    settings = {"latents_mean": [0.5, -1.0, 2.0, 0.1], "latents_std": [1.5, 0.7, 2.0, 1.1], "scaling_factor": 0.5}
    other_vae(**settings).save_pretrained(tmp_path)
    base = load_pipeline(str(saved / "xl"))
    base.vae = load_vae(str(tmp_path), base)
    models = Models(base, torch.device("cpu"))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = base.vae.encode(pixels).latent_dist.mean
    latents = models.encode_images(pixels, None)
    by_hand = (mean - torch.tensor([0.5, -1.0, 2.0, 0.1]).view(1, 4, 1, 1)) * 0.5
    torch.testing.assert_close(latents, by_hand / torch.tensor([1.5, 0.7, 2.0, 1.1]).view(1, 4, 1, 1))
    # the pipeline's own decoding of latents that it is made to end with, no step before
    pipeline = StableDiffusionXLPipeline(**base.components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    pipeline.scheduler.step = lambda *_, **__: (latents,)
    out = pipeline(["a", "b"], num_inference_steps=1, latents=latents, output_type="pt").images
    with torch.no_grad():
        want = (base.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    assert UNet.scaled(mean, other_vae(scaling_factor=2.0).config).equal(mean * 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shift_factor": 0.1159}, "shifts its latents"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "only that of SDXL knows them"),
        ({"latents_mean": [0.0] * 4}, "normalises its latents"),
    ],
)
def test_what_the_pipeline_would_ignore_is_refused(base, small, tmp_path, settings, words):
    other_vae(**settings).save_pretrained(tmp_path / "vae")
    refused(f"^models.vae: .*{words}", load_vae, str(tmp_path / "vae"), base)
    refused(f"^models.base: .*{words}", find_model, "models.base", small("sd", "vae/config.json", **settings))


def test_what_is_given_in_a_vaes_place(base, tmp_path):
    from safetensors.torch import save_file

    for name, words in {
        "lora_unet_down_blocks_0.lora_down.weight": "is a LoRA, not a VAE",
        "conv_in.weight": "is a UNet without a VAE",
        "text_model.embeddings.position_embedding.weight": "is a CLIP text encoder, not a VAE",
        "decoder.middle.0.residual.0.gamma": "not a VAE of Stable Diffusion",
        "decoder.1.weight": "TAESD",
    }.items():
        save_file({name: torch.zeros(5, 5)}, tmp_path / "x.safetensors")
        refused(f"^models.vae: .*{words}", load_vae, str(tmp_path / "x.safetensors"), base)
    wide = {"encoder.down.0.block.0.norm1.weight": torch.zeros(8), "decoder.conv_in.weight": torch.zeros(8, 16, 3, 3)}
    save_file(wide, tmp_path / "flux.safetensors")
    refused("latents of 16 channels and the UNet takes 4", load_vae, str(tmp_path / "flux.safetensors"), base)
    for name in ("AutoencoderTiny", "ControlNetModel"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": name}))
        refused(f"{name}.*not a VAE of Stable Diffusion", load_vae, str(tmp_path / name), base)
    refused("is the folder of a LoRA", load_vae, str(make_lora_folder(tmp_path)), base)


def make_lora_folder(folder: Path) -> Path:
    (folder / "lora").mkdir()
    (folder / "lora" / "pytorch_lora_weights.safetensors").touch()
    return folder / "lora"


def test_a_unet_alone_in_its_folder_and_the_size_of_the_bases_pictures(tmp_path, caplog):
    """As trainers save checkpoints, and some publish an aligned model; the rest is the base's."""
    base, other = tiny_pipeline(), tiny_pipeline(seed=5)
    other.unet.register_to_config(sample_size=16)
    other.unet.save_pretrained(tmp_path / "checkpoint-500" / "unet")
    unet = load_unet("--model", str(tmp_path / "checkpoint-500"), base.unet)
    assert all(torch.equal(p, q) for p, q in zip(unet.parameters(), other.unet.parameters(), strict=True))
    assert unet.config.sample_size == base.unet.config.sample_size == 8
    assert "has sample_size 16; the base's, 8, is taken" in caplog.text


def test_a_vae_of_another_depth_is_refused(tmp_path):
    base = tiny_pipeline()
    deeper = dict(base.vae.config) | {
        "block_out_channels": (8,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    AutoencoderKL.from_config(deeper).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="8 times as wide as their latents, the base's 4"):
        load_vae(str(tmp_path / "vae"), base)


def test_epsilon_beside_a_v_base_with_zero_snr_is_told_the_difference():
    theirs, ours = ({"prediction_type": kind, "rescale_betas_zero_snr": True} for kind in ("epsilon", "v_prediction"))
    with pytest.raises(UserError, match="predicts epsilon and the base v_prediction"):
        alignable.check_same_noise("--model", "x", theirs, ours)


def test_an_index_without_a_class_is_told_what_to_write():
    with pytest.raises(UserError, match=r"^models\.base: .* names no pipeline class; write StableDiffusionPipeline or"):
        alignable.check_index("models.base", "x", {"unet": ["diffusers", "UNet2DConditionModel"]})
