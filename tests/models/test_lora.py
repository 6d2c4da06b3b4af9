"""LoRAs in every program's names held against W + alpha / rank * B A in float64, and what does not fit refused."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_world import tiny_pipeline, tiny_unet, tiny_xl

from inpo_fast.models.files.lora_files import _layer, layer_names, read_lora
from inpo_fast.models.files.lora_place import is_lora, lora_file
from inpo_fast.models.files.original_keys import unet_name
from inpo_fast.models.lora import Lora, kohya_tensors, merge_, tensors, with_lora
from inpo_fast.models.unet import UNETS, UNet
from inpo_fast.runtime.errors import UserError

ALPHA, RANK = 6.0, 4
KINDS = ("sd15", "sdxl")
LAYERS = {  # linear layers, a 1 x 1 and a 3 x 3 convolution
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.1.proj_in",
    "up_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.time_emb_proj",
}


@pytest.fixture(scope="module")
def unets():
    return {"sd15": tiny_pipeline().unet, "sdxl": tiny_xl().unet}


def drawn(unet, layers=LAYERS, rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each layer, at random, before any scaling."""
    draw, modules, out = torch.Generator().manual_seed(3), dict(unet.named_modules()), {}
    for name in sorted(layers):
        weight = modules[name].weight
        around = (1,) * (weight.ndim - 2)
        a = torch.randn(rank, *weight.shape[1:], generator=draw) * 0.3
        out[name] = a, torch.randn(len(weight), rank, *around, generator=draw) * 0.3
    return out


def truth(unet, sides, scale: float = ALPHA / RANK) -> dict[str, torch.Tensor]:
    """Each layer's weight in float64."""
    modules = dict(unet.named_modules())
    return {
        name: modules[name].weight.double()
        + scale * torch.einsum("or,r...->o...", b.double().flatten(1), a.double()).reshape(modules[name].weight.shape)
        for name, (a, b) in sides.items()
    }


def with_metadata(sides, kind):
    about = {"unet.r": RANK, "unet.lora_alpha": ALPHA}
    state = {f"unet.{name}.lora_{s}.weight": x for name, ab in sides.items() for s, x in zip("AB", ab, strict=True)}
    return state, {"lora_adapter_metadata": json.dumps(about)}


def named(pattern: str, alpha: str | None, words=("down", "up"), spelled=lambda name, kind: name):
    """A file in the names of `pattern`; alpha as a tensor where it has one, else inside B."""

    def write(sides, kind):
        state = {}
        for name, ab in sides.items():
            layer = spelled(name, kind)
            for word, x in zip(words, ab, strict=True):
                factor = ALPHA / RANK if alpha is None and word in ("up", "B") else 1
                state[pattern.format(layer=layer, side=word)] = (x * factor).contiguous()
            if alpha:
                state[alpha.format(layer=layer)] = torch.tensor(ALPHA)
        return state, {}

    return write


def kohya(name, kind):
    return (original(name, kind) if kind == "sdxl" else name).replace(".", "_")


