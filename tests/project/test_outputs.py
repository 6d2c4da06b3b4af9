"""What the commands may write over: never what they read, nor what they did not write."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import run_command
from tiny_world import save_pairs

from inpo_fast.evaluate import check_unlike_ours
from inpo_fast.pocket import ASSETS, build
from inpo_fast.report.pictures import MARK, is_sheet
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.outputs import check_free


def refused(capsys, module: str, *words: object) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as end:
        run_command(module, *map(str, words))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    return line


def test_relabel_does_not_replace_its_source(tmp_path, capsys):
    source = tmp_path / "pairs" / "a.parquet"
    source.parent.mkdir()
    save_pairs(source, rows=8)
    (tmp_path / "link.parquet").symlink_to(source)
    shutil.copy(source, tmp_path / "other.parquet")
    before = source.read_bytes()
    judge = ("--judge", "pocket-rules", "--overwrite")
    for given, output, words in (
        (source, source, "is --source"),
        (source, tmp_path / "link.parquet", "is --source"),
        (source.parent, source, "lies in --source"),
        (source.parent, source.parent / "labels.parquet", "would be read as a part of --source"),
        (source.parent / "*.parquet", source.parent / "labels.parquet", "would be read as a part of --source"),
        (source, tmp_path / "other.parquet", "holds no labels of python -m inpo_fast.relabel"),
    ):
        assert words in refused(capsys, "inpo_fast.relabel", "--source", given, "--output", output, *judge)
    assert source.read_bytes() == before == (tmp_path / "other.parquet").read_bytes()
    assert [path.name for path in source.parent.iterdir()] == ["a.parquet"]
    labels = ("--source", source, "--output", tmp_path / "labels.parquet")
    run_command("inpo_fast.relabel", *map(str, labels), *judge)
    run_command("inpo_fast.relabel", *map(str, labels), *judge)  # those it may replace
    assert "is there already; --overwrite" in refused(capsys, "inpo_fast.relabel", *labels, "--judge", "pocket-rules")


def test_export_does_not_replace_what_it_reads(tmp_path, capsys):
    lora = tmp_path / "lora" / "mine.safetensors"
    lora.parent.mkdir()
    lora.write_bytes(b"a LoRA")
    for given in (lora, lora.parent):
        words = ("--lora", given, "--output", lora, "--overwrite")
        assert "which would be overwritten" in refused(capsys, "inpo_fast.export", *words)
    inside = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"weights")
    words = ("--model", tmp_path / "model", "--output", inside, "--overwrite")
    assert "lies in --model" in refused(capsys, "inpo_fast.export", *words)
    assert lora.read_bytes() == b"a LoRA" and inside.read_bytes() == b"weights"


def test_a_sheet_replaces_sheets_alone(tmp_path, capsys):
    (tmp_path / "prompts.png").write_text("a red circle\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "holiday.png")
    words = ("--base", ASSETS / "model", "--model", ASSETS / "model", "--prompts", tmp_path / "prompts.png")
    photo = tmp_path / "holiday.png"
    assert "is there already; --overwrite" in refused(capsys, "inpo_fast.sample", *words, "--output", photo)
    taken = ("--output", tmp_path / "prompts.png", "--overwrite")
    assert "is --prompts" in refused(capsys, "inpo_fast.sample", *words, *taken)
    assert not is_sheet(tmp_path / "holiday.png") and not is_sheet(tmp_path / "prompts.png")
    from inpo_fast.report.pictures import _png

    (tmp_path / "sheet.png").write_bytes(_png(Image.new("RGB", (4, 4))))
    assert is_sheet(tmp_path / "sheet.png") and MARK[1] == "inpo-fast"
    check_free(tmp_path / "sheet.png", False, {}, is_sheet)


@pytest.mark.parametrize("name", ["report.html", "evaluation.json", "samples.png", "comparison.md"])
def test_evaluate_does_not_replace_what_it_did_not_write(tmp_path, capsys, name):
    (tmp_path / name).write_text('{"mine": true}')
    words = ("--model", ASSETS / "model", "--base", ASSETS / "model", "--output", tmp_path, "--evaluate.prompts=p.txt")
    assert f"holds {name}, which neither a run nor" in refused(capsys, "inpo_fast.evaluate", *words)
    for left in ({"evaluation.json": "win_rate"}, {"manifest.json": "config_sha256"}, {"comparison.json": "sampler"}):
        for file, key in left.items():
            (tmp_path / file).write_text(json.dumps({key: 1}))
            check_unlike_ours(tmp_path)
            if file != name:
                (tmp_path / file).unlink()
            else:
                (tmp_path / file).write_text('{"mine": true}')


def a_build(folder: Path, word: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"settings": {}, "sha256": {}}')
    (folder / "pairs.parquet").write_text(word)
    return folder


def test_the_pocket_world_is_replaced_once_it_is_built(tmp_path, capsys, monkeypatch):
    """Never without a word; and until all of it is there, what was there is. The stages themselves take an hour."""
    output = a_build(tmp_path / "assets", "shipped")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    assert "--overwrite replaces it once" in refused(capsys, "inpo_fast.pocket.build", "--output", output)
    only = ("--output", output, "--only", "pairs")
    assert "--overwrite replaces it once" in refused(capsys, "inpo_fast.pocket.build", *only)
    words = ("--output", tmp_path / "mine", "--overwrite")
    assert "was not written by inpo_fast.pocket.build" in refused(capsys, "inpo_fast.pocket.build", *words)

    def stage(aside: Path, fails: bool) -> None:
        assert (output / "pairs.parquet").read_text() == "shipped"
        assert {path.name for path in aside.iterdir()} <= {"manifest.json", "pairs.parquet"}
        (aside / "pairs.parquet").write_text("new")
        (aside / "manifest.json").write_text('{"settings": {}, "sha256": {}}')
        if fails:
            raise KeyboardInterrupt

    for fails in (True, False):
        monkeypatch.setattr(build, "STAGES", {"pairs": lambda aside, fails=fails: stage(aside, fails)})
        monkeypatch.setattr("sys.argv", ["build", "--output", str(output), "--overwrite"])
        if fails:
            with pytest.raises(KeyboardInterrupt):
                build.main()
            assert (output / "pairs.parquet").read_text() == "shipped"
        else:
            build.main()
    assert (output / "pairs.parquet").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assets", "mine"]


def test_an_input_that_is_a_hub_id_or_not_there_is_no_place(tmp_path):
    check_free(tmp_path / "a.png", False, {"--base": "owner/name", "--vae": None})
    (tmp_path / "model").mkdir()
    check_free(tmp_path / "model" / "new.safetensors", False, {"--model": tmp_path / "model"})
    with pytest.raises(UserError, match=r"a\.png is there already"):
        (tmp_path / "a.png").write_text("")
        check_free(tmp_path / "a.png", False, {})
