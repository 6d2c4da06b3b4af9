"""Hub ids: what is fetched, in which order, and what is said without a network."""

import json
import shutil

import pytest
from hub_on_this_machine import Hub
from safetensors.torch import load_file, save_file
from tiny_runs import Forked, run_code
from tiny_world import tiny_pipeline, tiny_xl

from inpo_fast.models.files.hub import path_or_id
from inpo_fast.runtime.errors import UserError

# the hub's address, and whether it may be asked, are read at import, which was before the fork
PROGRAM = """
import importlib, huggingface_hub.constants
importlib.reload(huggingface_hub.constants)
import json, sys, time
from inpo_fast.models.loading import load_pipeline, load_unet, load_vae, quiet_libraries
from inpo_fast.runtime.errors import UserError
quiet_libraries()
base, init, vae = json.loads(sys.argv[1])
begun = time.perf_counter()
try:
    pipeline = load_pipeline(base)
    if init:
        load_unet("models.init", init, pipeline.unet, scheduler=pipeline.scheduler.config)
    if vae:
        load_vae(vae, pipeline)
    print("opened", type(pipeline).__name__, pipeline.opened_from)
except UserError as problem:
    print("refused", problem)
print(time.perf_counter() - begun)
"""


def run(tmp_path, base: str, init: str = "", vae: str = "", **environment) -> tuple[str, str]:
    """What is printed, and on stderr; in a process of its own."""
    environment = {"HF_HOME": str(tmp_path / "cache"), **environment}
    process = Forked(tmp_path / "process", run_code, PROGRAM, json.dumps([base, init, vae]), **environment)
    code, out, err = process.wait(), process.said.read_text(), process.complaints.read_text()
    assert code == 0, err
    return out, err


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    tiny_pipeline().save_pretrained(folder / "sd")
    tiny_xl().save_pretrained(folder / "xl")
    for part in ("unet", "vae", "text_encoder"):  # what repositories hold beside, and nobody wants
        file = next((folder / "sd" / part).glob("*.safetensors"))
        half = {name: x.half() for name, x in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.with_suffix(".bin").write_bytes(b"not this")
    (folder / "sd" / "safety_checker").mkdir()
    (folder / "sd" / "safety_checker" / "model.safetensors").write_bytes(b"not this")
    (folder / "sd" / "whole.safetensors").write_bytes(b"not this")
    shutil.copytree(folder / "sd" / "vae", folder / "vae")
    shutil.copytree(folder / "sd" / "unet", folder / "unet")
    shutil.copytree(folder / "sd", folder / "sd3")
    index = folder / "sd3" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusion3Pipeline"}))
    shutil.copytree(folder / "sd", folder / "lcm")
    config = folder / "lcm" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"time_cond_proj_dim": 256}))
    return {f"owner/{path.name}": path for path in folder.iterdir()}


@pytest.fixture
def hub(repositories):
    hub = Hub(repositories)
    yield hub
    hub.close()


def test_what_is_needed_is_fetched_and_nothing_else(hub, tmp_path):
    here = {"HF_ENDPOINT": hub.address}
    out, _ = run(tmp_path, "owner/sd", "owner/unet", "owner/vae", **here)
    assert out.startswith("opened StableDiffusionPipeline") and str(tmp_path / "cache") in out
    assert hub.asked[0] == "model_index.json"
    large = [name for name in hub.asked if not name.endswith((".json", ".txt"))]
    assert sorted(large) == [
        *("diffusion_pytorch_model.safetensors",) * 2,  # of the two single parts
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    first = min(hub.asked.index(name) for name in large)
    assert {"unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"} <= set(hub.asked[:first])
    # once it is in the cache, no network is needed: neither told so nor found out
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        out, _ = run(tmp_path, "owner/sd", "owner/unet", "owner/vae", **(here | offline))
        assert out.startswith("opened"), out


@pytest.mark.parametrize(
    ("name", "words", "asked"),
    [
        ("sd3", "owner/sd3 is Stable Diffusion 3", {"model_index.json"}),
        ("lcm", "LCM", None),
        ("none", "owner/none is neither a folder here nor a model on the hub", set()),
        ("vae", "is the folder of a VAE", {"config.json"}),
    ],
)
def test_what_cannot_be_aligned_is_refused_before_weights_are_fetched(hub, tmp_path, name, words, asked):
    out, err = run(tmp_path, f"owner/{name}", HF_ENDPOINT=hub.address)
    assert out.startswith("refused models.base: ") and words in out, out + err
    assert not [file for file in hub.asked if not file.endswith((".json", ".txt"))]
    if asked is not None:
        assert set(hub.asked) == asked


def test_all_files_are_of_one_commit(hub, tmp_path):
    """Though somebody pushes to the repository meanwhile."""
    hub.moves = True
    out, err = run(tmp_path, "owner/sd", HF_ENDPOINT=hub.address)
    assert out.startswith("opened"), out + err
    assert len(list((tmp_path / "cache" / "hub" / "models--owner--sd" / "snapshots").iterdir())) == 1


def test_a_repository_with_one_variant(hub, repositories, tmp_path):
    folder = tmp_path / "fp16"
    shutil.copytree(repositories["owner/sd"], folder)
    for part in ("unet", "vae", "text_encoder"):
        for path in (folder / part).iterdir():
            if path.suffix != ".json" and ".fp16." not in path.name:
                path.unlink()
    hub.repositories = {**repositories, "owner/fp16": folder}
    out, err = run(tmp_path, "owner/fp16", HF_ENDPOINT=hub.address)
    assert out.startswith("opened"), out + err


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_one_line_and_no_waiting(tmp_path, environment):
    """huggingface_hub would try ten times, in 46 seconds and twenty lines."""
    out, err = run(tmp_path, "owner/name", **environment)
    first, seconds = out.splitlines()
    assert first.startswith("refused models.base: owner/name is no folder here, and the hub cannot be reached")
    assert float(seconds) < 8 and "Retry" not in err and "thrown while" not in err


def test_paths_and_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a" / "b").mkdir(parents=True)
    for place in ("a/b", "./a/b", "a/b/", "~/a/b", str(tmp_path / "a" / "b"), "a"):
        assert path_or_id("k", place).resolve() == tmp_path / "a" / "b" or place == "a"
    for place in ("owner/name", "owner/name-1.5_x"):
        assert path_or_id("k", place) is None
    for place in ("./x", "../x", "/x", "~/x", "x/", "x", "a/b/c", "a/x/", r"C:\models\x", r"a\x", "a b/c"):
        with pytest.raises(UserError, match=r"^k: no such folder"):
            path_or_id("k", place)
    for place in ("x.safetensors", "a/x.safetensors", "a/x.ckpt", "a/model_index.json"):
        with pytest.raises(UserError, match=r"^k: no such file"):
            path_or_id("k", place)
    for place in ("", " "):
        with pytest.raises(UserError, match=r"^k is empty"):
            path_or_id("k", place)
    with pytest.raises(UserError, match="an address"):
        path_or_id("k", "https://huggingface.co/owner/name")
