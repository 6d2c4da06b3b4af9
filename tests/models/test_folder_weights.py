"""Diffusers folders as they are published: variants, pickles, shards, parts that are not there, pointers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import tiny_pipeline, tiny_xl
from transformers import CLIPTextConfig, CLIPTextModel

from inpo_fast import sample as sample_command
from inpo_fast.comparison.prompts import read_prompt_set
from inpo_fast.data.images import decode
from inpo_fast.data.pair import BadPair
from inpo_fast.data.sources import open_source
from inpo_fast.judges.clip import offline
from inpo_fast.judges.open_clip import read_state
from inpo_fast.models.files.folder_weights import choose_files
from inpo_fast.models.loading import load_pipeline, load_unet
from inpo_fast.runtime.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4265146304\n"
MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder / "sd")
    tiny_xl().save_pretrained(folder / "xl")
    return folder


@pytest.fixture(scope="module")
def plain(saved):
    """saved/sd, opened; nobody changes it."""
    return load_pipeline(str(saved / "sd"))


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved / "sd", tmp_path / "m")
    return tmp_path / "m"


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def edit(path: Path, **changes) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "remove"}))


def state(pipeline) -> dict[str, torch.Tensor]:
    parts = {name: getattr(pipeline, name, None) for name in MODULES}
    return {f"{n}.{k}": x for n, part in parts.items() if part is not None for k, x in part.state_dict().items()}


def same(ours, theirs) -> None:
    ours, theirs = state(ours), state(theirs)
    assert ours.keys() == theirs.keys() and all(x.equal(theirs[name]) for name, x in ours.items())


def refused(words: str, call, *arguments, **more) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        call(*arguments, **more)
    assert "\n" not in str(refusal.value) and "weights_only" not in str(refusal.value)


# ---- weights ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("variant", "kind"), [("fp16", "xl"), ("bf16", "sd"), ("non_ema", "sd")])
def test_a_folder_with_one_variant_only(saved, tmp_path, kind, variant):
    """The same weights as diffusers opens when it is told the variant."""
    shutil.copytree(saved / kind, tmp_path / "m")
    for path in weights_of(tmp_path / "m"):
        rounded = {n: x.half() if variant == "fp16" else x for n, x in load_file(path).items()}
        save_file(rounded, path.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
        path.unlink()
    ours = load_pipeline(str(tmp_path / "m"))
    theirs = type(ours).from_pretrained(tmp_path / "m", variant=variant, dtype=torch.float32, local_files_only=True)
    same(ours, theirs)
    unet = load_unet("--model", str(tmp_path / "m"), ours.unet)
    same_unet = ours.unet.state_dict()
    assert all(x.equal(same_unet[n]) for n, x in unet.state_dict().items())


def test_full_precision_goes_before_a_variant_part_by_part(plain, copied):
    for path in weights_of(copied):
        save_file(
            {n: x.half() for n, x in load_file(path).items()}, path.with_suffix(".fp16.safetensors"), {"format": "pt"}
        )
        if path.parent.name == "vae":
            path.unlink()
    got, want = state(load_pipeline(str(copied))), state(plain)
    assert all(x.equal(want[n].half().float() if n.startswith("vae.") else want[n]) for n, x in got.items())


def test_pickles_alone(plain, copied):
    for path in weights_of(copied):
        name = "pytorch_model.bin" if "text" in path.parent.name else "diffusion_pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    same(load_pipeline(str(copied)), plain)
    for content in (b"\x80\x02cposix\nnothing\n.", b"", b"garbage" * 30):
        for part in ("unet", "text_encoder"):
            file = next((copied / part).glob("*.bin"))
            before = file.read_bytes()
            file.write_bytes(content)
            refused(f"^models.base: .*{part}", load_pipeline, str(copied))
            file.write_bytes(before)


def test_shards(plain, tmp_path):
    plain.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m" / "unet").glob("*.safetensors"))) > 2
    same(load_pipeline(str(tmp_path / "m")), plain)
    plain.save_pretrained(tmp_path / "v", max_shard_size="20KB", variant="fp16")
    same(load_pipeline(str(tmp_path / "v")), plain)
    sorted((tmp_path / "m" / "unet").glob("*.safetensors"))[1].unlink()
    refused(r"^models.base: .*", load_pipeline, str(tmp_path / "m"))


def test_which_files_are_chosen():
    names = {
        "diffusion_pytorch_model.safetensors": None,
        "diffusion_pytorch_model.fp16.safetensors": "fp16",
        "diffusion_pytorch_model.non_ema.safetensors": "non_ema",
        "model.fp16-00001-of-00002.safetensors": "fp16",
        "model.safetensors.index.fp16.json": "fp16",
        "pytorch_model.bin": None,
    }
    for name, variant in names.items():
        assert choose_files("k", "p", [name]).variant == variant
    assert choose_files("k", "p", names).names == ("diffusion_pytorch_model.safetensors",)
    assert choose_files("k", "p", names, ["diffusion_pytorch_model.safetensors"]).names == ("pytorch_model.bin",)
    assert choose_files("k", "p", ["model.fp32.safetensors", "pytorch_model.bin"]).variant is None
    assert choose_files("k", "p", ["model.fp16.safetensors", "model.fp32.safetensors"]).variant == "fp32"
    left = ["diffusion_pytorch_model.safetensors", "pytorch_model.bin"]
    assert choose_files("k", "p", names, left).variant == "non_ema"
    refused("only Flax and ONNX weights", choose_files, "k", "p", ["model.onnx", "diffusion_flax_model.msgpack"])
    refused("no weights", choose_files, "k", "p", ["config.json"])


def test_a_tensor_that_is_not_there_is_not_drawn_at_random(copied):
    """diffusers and transformers put random numbers there, with a warning in their logs."""
    for part in ("unet", "vae", "text_encoder"):
        file = weights_of(copied / part)[0]
        whole = load_file(file)
        for name in (min(whole), max(whole)):
            save_file({n: x for n, x in whole.items() if n != name}, file, {"format": "pt"})
            refused(f"^models.base: .*{part} lacks .*{name.removeprefix('text_model.')}", load_pipeline, str(copied))
        save_file({n: torch.zeros(3, 3) if n == name else x for n, x in whole.items()}, file, {"format": "pt"})
        refused("^models.base: .*", load_pipeline, str(copied))
        broken = {n: torch.full_like(x, float("inf")) if n == name else x for n, x in whole.items()}
        save_file(broken, file, {"format": "pt"})
        refused(f"not finite, in .*{name.removeprefix('text_model.')}", load_pipeline, str(copied))
        save_file(whole, file, {"format": "pt"})
    save_file(whole | {"extra": torch.zeros(2)}, file, {"format": "pt"})
    load_pipeline(str(copied))  # of a text encoder: old ones bring position numbers
    file = weights_of(copied / "unet")[0]
    save_file(load_file(file) | {"time_embedding.cond_proj.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    refused("cond_proj.weight, which its config.json has no place for", load_pipeline, str(copied))


# ---- parts that are not there ----------------------------------------------------------------------------------------
def test_parts_that_nothing_needs_may_be_missing(plain, copied):
    edit(
        copied / "model_index.json",
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        requires_safety_checker=True,
        something_of_another_version=["diffusers", "NoSuchClass"],
    )
    opened = load_pipeline(str(copied))
    same(opened, plain)
    assert opened.safety_checker is None and opened.feature_extractor is None
    (copied / "feature_extractor").mkdir()
    (copied / "feature_extractor/preprocessor_config.json").write_text(json.dumps({"crop_size": 224, "size": 224}))
    assert load_pipeline(str(copied)).feature_extractor is not None


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_parts_that_are_needed_are_named(copied, part):
    shutil.rmtree(copied / part)
    refused(f"^models.base: .*{part}", load_pipeline, str(copied))


@pytest.mark.parametrize("length", ["remove", 1000000000000000019884624838656, 77, None])
def test_a_tokenizer_has_no_more_tokens_than_its_encoder_has_places(plain, copied, length):
    edit(copied / "tokenizer/tokenizer_config.json", model_max_length=length)
    opened = load_pipeline(str(copied))
    assert opened.tokenizer.model_max_length == 16
    long = " ".join(["a red circle"] * 20)
    ours, theirs = (p.encode_prompt(long, "cpu", 1, False)[0] for p in (opened, plain))
    assert ours.equal(theirs)


def test_a_tokenizer_may_have_fewer_tokens(copied):
    edit(copied / "tokenizer/tokenizer_config.json", model_max_length=8)
    assert load_pipeline(str(copied)).tokenizer.model_max_length == 8


def test_a_tokenizer_of_another_encoder_is_refused(copied):
    edit(copied / "text_encoder/config.json", vocab_size=20)
    refused("another shape than its config.json says: .*token_embedding", load_pipeline, str(copied))
    config = CLIPTextConfig.from_pretrained(copied / "text_encoder")
    CLIPTextModel(config).save_pretrained(copied / "text_encoder")
    refused("tokens and the text encoder 20", load_pipeline, str(copied))


# ---- Git LFS ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_pointers_in_a_folder(copied, file):
    assert (copied / file).is_file()
    (copied / file).write_text(POINTER)
    refused(rf"^models.base: .*{file} is a Git LFS pointer.*git lfs pull", load_pipeline, str(copied))


def test_pointers_beside_the_files_that_are_opened_do_not_matter(saved, plain, copied):
    for part in ("unet", "vae"):
        (copied / part / "diffusion_pytorch_model.bin").write_text(POINTER)
        (copied / part / "diffusion_pytorch_model.fp16.safetensors").write_text(POINTER)
    (copied / "text_encoder" / "pytorch_model.bin").write_text(POINTER)
    same(load_pipeline(str(copied)), plain)
    for part in ("unet", "vae"):  # `git lfs pull --include "*fp16*"`
        shutil.copy(weights_of(saved / "sd" / part)[0], copied / part / "diffusion_pytorch_model.fp16.safetensors")
        (copied / part / "diffusion_pytorch_model.safetensors").write_text(POINTER)
    same(load_pipeline(str(copied)), plain)
    for path in (copied / "unet").glob("*.safetensors"):
        path.unlink()
    refused("pytorch_model.bin is a Git LFS pointer", load_pipeline, str(copied))


def test_pointers_in_place_of_data_and_judges(tmp_path, monkeypatch):
    def pointer(name: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(POINTER)
        return str(tmp_path / name)

    words = "is a Git LFS pointer.*git lfs pull"
    for name in ("p/train.parquet", "t/0.tar", "f/metadata.jsonl", "h.json"):
        refused(words, open_source, pointer(name) if name == "h.json" else str(Path(pointer(name)).parent))
    with pytest.raises(BadPair, match=words):
        decode(POINTER.encode(), 10**6)
    for name in ("a.txt", "b.tsv", "c.json", "d.parquet"):
        refused(words, read_prompt_set, pointer(name))
    for name in ("x.pt", "x.safetensors"):
        refused(f"^judge j: .*{words}", read_state, Path(pointer(name)), "j")
    pointer("clip/model.safetensors")
    refused(f"^judge j: .*{words}", offline, "j", str(tmp_path / "clip"))
    save_file({"x": torch.zeros(1)}, tmp_path / "clip/model.safetensors")
    pointer("clip/pytorch_model.bin")
    assert offline("j", str(tmp_path / "clip"))
    pointer("clip/vocab.json")
    refused(words, offline, "j", str(tmp_path / "clip"))


def test_a_judges_pickle_never_comes_with_the_advice_to_let_it_run(tmp_path):
    for content in (b"\x80\x02cposix\nnothing\n.", b"garbage", b"PK\x03\x04" + bytes(20)):
        (tmp_path / "x.pt").write_bytes(content)
        refused("damaged or holds more than tensors", read_state, tmp_path / "x.pt", "j")


def test_sample_refuses_a_base_before_it_draws(copied, tmp_path, monkeypatch):

    edit(copied / "unet/config.json", in_channels=9)
    words = ["--base", str(copied), "--model", str(copied), "--prompt", "a", "--output", str(tmp_path / "x.png")]
    monkeypatch.setattr(sys, "argv", ["sample", *words])
    refused("inpainting", sample_command.main)
