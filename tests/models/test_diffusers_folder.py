"""The folder that is given away: untouched parts byte for byte, the rest in names that old readers know, for its group
to read. tests/models/test_other_versions.py opens such folders with the old libraries themselves."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_world import tiny_pipeline, tiny_unet, tiny_xl
from transformers import CLIPTextModel, CLIPTokenizer

from inpo_fast.handover.output_model import untouched_parts
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.files.diffusers_folder import write_folder
from inpo_fast.models.files.hub import base_folder, hub_id
from inpo_fast.runtime.files import allow_reading, whole

PARTS = {"sd15": ["vae", "text_encoder", "tokenizer", "scheduler"]}
PARTS["sdxl"] = [*PARTS["sd15"], "text_encoder_2", "tokenizer_2"]
MAKE = {"sd15": tiny_pipeline, "sdxl": tiny_xl}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.fixture(params=MAKE)
def base(request, tmp_path) -> Path:
    """As a library of before transformers 5 wrote it."""
    write_folder(MAKE[request.param](), tmp_path / "base", {})
    return tmp_path / "base"


def written(pipeline, tmp_path: Path, untouched=None, name: str = "out") -> Path:
    write_folder(pipeline, tmp_path / name, untouched or {})
    return tmp_path / name


def opened(folder: Path):
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def test_untouched_parts_are_the_bases_files(base, tmp_path):
    (base / "text_encoder" / "notes.md").write_text("of the base")
    (base / "vae" / "pytorch_model.bin").write_bytes(b"a pickle")
    (base / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another precision")
    kind = "sdxl" if (base / "text_encoder_2").is_dir() else "sd15"
    pipeline = MAKE[kind]()
    pipeline.unet.conv_in.weight.data += 1
    out = written(pipeline, tmp_path, untouched_parts(ModelsConfig(base=str(base))))
    left = {"vae/pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors"}  # what its loader does not take
    before = {n: b for n, b in files(base).items() if n.split("/")[0] in PARTS[kind] and n not in left}
    after = files(out)
    assert {name: after.get(name) for name in before} == before and "text_encoder/notes.md" in before
    assert sorted(p.name for p in out.iterdir()) == sorted([*PARTS[kind], "unet", "model_index.json"])
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    assert torch.equal(unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_names_that_readers_before_transformers_5_know(base):
    names = keys(base / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names) and len(names) > 20
    assert json.loads((base / "text_encoder" / "config.json").read_text())["architectures"] == ["CLIPTextModel"]
    for folder in base.glob("tokenizer*"):
        vocabulary = json.loads((folder / "vocab.json").read_text())
        merges = (folder / "merges.txt").read_text().splitlines()
        fast = json.loads((folder / "tokenizer.json").read_text())["model"]
        assert vocabulary == fast["vocab"]
        assert [tuple(line.split(" ")) for line in merges[1:]] == [tuple(pair) for pair in fast["merges"]]
    if (base / "text_encoder_2").is_dir():
        names = keys(base / "text_encoder_2" / "model.safetensors")
        assert {name.split(".")[0] for name in names} == {"text_model", "text_projection"}


def test_todays_library_reads_the_same_text_encoder(tmp_path):
    pipeline = tiny_pipeline()
    out = written(pipeline, tmp_path)
    encoder = CLIPTextModel.from_pretrained(out / "text_encoder")
    tokens = CLIPTokenizer.from_pretrained(out / "tokenizer")("a red circle", return_tensors="pt").input_ids
    assert torch.equal(encoder(tokens).last_hidden_state, pipeline.text_encoder(tokens).last_hidden_state)


def test_a_base_that_todays_library_wrote_is_put_right(tmp_path):
    """Copied as it is it would be as broken for others as the base."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    assert not keys(tmp_path / "base/text_encoder/model.safetensors")[0].startswith("text_model.")
    out = written(pipeline, tmp_path, untouched_parts(ModelsConfig(base=str(tmp_path / "base"))))
    ours, theirs = (load_file(folder / "text_encoder/model.safetensors") for folder in (out, tmp_path / "base"))
    assert ours.keys() == {f"text_model.{name}" for name in theirs}
    assert all(torch.equal(ours[f"text_model.{name}"], x) for name, x in theirs.items())
    assert (out / "tokenizer/vocab.json").is_file() and (out / "tokenizer/merges.txt").is_file()
    assert (out / "vae/diffusion_pytorch_model.safetensors").read_bytes() == (
        tmp_path / "base/vae/diffusion_pytorch_model.safetensors"
    ).read_bytes()


def variant_only(part: Path) -> None:
    for path in part.glob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