def original(name, kind):
    config = {"layers_per_block": 1, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return unet_name(name, config)


def processor(name, kind):  # of attention only, before diffusers 0.22
    return name.replace(".to_q", ".processor.to_q").replace(".to_out.0", ".processor.to_out")


PEFT = "base_model.model.{layer}.lora_{side}.weight"
SPELLINGS = {
    "diffusers, metadata": with_metadata,
    "diffusers, no alpha": named("unet.{layer}.lora_{side}.weight", None, "AB"),
    "diffusers of 2023": named("unet.{layer}.lora.{side}.weight", None),
    "diffusers of 2023, layer": named("unet.{layer}.lora_linear_layer.{side}.weight", None),
    "diffusers, no prefix": named("{layer}.lora_{side}.weight", "{layer}.alpha", "AB"),
    "peft": named(PEFT, None, "AB"),
    "peft, named adapter": named("base_model.model.unet.{layer}.lora_{side}.default.weight", None, "AB"),
    "peft inside diffusers": named("unet.{layer}.lora_{side}.default.weight", None, "AB"),
    "kohya": named("lora_unet_{layer}.lora_{side}.weight", "lora_unet_{layer}.alpha", spelled=kohya),
    "kohya, diffusers' layers": named(
        "lora_unet_{layer}.lora_{side}.weight",
        "lora_unet_{layer}.alpha",
        spelled=lambda name, kind: name.replace(".", "_"),
    ),
    "comfyui": named("diffusion_model.{layer}.lora_{side}.weight", "diffusion_model.{layer}.alpha", spelled=original),
    "original": named("model.diffusion_model.{layer}.lora_{side}.weight", None, "AB", original),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_lora(unets, tmp_path, spelling, kind):
    unet = unets[kind]
    sides = drawn(unet)
    save_file(*SPELLINGS[spelling](sides, kind)[:1], tmp_path / "x.safetensors", SPELLINGS[spelling](sides, kind)[1])
    assert lora_file(tmp_path) == tmp_path / "x.safetensors" == lora_file(tmp_path / "x.safetensors")
    lora, expected = read_lora("--model", tmp_path, unet), truth(unet, sides)
    assert lora.layers.keys() == sides.keys()
    merged = copy.deepcopy(unet)
    merge_(merged, lora)
    after, before = dict(merged.named_modules()), dict(unet.named_modules())
    for name, weight in expected.items():  # sums of four products and a weight, at unit size
        torch.testing.assert_close(after[name].weight.double(), weight, atol=1e-6, rtol=0)
    untouched = [name for name in before if isinstance(before[name], torch.nn.Linear) and name not in sides]
    assert len(untouched) > 10 and all(torch.equal(after[name].weight, before[name].weight) for name in untouched)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_beside_the_weights_as_merged_into_them(unets, kind):
    unet = unets[kind]
    lora, x = Lora(drawn(unet)), inputs(unet)
    merged = copy.deepcopy(unet)
    merge_(merged, lora)
    beside = with_lora(unet, lora)
    torch.testing.assert_close(beside(**x).sample, merged(**x).sample, atol=3e-5, rtol=0)
    assert (beside(**x).sample - unet(**x).sample).abs().max() > 0.01


def inputs(unet) -> dict:
    draw = torch.Generator().manual_seed(0)
    out = {"sample": torch.randn(2, 4, 8, 8, generator=draw), "timestep": torch.tensor([20, 700])}
    out["encoder_hidden_states"] = torch.randn(2, 9, unet.config.cross_attention_dim, generator=draw)
    pooled = torch.randn(2, 96, generator=draw)
    return out | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.full((2, 6), 32.0)}}


