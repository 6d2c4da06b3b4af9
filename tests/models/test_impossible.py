"""Models whose configuration cannot be, and settings that a model cannot have: one line before anything is trained."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_world import one_level, tiny_pipeline

from inpo_fast.method.config import InversionConfig
from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.method.inversion import check_inversion
from inpo_fast.models.config import LoraSettings
from inpo_fast.models.loading import load_pipeline
from inpo_fast.models.lora import add_adapter
from inpo_fast.models.unet import UNet
from inpo_fast.runtime.errors import UserError

NOTHING = object()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    one_level(tiny_pipeline()).save_pretrained(folder)
    return folder


def changed(whole: Path, folder: Path, file: str, **values) -> Path:
    """A copy whose JSON file has these values; NOTHING: lacks them."""
    shutil.copytree(whole, folder)
    found = json.loads((folder / file).read_text())
    for name, value in values.items():
        found.pop(name, None)
        if value is not NOTHING:
            found[name] = value
    (folder / file).write_text(json.dumps(found))
    return folder


IMPOSSIBLE = [
    ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "made for EDM's continuous noise levels"),
    ("scheduler/scheduler_config.json", {"_class_name": "NoScheduler"}, "one that diffusers does not know"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "has 500 noise levels; 1000 can be aligned"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 2000}, "has 2000 noise levels"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "noise schedule that cannot be made"),
    ("scheduler/scheduler_config.json", {"beta_start": "x"}, "noise schedule that cannot be made"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "has 2 noise levels"),
    ("model_index.json", {"_class_name": "MyOwnPipeline"}, "names the pipeline class MyOwnPipeline"),
    ("model_index.json", {"_class_name": 3}, "names the pipeline class 3"),
    ("model_index.json", {"_class_name": []}, r"names the pipeline class \[\]"),
    ("unet/config.json", {"in_channels": 9}, "an inpainting model"),
    ("unet/config.json", {"in_channels": "four"}, "one of four input channels"),
    ("unet/config.json", {"sample_size": 10**9}, "sample_size 1000000000"),
    ("unet/config.json", {"sample_size": True}, "sample_size True"),
    ("unet/config.json", {"block_out_channels": "x"}, "cannot open"),
    ("unet/config.json", {"block_out_channels": [-8]}, "cannot open"),
    ("unet/config.json", {"attention_head_dim": 0}, "a value of its configuration cannot be: ZeroDivisionError"),
    ("unet/config.json", {"cross_attention_dim": None}, "hidden states of width None"),
    ("unet/config.json", {"down_block_types": ["NoBlock"]}, "NoBlock does not exist"),
    ("unet/config.json", {"block_out_channels": []}, "cannot open"),
    ("vae/config.json", {"latent_channels": None}, "latents of None channels"),
    ("vae/config.json", {"block_out_channels": []}, "cannot open"),
    ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor 'x'; must be a number, and not 0"),
    ("vae/config.json", {"scaling_factor": None}, "scaling_factor None"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor 0"),
    ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor nan"),
    ("text_encoder/config.json", {"num_hidden_layers": "x"}, "cannot open"),
    ("text_encoder/config.json", {"hidden_size": None}, "cannot open"),
    ("text_encoder/config.json", {"max_position_embeddings": 0}, "another shape than its config.json says"),
]


@pytest.mark.parametrize(("file", "values", "told"), IMPOSSIBLE)
def test_a_configuration_that_cannot_be_is_one_line(whole, tmp_path, file, values, told):
    folder = changed(whole, tmp_path / "m", file, **values)
    with pytest.raises(UserError, match=f"^models.base: .*{told}") as caught:
        load_pipeline(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_json_without_end_is_one_line(whole, tmp_path):
    folder = changed(whole, tmp_path / "m", "model_index.json")
    (folder / "model_index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not readable JSON"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("length", [NOTHING, None, "many", 0, -1, 2, True, 10**30, 1e30, 77])
def test_a_tokenizer_without_a_length_that_can_be_has_the_encoders(whole, tmp_path, length):
    """With 0 every prompt was the empty one, in silence."""
    folder = changed(whole, tmp_path / "m", "tokenizer/tokenizer_config.json", model_max_length=length)
    pipeline = load_pipeline(str(folder))
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings


def test_a_shorter_length_stays(whole, tmp_path):
    folder = changed(whole, tmp_path / "m", "tokenizer/tokenizer_config.json", model_max_length=9)
    assert load_pipeline(str(folder)).tokenizer.model_max_length == 9


def test_a_configuration_for_a_single_file_beside_a_folder_is_refused(whole):
    with pytest.raises(UserError, match=r"models.single_file_config=x is for a base in one file"):
        load_pipeline(str(whole), single_file_config="x")


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (("to_qq",), "no layer of the name 'to_qq'; there are to_q, to_"),
        (("to_q", "nonsense"), "no layer of the name 'nonsense'"),
        (("proj_inn", "to_q"), "there are proj_in, "),
        (("norm1",), "no linear layer or convolution of the name 'norm1'"),
        (("attentions.0",), "no linear layer or convolution of the name"),
        ((), "models.lora.targets is empty; there are "),
        (("x" * 5000,), "no layer of the name"),
    ],
)
def test_lora_targets_that_the_network_does_not_have(targets, told):
    with pytest.raises(UserError) as caught:
        add_adapter(one_level(tiny_pipeline()).unet, LoraSettings(rank=2, targets=targets))
    assert told in str(caught.value) and len(str(caught.value)) < 700


def test_targets_that_are_offered_are_taken():
    unet = one_level(tiny_pipeline()).unet
    with pytest.raises(UserError) as caught:
        add_adapter(unet, LoraSettings(rank=2, targets=("nothing",)))
    offered = str(caught.value).split("there are ")[1].split(", ")
    assert {"to_q", "to_out.0", "proj_in", "conv_in", "net.2"} <= set(offered)
    assert add_adapter(unet, LoraSettings(rank=2, targets=tuple(offered)))


@pytest.mark.parametrize("grid", ["exact", "spread", "snap", "diffusers-0.20", "diffusers-0.22"])
def test_no_grid_has_more_steps_than_the_path_has_levels(grid):
    path = DDPMPath(torch.linspace(1.0, 0.005, 1001)[1:])
    check_inversion(InversionConfig(steps=1000, grid=grid), path)
    for steps in (1001, 2000, 5000, 10**9):
        with pytest.raises(UserError, match=f"inversion.steps={steps}: this model has no grid of so many steps"):
            check_inversion(InversionConfig(steps=steps, grid=grid), path)


def test_a_resolution_is_a_whole_number_of_latents():
    pipeline = tiny_pipeline()
    unet = UNet(dict(pipeline.unet.config))
    assert unet.training_side(None, pipeline.vae.config) == 32 and unet.training_side(12, pipeline.vae.config) == 12
    for resolution, near in ((7, 8), (1, 8), (33, 32), (10, 8), (511, 512)):
        with pytest.raises(UserError, match=f"data.resolution={resolution}: must be a multiple of 4, .*take {near}$"):
            unet.training_side(resolution, pipeline.vae.config)


def test_a_tokenizer_that_cannot_fill_up_is_refused(whole, tmp_path):
    folder = changed(whole, tmp_path / "m", "tokenizer/tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match="has no pad_token"):
        load_pipeline(str(folder))


def test_a_token_beyond_the_encoder_is_refused(whole, tmp_path):
    """As many tokens as the encoder knows, one of them with a larger number: an index error hours in."""
    folder = changed(whole, tmp_path / "m", "tokenizer/tokenizer_config.json")
    place = folder / "tokenizer" / "tokenizer.json"
    tree = json.loads(place.read_text())
    word = next(word for word, number in tree["model"]["vocab"].items() if not word.startswith("<|"))
    tree["model"]["vocab"][word] = 10_000
    place.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="knows 10001 tokens and the text encoder"):
        load_pipeline(str(folder))


def test_a_pipe_among_its_files_is_not_waited_for(whole, tmp_path):
    folder = changed(whole, tmp_path / "m", "tokenizer/tokenizer_config.json")
    (folder / "unet" / "config.json").unlink()
    os.mkfifo(folder / "unet" / "config.json")
    with pytest.raises(UserError, match=r"models.base"):
        load_pipeline(str(folder))


def test_weights_whose_index_is_nested_without_end_are_refused(whole, tmp_path):
    folder = changed(whole, tmp_path / "m", "tokenizer/tokenizer_config.json")
    (weights,) = (folder / "unet").glob("*.safetensors")
    index = b"[" * 100_000
    weights.write_bytes(len(index).to_bytes(8, "little") + index)
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors"):
        load_pipeline(str(folder))
