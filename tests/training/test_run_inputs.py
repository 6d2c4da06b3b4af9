"""--resume notices that pairs, labels or the model's files are not those that the run began with."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import same_bits, save_recipe, train_in
from tiny_world import pair_table, save_pairs

from inpo_fast.pocket.pairs import write_pairs
from inpo_fast.runtime import content_hash, sealed_json
from inpo_fast.runtime.errors import UserError

NETWORK = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A world with a run of two steps."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "words.txt").write_text("hexagon of gold\n")
    held_out = save_pairs(folder / "held-out.parquet", rows=8)
    save_recipe(
        folder, observe={"held_out": held_out, "held_out_pairs": 2}, optim={"average": "none", "warmup_steps": 1}
    )
    train_in(folder, "run", "--train.steps=2", f"--data.filters.block_list={folder / 'words.txt'}")
    return folder


@pytest.fixture
def world(begun, tmp_path, monkeypatch):
    """A copy of it on another disk, with other times, under the same path as far as the run can see."""
    for name in ("model", "run"):
        shutil.copytree(begun / name, tmp_path / name, copy_function=shutil.copy)
    for path in begun.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    for path in tmp_path.rglob("*"):
        os.utime(path, (10**9, 10**9))
    here, there = str(begun), str(tmp_path)
    for path in (tmp_path / "tiny.yaml", tmp_path / "run" / "config.yaml"):
        path.write_text(path.read_text().replace(here, there))
    return tmp_path


def go_on(world: Path, *extra: str) -> Path:
    words = f"--data.filters.block_list={world / 'words.txt'}"
    return train_in(world, "run", "--train.steps=2", words, "--resume", *extra)


def change_rows(path: Path, change) -> None:
    table = pq.read_table(path)
    pq.write_table(change(table), path, row_group_size=table.num_rows)


def move_a_weight(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, path, {"format": "pt"})


def relabel_all(table: pa.Table) -> pa.Table:
    names = ["label_0" if n == "label_1" else "label_1" if n == "label_0" else n for n in table.column_names]
    return table.rename_columns(names).select(table.column_names)


CHANGES = {
    "rows appended": (
        lambda w: change_rows(w / "pairs.parquet", lambda t: pa.concat_tables([t, t.slice(0, 8)])),
        r"data\.source: 42 pairs when the run began, 49 now",
    ),
    "rows reordered": (
        lambda w: change_rows(w / "pairs.parquet", lambda t: t.take(list(range(len(t)))[::-1])),
        r"data\.source: as many pairs as when the run began, but other ones: the rows of data\.source",
    ),
    "relabelled": (lambda w: change_rows(w / "pairs.parquet", relabel_all), r"data\.source: as many pairs"),
    "network replaced": (lambda w: move_a_weight(w / "model" / NETWORK), r"models\.base \(unet\): not what it was"),
    "text encoder replaced": (
        lambda w: move_a_weight(w / "model/text_encoder/model.safetensors"),
        r"models\.base \(text_encoder\): not what",
    ),
    "scheduler changed": (
        lambda w: (w / "model/scheduler/scheduler_config.json").write_text(
            (w / "model/scheduler/scheduler_config.json").read_text().replace("{", '{\n  "note": 1,', 1)
        ),
        r"models\.base \(scheduler\): not what",
    ),
    "words of a filter": (
        lambda w: (w / "words.txt").write_text("red\n"),
        r"data\.source: 42 pairs when the run began, \d+ now",
    ),
    "held-out pairs": (
        lambda w: change_rows(w / "held-out.parquet", lambda t: t.slice(0, 7)),
        r"observe\.held_out: as many pairs .* rows of observe\.held_out",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_are_refused_by_name_or_accepted(world, change):
    make, words = CHANGES[change]
    make(world)
    before = (world / "run" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=f"--resume: .*{words}.*--accept-changed-inputs") as said:
        go_on(world)
    assert "\n" not in str(said.value) and (world / "run" / "manifest.json").read_bytes() == before
    if change in ("rows appended", "network replaced"):
        if change == "network replaced":
            (world / "run" / "evaluation.json").write_text("{}")  # of a model with parts of the base before
        go_on(world, "--accept-changed-inputs")
        assert not (world / "run" / "evaluation.json").exists()
        (changed,) = json.loads((world / "run" / "manifest.json").read_text())["changed_inputs"]
        then = json.loads(before)["inputs"]
        name = next(name for name in changed if name != "step")
        assert changed["step"] == 2 and changed[name]["then"] == then[name] != changed[name]["now"]
        go_on(world)  # from now on it is what the run has


def test_a_copy_with_other_times_is_the_same(world, begun, capsys):
    """Clusters copy everything to local disks at each start. Also what nothing depends on may change."""
    (world / "model" / "README.md").write_text("about it")
    (world / "model" / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    go_on(world)
    assert same_bits(world / "run", begun / "run", 2) and "warning" not in capsys.readouterr().out


def test_a_copy_under_another_name_is_the_same(world, begun, capsys):
    """Contents count where the manifest knows them; an older one knows names, with and without a slash at the end."""
    (world / "disk").mkdir()
    for name in ("pairs.parquet", "held-out.parquet", "words.txt"):
        shutil.copy(world / name, world / "disk")
    shutil.copytree(world / "model", world / "disk" / "base")
    disk = (f"--data.source={world}/disk/pairs.parquet", f"--models.base={world}/disk/base/")
    disk += (f"--data.filters.block_list={world}/disk/words.txt", f"--observe.held_out={world}/disk/held-out.parquet")
    path = world / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    go_on(world, *disk)
    assert same_bits(world / "run", begun / "run", 2) and "warning" not in capsys.readouterr().out
    assert json.loads(path.read_text())["inputs"] == manifest["inputs"]
    go_on(world)  # and back

    change_rows(world / "disk" / "pairs.parquet", relabel_all)
    move_a_weight(world / "disk" / "base" / VAE)
    with pytest.raises(UserError, match=r"data\.source: as many pairs .*; models\.base \(vae\): not what.*--accept-ch"):
        go_on(world, *disk)

    old = {name: value for name, value in manifest.items() if name not in ("inputs", "sha256")}
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"data\.source is .*disk/pairs.*, accept it with --accept-changed-inputs"):
        go_on(world, *disk)
    go_on(world, f"--models.base={world / 'model'}/")
    path.write_text(json.dumps(old))
    go_on(world, *disk, "--accept-changed-inputs")
    (changed,) = json.loads(path.read_text())["changed_inputs"]
    assert changed["data.source"]["now"] == {"content": f"{world}/disk/pairs.parquet"}


def test_a_listing_and_its_pictures_may_move(world):
    for number, row in enumerate(pair_table(6).to_pylist()):
        for side in "01":
            (world / f"{number}-{side}.png").write_bytes(row[f"jpg_{side}"])
    records = [{"prompt": f"circle {n}", "path1": f"{n}-0.png", "path2": f"{n}-1.png"} for n in range(6)]
    (world / "list.json").write_text(json.dumps(records))
    train_in(world, "listed", "--train.steps=1", f"--data.source={world / 'list.json'}")
    (world / "pictures").mkdir()
    for path in world.glob("?-?.png"):
        path.rename(world / "pictures" / path.name)
    (world / "list.json").rename(world / "moved.json")
    words = (f"--data.source={world / 'moved.json'}", f"--data.images={world / 'pictures'}/")
    train_in(world, "listed", "--train.steps=1", "--resume", *words)
    (world / "pictures" / "3-1.png").write_bytes(b"another")
    with pytest.raises(UserError, match=r"other ones: the pictures of data\.source"):
        train_in(world, "listed", "--train.steps=1", "--resume", *words)


def test_other_held_out_pairs_are_told(world, capsys):
    """The key is free, but one curve must not be taken for that of one set; nor may the set be the training pairs."""
    other = save_pairs(world / "other.parquet", rows=16)
    manifest = json.loads((world / "run" / "manifest.json").read_text())
    go_on(world, f"--observe.held_out={other}")
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: observe.held_out has other pairs than before: held_out_ metrics up to step 2 and after" in said
    (changed,) = json.loads((world / "run" / "manifest.json").read_text())["changed_inputs"]
    then = changed["observe.held_out"]["then"]
    assert changed["step"] == 2 and then == manifest["inputs"]["observe.held_out"] != changed["observe.held_out"]["now"]
    shutil.copy(world / "pairs.parquet", world / "copy.parquet")
    write_pairs(relabel_all(pq.read_table(world / "pairs.parquet")), world / "turned.parquet")
    for name in ("copy", "turned"):
        with pytest.raises(UserError, match=r"observe\.held_out has the very pictures of data\.source"):
            train_in(world, "new", f"--observe.held_out={world / name}.parquet")
        assert not (world / "new").exists()


def test_a_run_of_before_goes_on_with_a_warning(world, capsys):
    manifest = json.loads((world / "run" / "manifest.json").read_text())
    old = {name: value for name, value in manifest.items() if name not in ("inputs", "sha256")}
    (world / "run" / "manifest.json").write_text(json.dumps(old, indent=1))
    go_on(world)
    said = " ".join(capsys.readouterr().out.split())
    assert "manifest.json does not say what the run began with" in said
    assert "inputs" in json.loads((world / "run" / "manifest.json").read_text())


def test_a_damaged_manifest_is_refused(world):
    path = world / "run" / "manifest.json"
    path.write_text(path.read_text().replace('"variant": "inpo"', '"variant": "inpq"'))
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*--accept-changed-inputs"):
        go_on(world)
    go_on(world, "--accept-changed-inputs")
    sealed_json.loads(path.read_bytes())


def test_the_switch_is_of_resume(world):
    with pytest.raises(UserError, match="--accept-changed-inputs is of --resume"):
        train_in(world, "new", "--accept-changed-inputs")


def test_labels_and_lora_count(world):
    """A sidecar made anew, and another LoRA under the same path, are noticed."""
    from tiny_runs import run_command

    sidecar, lora = world / "labels.parquet", world / "lora-run" / "lora"
    relabel = ("--source", str(world / "pairs.parquet"), "--judge", "pocket-rules", "--output", str(sidecar))
    run_command("inpo_fast.relabel", *relabel)
    train_in(world, "lora-run", "--train.steps=1", "--models.lora.rank=2")
    words = ("labelled", "--train.steps=1", f"--data.labels={sidecar}", "--data.labels_as=soft")
    words += (f"--models.init={lora}",)
    run = train_in(world, *words)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["model"]["reference"] == "models.base with the LoRA of models.init"
    assert {"data.source", "models.init (LoRA)", "models.base (unet)"} <= manifest["inputs"].keys()
    plain = [word for word in words if not word.startswith("--data.labels=")]
    with pytest.raises(UserError, match=r"data\.labels is None but the run .*, accept it with --accept-changed-inputs"):
        train_in(world, *plain, "--resume")
    (world / "disk").mkdir()
    shutil.copy(sidecar, world / "disk" / "moved.parquet")
    shutil.copytree(lora, world / "disk" / "lora")
    moved = (f"--data.labels={world}/disk/moved.parquet", f"--models.init={world}/disk/lora")
    train_in(world, *words, *moved, "--resume")
    run_command("inpo_fast.relabel", *relabel, "--overwrite", "--temperature", "3")
    move_a_weight(lora / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match=r"data\.source: .*the labels of data\.labels.*models\.init \(LoRA\): not what"):
        train_in(world, *words, "--resume")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_that_is_replaced_while_it_trains(world, monkeypatch, precision):
    """In fp32 the parts come from memory, as they were; rounded ones cannot, and a mixture is refused."""
    from inpo_fast.training import loop

    finish, vae = loop.finish, world / "model" / VAE
    before = load_file(vae)

    def late(run):
        move_a_weight(vae)
        return finish(run)

    monkeypatch.setattr(loop, "finish", late)
    words = (f"late-{precision}", "--train.steps=1", f"--models.precision={precision}")
    if precision == "bf16":
        with pytest.raises(UserError, match=r"models\.base \(vae\) was replaced while .*--resume"):
            train_in(world, *words)
        assert not (world / words[0] / "model").exists()
        return
    run = train_in(world, *words)
    copied = load_file(run / "model" / VAE)
    assert all(torch.equal(copied[name], before[name]) for name in before)


def test_hash_of_files_in_blocks(tmp_path, monkeypatch):
    """The same for whoever cuts the file, another for each byte and each name."""
    monkeypatch.setattr(content_hash, "BLOCK", 7)
    monkeypatch.setattr(content_hash, "PIECE", 3)
    path, seen = tmp_path / "a", set()
    for content in (b"", b"1234567", b"12345678", b"12345679", b"22345678"):
        path.write_bytes(content)
        content_hash._known.clear()
        seen.add(content_hash.content_hash({"a": path}))
        seen.add(content_hash.content_hash({"b": path}))
    assert len(seen) == 10