def test_processors_of_old_diffusers(unets, tmp_path):
    unet = unets["sd15"]
    sides = drawn(unet, [name for name in LAYERS if ".attn" in name])
    state, _ = named("unet.{layer}_lora.{side}.weight", None, spelled=processor)(sides, "sd15")
    save_file(state, tmp_path / "x.safetensors")
    assert is_lora(tmp_path / "x.safetensors")
    lora, expected = read_lora("--model", tmp_path, unet), truth(unet, sides)
    for name, weight in expected.items():
        own = dict(unet.named_modules())[name].weight + lora.delta(name)
        torch.testing.assert_close(own.double(), weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rslora", "scale"), [(False, ALPHA / RANK), (True, ALPHA / RANK**0.5)])
def test_pefts_folder_has_alpha_in_its_configuration(unets, tmp_path, rslora, scale):
    unet = unets["sd15"]
    sides = drawn(unet)
    odd = "up_blocks.0.attentions.1.proj_in"
    state = {PEFT.format(layer=n, side=s): x for n, ab in sides.items() for s, x in zip("AB", ab, strict=True)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": rslora, "alpha_pattern": {odd: 2 * ALPHA}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    lora, expected = read_lora("--model", tmp_path, unet), truth(unet, sides, scale)
    expected[odd] = truth(unet, sides, 2 * scale)[odd]
    for name, weight in expected.items():
        own = dict(unet.named_modules())[name].weight + lora.delta(name)
        torch.testing.assert_close(own.double(), weight, atol=1e-6, rtol=0)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(UserError, match="is a DoRA"):
        read_lora("--model", tmp_path, unet)


def test_ranks_of_their_own(unets, tmp_path):
    """Read, used and written as one: diffusers' readers know one alpha for all layers."""
    unet = unets["sdxl"]
    names = sorted(LAYERS)
    sides = drawn(unet, names[:3], 2) | drawn(unet, names[3:], 5)
    state = {f"unet.{n}.lora_{s}.weight": x for n, ab in sides.items() for s, x in zip("AB", ab, strict=True)}
    save_file(state, tmp_path / "x.safetensors")
    lora, expected = read_lora("--model", tmp_path, unet), truth(unet, sides, 1.0)
    written = tensors(lora)
    assert {len(x) for name, x in written.items() if ".lora_A." in name} == {5}
    adapted = dict(with_lora(unet, lora).named_modules())
    for name, weight in expected.items():
        layer = adapted[name]
        assert set(layer.scaling.values()) == {1.0}
        a, b = written[f"{name}.lora_A.weight"], written[f"{name}.lora_B.weight"]
        own = truth(unet, {name: (a, b)}, 1.0)[name]
        torch.testing.assert_close(own, weight, atol=1e-6, rtol=0)


def test_two_loras_side_by_side_are_their_sum(unets):
    unet = unets["sd15"]
    names = sorted(LAYERS)
    one, two = Lora(drawn(unet, names[:4], 2)), Lora(drawn(unet, names[2:], 3))
    both = one.plus(two)
    assert both.layers.keys() == set(names)
    for name in names:
        expected = sum(lora.delta(name).double() for lora in (one, two) if name in lora.layers)
        torch.testing.assert_close(both.delta(name).double(), expected, atol=1e-6, rtol=0)


def without(word):
    return lambda state: {name: x for i, (name, x) in enumerate(state.items()) if not (i < 2 and word in name)}


def renamed(old, new):
    return lambda state: {name.replace(old, new): x for name, x in state.items()}


def added(name, *shape):
    return lambda state: {**state, name: torch.ones(*shape)}


def broken(state):
    name = next(iter(state))
    return {**state, name: torch.full_like(state[name], float("nan"))}


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (added("lora_unet_down_blocks_9_conv.lora_down.weight", 4, 4), "place in the UNet: 1 of .*down_blocks_9_conv"),
        (added("something.else", 4), "place in the UNet: 1 of 13, the first something.else"),
        (renamed("mid_block", "input_blocks_99"), "tensors without a place in the UNet: 4 of 12"),
        (renamed("lora_unet_", "lora_te_text_model_"), "trains the text encoder too .12 of 12 tensors"),
        (added("text_encoder.a.lora_A.weight", 4, 4), "trains the text encoder too .1 of 13"),
        (added("te1_text_model_a.lora_down.weight", 4, 4), "trains the text encoder too"),
        (without("lora_down"), "has one of its two matrices only"),
        (broken, "values that are not finite"),
        (added(f"{LAYER}.dora_scale", 8, 1), "is a DoRA"),
        (added("unet.x.lora_magnitude_vector", 8), "is a DoRA"),
        (added(f"{LAYER}.hada_w1_a", 8, 4), "is a LoHa"),
        (added(f"{LAYER}.lokr_w1", 8, 4), "is a LoKr"),
        (added(f"{LAYER}.oft_blocks", 8, 4), "is an OFT"),
        (added(f"{LAYER}.on_input", 1), "is an IA3"),
        (added(f"{LAYER}.a1.weight", 8, 4), "is a GLoRA"),
        (added(f"{LAYER}.lora_mid.weight", 4, 4, 3, 3), "is a LoCon with a core"),
        (added(f"{LAYER}.diff_b", 8), "whole weights beside its LoRA"),
        (added(f"{LAYER}.lora_A.weight", 4, 16), "stands there twice"),
    ],
)
def test_what_does_not_fit_whole_is_refused_by_name(unets, tmp_path, change, words):
    state, _ = SPELLINGS["kohya, diffusers' layers"](drawn(unets["sd15"]), "sd15")
    state = {name: x for name, x in state.items() if not name.endswith(".alpha")}
    assert len(state) == 12
    save_file(change(state), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"--model: .*x\.safetensors.*{words}") as refusal:
        read_lora("--model", tmp_path / "x.safetensors", unets["sd15"])
    assert "\n" not in str(refusal.value)


def test_the_lora_of_another_size_is_refused(unets, tmp_path):
    state, _ = SPELLINGS["diffusers, no alpha"](drawn(unets["sd15"]), "sd15")
    save_file({name: x for name, x in state.items() if "time_emb" in name}, tmp_path / "x.safetensors")
    wide = UNet2DConditionModel.from_config(dict(tiny_unet().config) | {"block_out_channels": (16, 16)})
    with pytest.raises(
        UserError, match=r"time_emb_proj is .4, 32. and .8, 4., which does not fit a weight of .16, 64."
    ):
        read_lora("--model", tmp_path, wide)


