"""What a run leaves held against its promises: the folders, the model card, and every snippet of docs/hand-over.md."""

import copy
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import ControlNetModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from tiny_world import save_pairs, tiny_pipeline, tiny_xl

from inpo_fast import export as export_command
from inpo_fast import train as train_command
from inpo_fast.config import parse
from inpo_fast.handover import single_file_export
from inpo_fast.handover.model_card import _method, write_cards
from inpo_fast.handover.output_model import KOHYA_NAME, output_pipeline
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.methods import METHODS, variant_name
from inpo_fast.models import unet as unet_family
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.families import denoiser_of
from inpo_fast.models.files.lora_files import read_lora
from inpo_fast.models.loading import load_pipeline, open_pipeline, quiet_libraries
from inpo_fast.models.lora import with_lora
from inpo_fast.models.models import DTYPES, Models
from inpo_fast.report import plots
from inpo_fast.report.results import NAMES, verdict
from inpo_fast.report.start import started_from
from inpo_fast.runtime.errors import UserError
from inpo_fast.training import loop, saved_checkpoint
from inpo_fast.training.set_up import prepare

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "hand-over.md"
KINDS = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
LORA = ["--models.lora.rank=2", "--models.lora.alpha=3"]  # alpha is not the rank
MODES = {
    "full-fp32": ["--optim.average=ema"],
    "full-bf16": ["--models.precision=bf16"],
    "lora-fp32": LORA,
    "lora-bf16": [*LORA, "--models.precision=bf16"],
}
# what is written asks for the kind by its layers' names and for the mode by its masters: each mode, each kind with both
RUNS = [("sd15", "full-fp32"), ("sd15", "lora-fp32"), ("sdxl", "full-bf16"), ("sdxl", "lora-bf16")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    quiet_libraries()
    for kind, make in {"sd15": tiny_pipeline, "sdxl": tiny_xl}.items():
        make().save_pretrained(folder / kind)
        controlnet = ControlNetModel.from_unet(make().unet, conditioning_embedding_out_channels=(4, 8, 16))
        for parameter in controlnet.parameters():  # its outputs begin as zeros
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        controlnet.save_pretrained(folder / f"{kind}-control")
    save_pairs(folder / "pairs.parquet")
    rng = np.random.default_rng(0)
    for name in ("depth", "canny", "picture", "mask"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def bases(world):
    """kind -> its pipeline, which nobody changes."""
    return {kind: load_pipeline(str(world / kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def runs(world):
    """(kind, mode) -> (Run after its end, the UNet that finish() returned); each trained once."""
    done = {}

    def run(kind: str, mode: str):
        if (kind, mode) not in done:
            config = parse(
                "test",
                [
                    f"--models.base={world / kind}",
                    f"--data.source={world / 'pairs.parquet'}",
                    f"--output={world / 'runs' / f'{kind}-{mode}'}",
                    "--train.steps=2",
                    "--train.pairs_per_step=4",
                    "--train.micro_batch=4",
                    "--inversion.steps=2",
                    "--optim.lr=0.01",
                    "--optim.warmup_steps=0",
                    *MODES[mode],
                ],
            )
            started = prepare(config, 0, 1, torch.device("cpu"))
            loop.train(started, Console(quiet=True))
            done[kind, mode] = started, loop.finish(started)
        return done[kind, mode]

    return run


@pytest.mark.parametrize(("kind", "mode"), RUNS)
def test_the_folders_of_a_run(bases, runs, kind, mode):
    run, aligned = runs(kind, mode)
    stock, base = getattr(diffusers, KINDS[kind]), bases[kind]
    model = stock.from_pretrained(run.folder.path / "model", local_files_only=True)
    for name in ("vae", "text_encoder", "text_encoder_2"):  # as they were loaded, not rounded to bf16
        if hasattr(base, name):
            same(getattr(model, name).state_dict(), getattr(base, name).state_dict())
    saved = run.folder.checkpoints / "step-0002"
    tensors = saved_checkpoint.read(saved)
    policy, average = (
        {name.removeprefix(kind): x for name, x in tensors.items() if name.startswith(kind)}
        for kind in ("policy/", "average/")
    )
    masters = average if mode == "full-fp32" else policy
    before, after = base.unet.state_dict(), model.unet.state_dict()
    assert not torch.equal(after[MOVED], before[MOVED]) and after[MOVED].dtype == torch.float32
    if mode.startswith("full"):
        same(after, masters)
        assert after[MOVED].equal(policy[MOVED]) == (mode != "full-fp32")
    else:
        for name, x in masters.items():
            if ".lora_A." in name:
                layer, up = name.replace(".lora_A.default", ""), masters[name.replace("lora_A", "lora_B")]
                expected = before.pop(layer).double() + 3 / 2 * up.double() @ x.double()
                # 2 products and their sum with a weight below 1, rounded to fp32
                torch.testing.assert_close(after.pop(layer).double(), expected, atol=3e-7, rtol=0)
        same(after, before)  # the layers without an adapter
        lora = run.folder.path / "lora"
        assert {path.name for path in lora.glob("*.safetensors")} == {LORA_WEIGHT_NAME_SAFE, KOHYA_NAME}
        for place in (lora, lora / KOHYA_NAME):
            with_lora = copy.copy(base)
            with_lora.unet = copy.deepcopy(base.unet)
            with_lora.load_lora_weights(str(place))
            # the adapter beside the weight or inside it: rounding of some twenty layers at unit size
            torch.testing.assert_close(predict(with_lora.unet), predict(model.unet), atol=3e-5, rtol=0)
        with safe_open(lora / LORA_WEIGHT_NAME_SAFE, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # diffusers 0.34 to 0.39 stop at settings of a newer peft
    dtype = DTYPES[run.config.models.precision]
    same(run.models.pipeline.unet.state_dict(), copy.deepcopy(base.unet).to(dtype).state_dict())
    returned = aligned.state_dict()
    for name, x in model.unet.to(dtype).state_dict().items():
        # of LoRA in bf16 the base was rounded first and the sum again: two roundings of a weight below 1
        torch.testing.assert_close(returned[name], x, atol=2**-7 if mode == "lora-bf16" else 3e-7, rtol=0)
    torch.manual_seed(0)
    model.set_progress_bar_config(disable=True)
    image = model.to(torch.float32)("a small red circle", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3) and np.isfinite(image).all() and image.std() > 0


def test_a_run_that_starts_from_a_lora(world, bases, runs):
    """Policy and reference begin at base + LoRA, ours or kohya's, and say so; both files of the end are the base's."""
    first, _ = runs("sd15", "lora-fp32")
    base = bases["sd15"].unet
    start = with_lora(base, read_lora("test", first.folder.path / "lora", base))
    lora = first.folder.path / "lora"
    for number, (init, extra) in enumerate([(lora, []), (lora / KOHYA_NAME, ["--models.lora.rank=3"])]):
        config = parse(
            "test",
            [
                f"--models.base={world / 'sd15'}",
                f"--models.init={init}",
                f"--data.source={world / 'pairs.parquet'}",
                f"--output={world / 'runs' / f'further-{number}'}",
                *(["--train.steps=1", "--train.pairs_per_step=4", "--train.micro_batch=4", "--inversion.steps=2"]),
                *(["--optim.lr=0.01", "--optim.warmup_steps=0"]),
                *extra,
            ],
        )
        run = prepare(config, 0, 1, torch.device("cpu"))
        with run.models._base_only():
            torch.testing.assert_close(predict(run.models.reference), predict(start), atol=3e-5, rtol=0)
        torch.testing.assert_close(predict(run.models.policy), predict(start), atol=3e-5, rtol=0)
        loop.train(run, Console(quiet=True))
        loop.finish(run)
        line = json.loads((run.folder.path / "metrics.jsonl").read_text().splitlines()[0])
        assert line["loss"] == pytest.approx(np.log(2), abs=1e-6)
        manifest = json.loads((run.folder.path / "manifest.json").read_text())
        assert manifest["model"]["init"] == str(init)
        assert started_from(manifest["model"]).startswith("the base with the LoRA it started from, ")
        assert manifest["model"]["reference"] == "models.base with the LoRA of models.init"
        for path in write_cards(run.folder.path):
            named, text = f"{first.folder.path.name}/lora" if init == lora else KOHYA_NAME, path.read_text()
            assert f"trained further from the LoRA {named}. The frozen" in text
            assert "The frozen reference of the loss is the base with that LoRA." in text
        model = load_pipeline(str(run.folder.path / "model")).unet
        assert (predict(model) - predict(start)).abs().max() > 1e-3
        if extra:
            lora = read_lora("test", run.folder.path / "lora", base)
            assert lora.rank == 5  # 2 + 3
            torch.testing.assert_close(predict(with_lora(base, lora)), predict(model), atol=3e-5, rtol=0)
            pipeline = copy.copy(bases["sd15"])
            pipeline.unet = copy.deepcopy(base)
            pipeline.load_lora_weights(str(run.folder.path / "lora" / KOHYA_NAME))
            torch.testing.assert_close(predict(pipeline.unet), predict(model), atol=3e-5, rtol=0)


def test_a_lora_on_top_of_another_model(world, runs, monkeypatch, tmp_path):
    """Whatever says what it goes on top of, or what it was compared with, names the start: the card's code draws what
    model/ draws, from each kind of start."""
    first, _ = runs("sd15", "full-fp32")
    start, out = first.folder.path / "model", world / "runs" / "on-top"
    captions = [f"a small {colour} circle on a gray background" for colour in ("red", "green", "blue")]
    (world / "three.txt").write_text("\n".join(captions))
    settings = {"models.base": world / "sd15", "models.init": start, "data.source": world / "pairs.parquet"}
    settings |= {"output": out, "train.steps": 1, "train.pairs_per_step": 2, "train.micro_batch": 2}
    settings |= {"inversion.steps": 1, "optim.lr": 0.01, "optim.warmup_steps": 0, "models.lora.rank": 2}
    settings |= {"evaluate.prompts": world / "three.txt", "evaluate.seeds": 1, "evaluate.sampler_steps": 2}
    monkeypatch.setattr(sys, "argv", ["train", *(f"--{key}={value}" for key, value in settings.items())])
    monkeypatch.setattr(plots, "draw", lambda curve, series: "<svg></svg>")
    train_command.main()

    named = f"the model it started from, {first.folder.path.name}/model"
    result, page = json.loads((out / "evaluation.json").read_text()), (out / "report.html").read_text()
    assert result["compared_with"] == named and f"comparisons with {named}, on 3 prompts" in verdict(result)
    for words in (f"The start above ({named})", "Win-rates against the start", "negative control: the start, noise"):
        assert words in page
    assert f"aligned from {start}, in the pipeline of {world / 'sd15'}" in page
    shown = re.sub(r"<(pre|style).*?</\1>", "", page, flags=re.DOTALL).replace(f"pipeline of {world / 'sd15'}", "")
    assert not re.search(r"\bbase\b", shown), re.findall(r".{40}\bbase\b.{40}", shown)
    for name in ("model", "lora"):
        assert verdict(result) in (out / name / "README.md").read_text()

    with safe_open(out / "lora" / KOHYA_NAME, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_sd_model_name"] == metadata["modelspec.merged_from"] == f"{first.folder.path.name}/model"
    single_file_export.export_model(start, tmp_path / "start.safetensors", torch.float32)
    single_file_export.export_lora(out / "lora", tmp_path / "l.safetensors", torch.float32, "kohya", None)
    with safe_open(tmp_path / "l.safetensors", "pt") as opened:
        assert opened.metadata()["ss_sd_model_name"] == metadata["ss_sd_model_name"]

    here = {"PATH_OF_THE_BASE_MODEL": str(world / "sd15"), '("a prompt")': '("a prompt", num_inference_steps=3)'}
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / "model/README.md").read_text(), re.DOTALL)
    aligned = drawn(snippet, here | {"PATH_OF_THIS_FOLDER": str(out / "model")}).astype(int)
    recipe, manifest = (
        yaml.safe_load((out / "config.yaml").read_text()),
        json.loads((out / "manifest.json").read_text()),
    )
    for place in (start, start / "unet", tmp_path / "start.safetensors"):
        recipe["models"]["init"] = manifest["model"]["init"] = str(place)
        (out / "config.yaml").write_text(yaml.safe_dump(recipe))
        (out / "manifest.json").write_text(json.dumps(manifest))
        text = write_cards(out)[1].read_text()
        assert "trained on top of" in text and "not of the base model" in text
        (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert ("subfolder" in snippet) == (place.name != "unet")
        lora = here | {"PATH_OF_THIS_FOLDER": str(out / "lora"), "PATH_OF_THE_START": str(place)}
        assert np.abs(drawn(snippet, lora) - aligned).max() <= 1, place  # rounding, then 8 bits
        on_base = drawn(re.sub("unet=unet, ", "", snippet), lora)
        assert np.abs(on_base - aligned).max() > 3


MOVED = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name])]


@torch.no_grad()
def predict(unet: torch.nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, hidden = (
        torch.randn(2, 4, 8, 8, generator=draw),
        torch.randn(2, 9, unet.config.cross_attention_dim, generator=draw),
    )
    more = {"text_embeds": torch.randn(2, 96, generator=draw), "time_ids": torch.full((2, 6), 32.0)}
    return unet(x, torch.tensor([10, 600]), hidden, added_cond_kwargs=more).sample


def test_a_merged_lora_on_random_weights_stands_on_those_that_it_was_trained_on(monkeypatch):
    """Drawn in bf16 they are others than drawn in fp32."""
    small = {"block_out_channels": (32,) * 4, "cross_attention_dim": 64}
    monkeypatch.setitem(unet_family.UNETS, "sd15", unet_family.UNETS["sd15"] | small)
    monkeypatch.setattr(unet_family, "VAE", unet_family.VAE | {"block_out_channels": (32,) * 4})
    monkeypatch.setattr(unet_family, "CLIP_L", unet_family.CLIP_L | {"hidden_size": 48, "num_hidden_layers": 1})
    config = ModelsConfig(random="sd15", precision="bf16", lora=LoraSettings(rank=2))
    models = Models(open_pipeline(config), torch.device("cpu"), config)
    base = open_pipeline(config).unet.float().state_dict()
    same(output_pipeline(models).unet.state_dict(), base)  # an untrained adapter adds nothing


# ---- docs/hand-over.md ----------------------------------------------------------------------------------------------
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def places(world, runs):
    """What stands in the document -> what stands for it here."""
    for kind, mode in RUNS[:3]:
        runs(kind, mode)
    here = {
        "runs/sd15/model": "runs/sd15-full-fp32/model",
        "runs/sdxl/model": "runs/sdxl-full-bf16/model",
        "runs/sd15-lora/lora": "runs/sd15-lora-fp32/lora",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
        "lllyasviel/control_v11f1p_sd15_depth": "sd15-control",
        "lllyasviel/control_v11p_sd15_canny": "sd15-control",
        "diffusers/controlnet-depth-sdxl-1.0": "sdxl-control",
    }
    here |= {name: name for name in ("aligned.safetensors", "aligned-lora.safetensors")}
    here |= {f"{name}.png": f"{name}.png" for name in ("depth", "canny", "picture", "mask")}
    return {f'"{name}"': f'"{world / place}"' for name, place in here.items()} | {
        '"cuda"': '"cpu"',
        "torch.float16": "torch.float32",
        "torch.bfloat16": "torch.float32",
        "steps=50": "steps=3",
    }


@pytest.fixture(scope="module")
def exported(world, places):
    """The document's two commands, run once."""
    (block,) = (text for language, text in BLOCKS if language == "bash")
    here = {old.strip('"'): new.strip('"') for old, new in places.items()}
    for line in block.splitlines():
        program, *arguments = shlex.split(line)[2:]
        assert program == "inpo_fast.export"
        argv, sys.argv = sys.argv, ["export", *(here.get(word, word) for word in arguments)]
        try:
            export_command.main()
        finally:
            sys.argv = argv


def drawn(code: str, here: dict[str, str]) -> np.ndarray:
    for old, new in here.items():
        code = code.replace(old, new)
    assert "runs/sd" not in code.replace("runs/sd15-", "").replace("runs/sdxl-", "")
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    return np.asarray(names["image"])


PYTHON = [text for language, text in BLOCKS if language == "python"]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_snippets_of_the_document(world, bases, places, exported, number):
    """Each runs, and draws something else than with the base in the place of the aligned model."""
    code = PYTHON[number]
    aligned = drawn(code, places)
    kind = "sdxl" if "XL" in code else "sd15"
    base = {f'"runs/{kind}/model"': f'"{world / kind}"', '"aligned.safetensors"': f'"{world / "base.safetensors"}"'}
    if "aligned.safetensors" in code:
        pipeline = bases[kind]
        single_file_export.save(denoiser_of(pipeline).single_file(pipeline), {}, world / "base.safetensors")
    without = drawn(re.sub(r".*load_lora_weights.*\n", "", code), places | base)
    assert aligned.shape == without.shape == (32, 32, 3)
    assert np.abs(aligned.astype(int) - without).max() > 3


def test_the_document_covers_what_it_promises():
    text = "".join(PYTHON)
    for name in ("ControlNet", "XLControlNet", "Inpaint", "XLInpaint", ""):
        assert re.search(rf"StableDiffusion{name}Pipeline", text)
    assert len(re.findall("depth.png|canny.png", text)) == 3 and text.count("load_lora_weights") == 3


# ---- the model card -------------------------------------------------------------------------------------------------
RATES = {"win_rate": 0.62, "win_rate_low": 0.55, "win_rate_high": 0.7}
RESULT = {"variant": "inpo", "judge": "a-judge", **RATES, "prompts": 40, "seeds": 4, "guards": {}}
START = "the model it started from, sft/model"
CONTROL = {"eps_scale": 1.01, **RATES}


def test_the_card_of_a_run(world, runs):
    run, _ = runs("sd15", "lora-fp32")
    cards = write_cards(run.folder.path)
    assert [path.parent.name for path in cards] == ["model", "lora"]
    model, lora = (ModelCard(path.read_text()) for path in cards)
    assert model.data.library_name == "diffusers" and "base_model" not in model.content  # a local base is no hub id
    assert "lora" in lora.data.tags and "lora" not in model.data.tags
    manifest = json.loads((run.folder.path / "manifest.json").read_text())
    for text in (model.text, lora.text):
        assert "no evaluation of this model: it is not known" in text and "wins" not in text
        for cell in (
            "pairs | 42",
            "ties_left_out | 6",
            "models.lora.alpha | 3.0",
            "objective.beta | 2000.0",
            "inversion.steps | 2",
        ):
            assert f"| {cell} |" in text
        assert manifest["config_sha256"] in text and manifest["versions"]["diffusers"] in text
        assert str(world) not in text  # no path of the machine
    (snippet,) = re.findall(r"```python\n(.*?)```", model.text, re.DOTALL)
    steps = {'("a prompt")': '("a prompt", num_inference_steps=3)'}
    model_place = {'"PATH_OF_THIS_FOLDER"': f'"{run.folder.path / "model"}"'}
    assert drawn(snippet, steps | model_place).shape == (32, 32, 3)
    (snippet,) = re.findall(r"```python\n(.*?)```", lora.text, re.DOTALL)
    lora_places = {"PATH_OF_THIS_FOLDER": str(run.folder.path / "lora"), "PATH_OF_THE_BASE_MODEL": str(world / "sd15")}
    lora_places |= steps
    without = drawn(re.sub(r".*load_lora_weights.*\n", "", snippet), lora_places)
    assert np.abs(drawn(snippet, lora_places).astype(int) - without).max() > 3


LICENCE = {"license": "other", "license_name": "some-rail", "license_link": "LICENSE.md"}


def test_the_card_names_base_licence_and_data(tmp_path, world, runs, monkeypatch):
    run, _ = runs("sd15", "lora-fp32")
    shutil.copytree(run.folder.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    config, manifest = (tmp_path / "run" / name for name in ("config.yaml", "manifest.json"))

    def cards(base: str, source: str = "pairs.parquet", init: str | None = None):
        told = json.loads(manifest.read_text())
        told["model"]["base"], told["data"]["source"] = base, source
        manifest.write_text(json.dumps(told))
        recipe = yaml.safe_load(config.read_text())
        recipe["models"]["init"] = init
        config.write_text(yaml.safe_dump(recipe))
        return [ModelCard(path.read_text()).data.to_dict() for path in write_cards(tmp_path / "run")]

    for data in cards("stable-diffusion-v1-5/stable-diffusion-v1-5", "hf://datasets/a-group/pairs@main/data/*.parquet"):
        assert data["license"] == "creativeml-openrail-m" and data["datasets"] == ["a-group/pairs"]
        assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for data in cards("a-group/a-model", init="a-group/its-sft"):  # not among the known ones
        assert "license" not in data and "datasets" not in data and data["base_model"] == "a-group/its-sft"
    assert (
        "Licence: that of the base model, which its folder does not name."
        in (tmp_path / "run/model/README.md").read_text()
    )
    base = tmp_path / "base"
    base.mkdir()
    for text in (f"---\n{yaml.safe_dump(LICENCE)}---\n# A model", "no front matter", "---\n: [\n---\n"):
        (base / "README.md").write_text(text)
        data = cards(str(base))[0]
        assert {key: data.get(key) for key in LICENCE} == (LICENCE if "rail" in text else dict.fromkeys(LICENCE))
    snapshot = tmp_path / "models--a-group--a-model" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    assert cards(str(snapshot))[0]["base_model"] == "a-group/a-model"


def test_the_trainer_writes_the_card_with_its_evaluation(world, monkeypatch):
    (world / "prompts.txt").write_text("a small red circle on a gray background\n")
    out = world / "runs" / "evaluated"
    settings = {"models.base": world / "sd15", "data.source": world / "pairs.parquet", "output": out, "train.steps": 1}
    settings |= {"train.pairs_per_step": 2, "train.micro_batch": 2, "inversion.steps": 1, "method": "dpo"}
    settings |= {"evaluate.prompts": world / "prompts.txt", "evaluate.seeds": 2, "evaluate.sampler_steps": 2}
    monkeypatch.setattr(sys, "argv", ["train", *(f"--{key}={value}" for key, value in settings.items())])
    monkeypatch.setattr(plots, "draw", lambda curve, series: "<svg></svg>")
    train_command.main()
    card, result = (out / "model" / "README.md").read_text(), json.loads((out / "evaluation.json").read_text())
    assert verdict(result) in card and "Diffusion-DPO" in card
    for key, check in result["guards"].items():
        state = {True: "holds", False: "**FAILS**", None: "**cannot decide**"}[check["ok"]]
        assert f"- {NAMES.get(key, key)}: {state}" in card


@pytest.mark.parametrize(
    ("change", "words", "never"),
    [
        ({}, ["is better than its base: it wins 62.0 %", "55.0 to 70.0", "a-judge", "no sanity check was"], "FAILS"),
        (
            {"guards": {"control": CONTROL | {"ok": False}, "diversity_ratio": {"value": 0.9, "ok": True}}},
            [
                "for this judge",
                "BUT these sanity checks fail: negative control",
                "- negative control: **FAILS**",
                "- diversity ratio: holds, 0.9",
            ],
            "all sanity checks hold",
        ),
        ({"win_rate": 0.5, "win_rate_low": 0.45}, ["No difference from the base can be shown"], "is better than"),
        ({"win_rate_low": 0.3, "win_rate": 0.4, "win_rate_high": 0.45}, ["WORSE than its base"], "is better than"),
        (
            {"compared_with": START, "guards": {"control": CONTROL | {"ok": False}}},
            [
                f"is better than {START}, for this judge: it wins",
                "also prefers the start with its noise",
                "The start with",
            ],
            "base with",
        ),
        (
            {"compared_with": START, "win_rate_low": 0.45, "guards": {"diversity_ratio": {"value": None, "ok": None}}},
            [f"No difference from {START}, can be shown", "the start draws one picture", "against the start"],
            "against the base",
        ),
        (
            {"compared_with": START, "win_rate_low": 0.3, "win_rate_high": 0.45},
            [f"is WORSE than {START}: it wins"],
            "its base",
        ),
        ({"variant": "dpo"}, ["no evaluation of this model"], "62.0"),
    ],
)
def test_the_card_claims_what_the_evaluation_says(tmp_path, runs, change, words, never):
    run, _ = runs("sd15", "full-fp32")
    (tmp_path / "model").mkdir()
    for name in ("config.yaml", "manifest.json", "model/model_index.json"):
        (tmp_path / name).write_text((run.folder.path / name).read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps(RESULT | change))
    (card,) = write_cards(tmp_path)
    assert all(word in card.read_text() for word in words) and never not in card.read_text()
    (tmp_path / "evaluation.json").write_text(json.dumps(RESULT | change | {"variant": str(tmp_path / "model")}))
    write_cards(tmp_path)  # the same model, judged later by `python -m inpo_fast.evaluate --model …/model`
    assert "paired comparisons" in card.read_text()


def test_the_sentence_on_the_method_is_made_of_the_settings():
    """Every method with every option that it has: each part of the variant's name once, with its meaning."""
    options = {
        "inversion": [
            {},
            *({"estimator": e, "refinements": 3} for e in ("ddim", "renoise", "fixed-point", "gradient", "random")),
            {"model": "reference", "frozen": True, "grid": "diffusers-0.22"},
            {"estimator": "renoise", "refine_at": "source"},
            {"evaluate_at": "target", "guidance": 7.5, "eta": 0.1, "fp8": True, "grid": "snap"},
        ],
        "objective": [
            {},
            {"error_space": "velocity", "tau_norm": "rms", "label_smoothing": 0.1},
            {"tau_norm": "orthogonal", "winner_preserving": 0.5, "gamma": 2.0},
        ],
        "online": [{"every": 0}, {"every": 5}],
    }
    for method, inversion, objective, online in product(METHODS, *options.values()):
        settings = InversionConfig(**inversion), ObjectiveConfig(**objective)
        config = {"method": method, "inversion": asdict(settings[0]), "objective": asdict(settings[1])}
        family, told = _method(config | {"online": online})
        name = variant_name(method, settings[1], settings[0]) + "-online" * bool(online["every"])
        assert name.startswith(family) and told.startswith(METHODS[family].title)
        parts = re.findall(r" \((\w[\w.-]*)\)(?=;|$)", told)
        assert "-".join([family, *parts]) == name, (name, told)
        assert ("deviates" in told) == (name != family)
    _, told = _method({"method": "inpo", "objective": {}, "inversion": {"estimator": "fixed-point", "refinements": 3}})
    assert told.endswith(
        ", a variant that deviates from the publication: steps of the inversion are refined by fixed-point iteration "
        "(fixed-point); each step of the inversion is refined 3 times (k3)"
    )


def test_the_card_of_a_hub_model_names_it_and_a_variant_is_called_one(tmp_path, runs):
    run, _ = runs("sdxl", "full-bf16")
    (tmp_path / "model").mkdir()
    for name in ("config.yaml", "model/model_index.json"):
        (tmp_path / name).write_text((run.folder.path / name).read_text())
    with pytest.raises(UserError, match=r"the model card in .* cannot be written .*manifest\.json"):
        write_cards(tmp_path)
    manifest = json.loads((run.folder.path / "manifest.json").read_text())
    manifest["model"]["base"], manifest["variant"] = "stabilityai/stable-diffusion-xl-base-1.0", "inpo-rms"
    manifest["data"] |= {"dropped": [f"pair-{i}" for i in range(9)], "filters": {"min_votes": 3}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    card = ModelCard(write_cards(tmp_path)[0].read_text())
    assert card.data.base_model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert "stable-diffusion-xl" in card.data.tags and "StableDiffusionXLPipeline" in card.text
    assert "Method: DDIM-InPO ([arXiv 2503.18454](https://arxiv.org/abs/2503.18454))." in card.text
    assert (
        "| dropped | 9: pair-0," in card.text and "pair-8" not in card.text and "| filters.min_votes | 3 |" in card.text
    )
