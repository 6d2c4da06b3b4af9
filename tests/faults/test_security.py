"""A model that carries a program inside its pickled weights: refused in one line, and the program is not run."""

import os
import pickle
import shutil

import pytest
import torch
from tiny_world import save_tiny_model

from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.loading import load_unet, load_vae, open_pipeline
from inpo_fast.runtime.errors import UserError


class Program:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "m")


def poisoned(model: str, folder, part: str, mark):
    """A copy of the model whose part has pickled weights with a program in them."""
    shutil.copytree(model, folder)
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Program(mark)}, folder / part / name)
    return folder


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_program_in_a_models_weights_is_not_run(model, tmp_path, part):
    mark = tmp_path / "it ran"
    folder = poisoned(model, tmp_path / "poisoned", part, str(mark).replace(" ", "\\ "))
    with pytest.raises(UserError) as error:
        open_pipeline(ModelsConfig(base=str(folder)))
    assert "models.base" in str(error.value) and "\n" not in str(error.value)
    assert not mark.exists()
    with open(folder / "proof.bin", "wb") as file:  # the program works where somebody does unpickle it
        pickle.dump(Program(str(mark).replace(" ", "\\ ")), file)
    with open(folder / "proof.bin", "rb") as file:
        pickle.load(file)
    assert mark.exists()


def test_neither_in_models_init_nor_in_models_vae(model, tmp_path):
    mark = tmp_path / "ran"
    pipeline = open_pipeline(ModelsConfig(base=model))
    with pytest.raises(UserError, match=r"models\.init"):
        load_unet("models.init", str(poisoned(model, tmp_path / "a", "unet", mark)), pipeline.unet)
    with pytest.raises(UserError, match=r"models\.vae"):
        load_vae(str(poisoned(model, tmp_path / "b", "vae", mark)), pipeline)
    assert not mark.exists()