def test_what_is_no_lora(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    files = [tmp_path / "model", tmp_path / "model" / "unet", tmp_path / "model" / "vae", tmp_path / "none"]
    files.append(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    assert not [path for path in [*files, tmp_path / "text.safetensors"] if lora_file(path)]


def test_a_peft_file_without_its_configuration_says_what_it_takes(unets, tmp_path, caplog):
    sides = drawn(unets["sd15"])
    state = {PEFT.format(layer=n, side=s): x for n, ab in sides.items() for s, x in zip("AB", ab, strict=True)}
    save_file(state, tmp_path / "renamed.safetensors")
    settings = {"r": RANK, "lora_alpha": ALPHA}
    for written, scale in ((False, 1.0), (True, ALPHA / RANK)):
        if written:
            (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        caplog.clear()
        lora = read_lora("--model", tmp_path / "renamed.safetensors", unets["sd15"])
        assert ("adapter_config.json beside it: alpha is taken for the rank" in caplog.text) == (not written)
        for name, (a, b) in sides.items():
            assert torch.allclose(lora.layers[name][1], scale * b) and torch.equal(lora.layers[name][0], a)


def test_which_file_of_a_folder_it_is(unets, tmp_path, monkeypatch):
    state, _ = SPELLINGS["diffusers, no alpha"](drawn(unets["sd15"]), "sd15")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    save_file(state, tmp_path / "model" / "pytorch_lora_weights.safetensors")
    assert lora_file(tmp_path / "model") is None  # the model, not what lies beside it
    (tmp_path / "mixed").mkdir()
    save_file(state, tmp_path / "mixed" / "lora.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "mixed" / "checkpoint.safetensors")
    assert lora_file(tmp_path / "mixed") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lora_file("~/mixed/lora.safetensors") == tmp_path / "mixed" / "lora.safetensors"
    assert read_lora("--model", "~/mixed/lora.safetensors", unets["sd15"]).layers.keys() == LAYERS


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["pointer", "half"])
def test_a_pointer_and_half_a_file_are_called_so(unets, tmp_path, name, damage):
    state, _ = SPELLINGS["diffusers, no alpha"](drawn(unets["sd15"]), "sd15")
    save_file(state, tmp_path / name)
    if damage == "pointer":
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5000\n"
        (tmp_path / name).write_text(text)
    else:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    words = "Git LFS" if damage == "pointer" else "cut off"
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"^--model: .*{words}"):
            read_lora("--model", path, unets["sd15"])


def test_a_folder_with_several(unets, tmp_path):
    state, _ = SPELLINGS["diffusers, no alpha"](drawn(unets["sd15"]), "sd15")
    for name in ("step-100", "step-200"):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"holds 2 LoRAs .step-100.safetensors, step-200.safetensors.; name the file"):
        lora_file(tmp_path)
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    assert lora_file(tmp_path).name == "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_kohyas_names_of_the_true_architecture_are_read_back(kind):
    """Every linear layer and convolution of the published shapes, on the meta device: no two share a name."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, layers_per_block=2, **UNETS[kind])
    modules = {n: m for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    lora = Lora({name: (torch.ones(1, 1), torch.ones(1, 1)) for name in modules})
    written = kohya_tensors(lora, UNet(unet.config))
    assert len(written) == 3 * len(modules)
    names = layer_names(unet)
    found = {_layer(name.partition(".")[0], names) for name in written}
    assert found == modules.keys()


def test_a_lora_that_a_run_saved_holds_its_scale_inside(unets, tmp_path):
    lora = Lora({name: (a, b * 1.5) for name, (a, b) in drawn(unets["sdxl"]).items()})
    save_file(tensors(lora, "unet."), tmp_path / "diffusers.safetensors")
    save_file(kohya_tensors(lora, UNet(unets["sdxl"].config)), tmp_path / "kohya.safetensors")
    alphas = [float(x) for name, x in load_file(tmp_path / "kohya.safetensors").items() if name.endswith(".alpha")]
    assert alphas == [RANK] * len(LAYERS)
    for name in ("diffusers", "kohya"):
        back = read_lora("--model", tmp_path / f"{name}.safetensors", unets["sdxl"])
        assert all(torch.equal(x, y) for n in LAYERS for x, y in zip(back.layers[n], lora.layers[n], strict=True))