def two_shards(part: Path) -> None:
    for path in part.glob("*.safetensors"):
        state, half, index = load_file(path), {}, {}
        for number, some in enumerate((list(state)[::2], list(state)[1::2]), 1):
            name = f"{path.stem}-0000{number}-of-00002.safetensors"
            save_file({key: state[key] for key in some}, part / name, {"format": "pt"})
            index |= dict.fromkeys(some, name)
            half[name] = None
        path.unlink()
        (part / f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def pickled(part: Path) -> None:
    for path in part.glob("*.safetensors"):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(load_file(path), part / name)
        path.unlink()


@pytest.mark.parametrize(("change", "is_copied"), [(variant_only, True), (two_shards, True), (pickled, False)])
def test_however_the_base_keeps_its_weights(tmp_path, change, is_copied):
    pipeline = tiny_pipeline()
    write_folder(pipeline, tmp_path / "base", {})
    for name in ("vae", "text_encoder"):
        change(tmp_path / "base" / name)
    out = written(pipeline, tmp_path, untouched_parts(ModelsConfig(base=str(tmp_path / "base"))))
    again = opened(out)
    for name in ("vae", "text_encoder"):
        ours, theirs = getattr(again, name).state_dict(), getattr(pipeline, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        weights = {p.read_bytes() for p in (tmp_path / "base" / name).iterdir() if p.suffix == ".safetensors"}
        copied = {p.read_bytes() for p in (out / name).iterdir() if p.suffix == ".safetensors"}
        assert (copied == weights) == is_copied and not list(out.rglob("*.bin")) and copied


def test_a_snapshot_in_the_hubs_cache(tmp_path, monkeypatch):
    """Its files are links; what is given away are files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "models--a-group--a-model"
    snapshot, blobs = place / "snapshots" / ("0" * 40), place / "blobs"
    write_folder(tiny_pipeline(), snapshot, {})
    blobs.mkdir()
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert base_folder("a-group/a-model") == snapshot and base_folder("a-group/another") is None
    assert hub_id("a-group/a-model") == "a-group/a-model" == hub_id(str(snapshot))
    out = written(tiny_pipeline(), tmp_path, untouched_parts(ModelsConfig(base="a-group/a-model")))
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    after, before = files(out), files(snapshot)
    assert all(after[name] == content for name, content in before.items() if name.split("/")[0] in PARTS["sd15"])


def test_another_vae_is_copied_from_its_own_folder(tmp_path):
    base, other = tiny_pipeline(), tiny_pipeline(seed=5)
    write_folder(base, tmp_path / "base", {})
    write_folder(other, tmp_path / "other", {})
    base.vae = other.vae
    for place in (tmp_path / "other", tmp_path / "other" / "vae"):
        parts = untouched_parts(ModelsConfig(base=str(tmp_path / "base"), vae=str(place)))
        out = written(base, tmp_path, parts, name=f"out-{place.name}")
        assert files(out / "vae") == files(tmp_path / "other" / "vae") != files(tmp_path / "base" / "vae")
    parts = untouched_parts(ModelsConfig(base=str(tmp_path / "base"), vae=str(tmp_path / "x.safetensors")))
    assert "vae" not in parts and "text_encoder" in parts  # a single file: written from what was loaded
    config = tmp_path / "other" / "vae" / "config.json"
    told = json.loads(config.read_text())
    del told["scaling_factor"]  # the base's counts here, 0.18215 to whoever opens a copy
    config.write_text(json.dumps(told))
    assert "vae" not in untouched_parts(ModelsConfig(base=str(tmp_path / "base"), vae=str(tmp_path / "other")))


def test_a_base_in_one_file_or_of_random_weights_has_no_parts(tmp_path):
    assert untouched_parts(ModelsConfig(base=str(tmp_path / "x.safetensors"))) == {}
    assert untouched_parts(ModelsConfig(random="sd15")) == {}


def test_no_place_of_this_machine_is_given_away(tmp_path):
    write_folder(tiny_pipeline(), tmp_path / "base", {})
    pipeline = opened(tmp_path / "base")
    out = written(pipeline, tmp_path, untouched_parts(ModelsConfig(base=str(tmp_path / "base"))))
    again = written(pipeline, tmp_path, name="all-written")
    for path in [*out.rglob("*.json"), *again.rglob("*.json")]:
        assert str(tmp_path) not in path.read_text()


def test_the_unet_is_one_file_whatever_its_size(tmp_path, monkeypatch):
    """SDXL's in fp32 is larger than the size at which diffusers begins to split; folder loaders elsewhere read one."""
    pipeline, seen = tiny_pipeline(), {}
    save = UNet2DConditionModel.save_pretrained

    def recorded(self, folder, **options):
        seen.update(options)
        save(self, folder, **options)

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", recorded)
    written(pipeline, tmp_path)
    assert seen["max_shard_size"] == "1TB"
    tiny_unet().save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1  # that option is what splits


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_readable_as_any(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        out = written(tiny_pipeline(), tmp_path)
        with whole(tmp_path / "x.safetensors") as aside:
            save_file({"x": torch.ones(1)}, aside)
        (tmp_path / "any").write_text("")
        allow_reading(tmp_path / "any")
    finally:
        os.umask(before)
    paths = [*(p for p in out.rglob("*") if p.is_file()), tmp_path / "x.safetensors", tmp_path / "any"]
    assert {path.stat().st_mode & 0o777 for path in paths} == {mode}


def test_half_precision_files_open_in_one_precision(tmp_path):
    """Without dtype= diffusers opens its models as fp32 and transformers its own as config.json says."""
    out = written(tiny_pipeline().to(torch.float16), tmp_path)
    assert load_file(out / "text_encoder/model.safetensors").popitem()[1].dtype == torch.float16
    pipeline = opened(out)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
