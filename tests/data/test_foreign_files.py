"""Folders of other people hold anything: named pipes, sockets, PostScript called .jpg, prompts that are no text."""

import io
import json
import os
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_runs import run_command

from inpo_fast.comparison.picture_store import read_picture
from inpo_fast.comparison.prompts import read_prompt_set
from inpo_fast.data.config import DataConfig, FilterConfig
from inpo_fast.data.identity import identity_of
from inpo_fast.data.images import FORMATS, decode, open_image, png, short_side
from inpo_fast.data.loader import PairLoader, open_data
from inpo_fast.data.pair import BadPair
from inpo_fast.data.sources import open_source
from inpo_fast.judges.cache import ScoreCache
from inpo_fast.judges.score_file import ScoreFileJudge
from inpo_fast.report.pictures import strips
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.record_store import RecordStore

GREY = [png(np.full((16, 16, 3), level, np.uint8)) for level in (90, 200)]


def in_time(function):
    """What it returns or raises, within 20 seconds: whoever waits for a pipe does so for ever."""
    out = []

    def run():
        try:
            out.append((function(), None))
        except BaseException as problem:
            out.append((None, problem))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert out, "still waiting"
    value, problem = out[0]
    if problem is not None:
        raise problem
    return value


def listing(folder: Path, prompts=("a", "b", "c")) -> str:
    for side in (0, 1):
        (folder / f"{side}.png").write_bytes(GREY[side])
    lines = [{"prompt": prompt, "chosen": "0.png", "rejected": "1.png"} for prompt in prompts]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def socket_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        listener.bind(path.name)
    finally:
        os.chdir(here)
        listener.close()


def folder_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize("make", [pipe, socket_at, folder_at])
def test_what_is_no_file_among_the_images_is_a_broken_pair(tmp_path, make, capsys):
    path = listing(tmp_path)
    make(tmp_path / "1.png")
    source = open_source(path)
    with pytest.raises(BadPair, match=r"^metadata\.jsonl:1: '1\.png': "):
        in_time(lambda: source.read(0))
    assert in_time(lambda: identity_of(source))["pairs"] == 3
    assert len(in_time(lambda: open_data(DataConfig(source=path, filters=FilterConfig(min_side=8))))) == 3
    with pytest.raises(SystemExit) as end:
        in_time(lambda: run_command("inpo_fast.validate", "--source", path))
    assert end.value.code == 1 and "none of the 3 pairs" in " ".join(capsys.readouterr().out.split())


READERS = {
    "listing": lambda path: open_source(str(path)),
    "block list": lambda path: open_data(
        DataConfig(source=listing(path.parent), filters=FilterConfig(block_list=str(path)))
    ),
    "labels": lambda path: open_data(DataConfig(source=listing(path.parent), labels=str(path))),
    "prompts": lambda path: read_prompt_set(str(path)),
    "picture": read_picture,
    "scores": ScoreFileJudge,
}


@pytest.mark.parametrize("kind", READERS)
def test_a_pipe_in_the_place_of_a_file_is_one_line(tmp_path, kind):
    path = tmp_path / ("it.json" if kind == "listing" else "it")
    pipe(path)
    with pytest.raises(UserError) as error:
        in_time(lambda: READERS[kind](path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_pipes_in_folders_of_our_own(tmp_path):
    for name in ("scores.jsonl", "1.safetensors", "5.png", "p.parquet"):
        pipe(tmp_path / name)
    with pytest.raises(UserError, match="no regular file"):
        in_time(lambda: ScoreCache(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    assert len(in_time(lambda: RecordStore(tmp_path, {}))) == 0  # named in a warning, as a damaged one
    pipe_of_manifest = tmp_path / "m"
    pipe_of_manifest.mkdir()
    pipe(pipe_of_manifest / "manifest.json")
    with pytest.raises(UserError, match="cannot be read"):
        in_time(lambda: RecordStore(pipe_of_manifest, {}))
    assert in_time(lambda: strips(tmp_path, 10**6)) == []
    with pytest.raises(UserError, match="neither metadata"):
        in_time(lambda: open_source(str(tmp_path)))  # a pipe called .parquet is no parquet


def test_scores_of_a_picture_outside_the_listings_folder_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(GREY[0])
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in" / "own.png").write_bytes(GREY[0])
    pipe(tmp_path / "in" / "pipe.png")
    for name, good in (("own.png", True), ("../secret.png", False), ("link.png", False), ("pipe.png", False)):
        (tmp_path / "in" / "s.jsonl").write_text(json.dumps({"file": name, "prompt": "p", "score": 1}))
        if good:
            assert len(ScoreFileJudge(tmp_path / "in" / "s.jsonl").scores) == 1
            continue
        with pytest.raises(UserError, match=r"s\.jsonl:1: .*cannot be read"):
            in_time(lambda: ScoreFileJudge(tmp_path / "in" / "s.jsonl"))


def saved(format: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 24), (10, 200, 30)).save(out, format)
    return out.getvalue()


def test_no_other_format_is_opened_than_those_of_pictures():
    """Pillow hands EPS to Ghostscript, and has readers of forty kinds of files that no data set is made of."""
    for format in ("EPS", "PCX", "TGA", "SGI", "ICO"):
        with pytest.raises(BadPair, match="not an image of a known format"):
            decode(saved(format), 10**6)
        assert short_side(saved(format)) is None
    for format in FORMATS:
        pixels = np.asarray(decode(saved(format), 10**6))
        assert pixels.shape == (24, 32, 3) and abs(pixels.astype(int) - (10, 200, 30)).max() < 12
        assert open_image(io.BytesIO(saved(format))).size == (32, 24) and short_side(saved(format)) == 24


def test_every_image_is_opened_by_one_function():
    root = Path(__file__).parents[2]
    files = [path for name in ("inpo_fast", "bench", "kernels") for path in (root / name).rglob("*.py")]
    found = [str(path.relative_to(root)) for path in files if "Image.open(" in path.read_text(encoding="utf-8")]
    assert found == ["inpo_fast/data/images.py"]


# ---- prompts


def broken_text(prompt) -> bytes:
    """UTF-8 as other languages write lone surrogates."""
    return prompt.encode("utf-8", "surrogatepass")


def parquet_of(folder, prompts):
    captions = pa.array([None if p is None else broken_text(p) for p in prompts], pa.binary()).view(pa.string())
    columns = {"caption": captions, "jpg_0": [GREY[0]] * len(prompts), "jpg_1": [GREY[1]] * len(prompts)}
    columns |= {"label_0": [1.0] * len(prompts), "label_1": [0.0] * len(prompts)}
    pq.write_table(pa.table(columns), folder / "p.parquet")
    return str(folder / "p.parquet")


def hpd_of(folder, prompts):
    listing(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "t.json").write_text(json.dumps([{"prompt": p, "path1": "0.png", "path2": "1.png"} for p in prompts]))
    return str(folder / "t.json")


def tar_of(folder, prompts):
    with tarfile.open(folder / "0.tar", "w") as out:
        for i, prompt in enumerate(prompts):
            about = json.dumps({"prompt": prompt, "label": 0}).encode()
            for name, content in (("0.png", GREY[0]), ("1.png", GREY[1]), ("json", about)):
                member = tarfile.TarInfo(f"{i}.{name}")
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    return str(folder / "0.tar")


MAKERS = {"parquet": parquet_of, "folder": listing, "hpd": hpd_of, "webdataset": tar_of}
BAD = {"half a character": "an \ud83d owl", "the other half": "\ude00", "NUL": "a\0b", "null": None}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("what", BAD)
def test_prompts_that_are_no_text_are_broken_pairs(tmp_path, kind, what, capsys):
    path = MAKERS[kind](tmp_path, ["good \U0001f600", BAD[what], "fine"])
    config = DataConfig(source=path, shuffle="full", bad_pair_limit=0.4)
    source = open_data(config)
    assert len(source) == 3 and identity_of(source)["pairs"] == 3
    loader = PairLoader(source, config, resolution=16, seed=0, rank=0, world=1)
    items = [item for step in loader.steps(0, 1, 3) for item in step]
    assert sorted(item.prompt for item in items) == ["fine", "good \U0001f600"] and len(loader.dropped) == 1
    assert len(open_data(DataConfig(source=path, filters=FilterConfig(block_words=("fine",))))) == 2
    with pytest.raises(SystemExit) as end:
        run_command(
            "inpo_fast.validate", "--source", path, "--data.bad_pair_limit=0.4", "--json", str(tmp_path / "f.json")
        )
    said = capsys.readouterr().out
    assert not end.value.code and f"broken: {loader.dropped[0]}" in said
    assert len(json.loads((tmp_path / "f.json").read_text())["broken"]) == 1
    loader.dropped[0].encode("utf-8")  # it is written to the manifest


def test_numbers_in_place_of_a_prompt(tmp_path):
    source = open_source(hpd_of(tmp_path, [3, ["a"], {"b": 1}, True, "fine"]))
    for index in range(4):
        with pytest.raises(BadPair, match="no text"):
            source.read(index)
    assert source.read(4).prompt == "fine" and [fact["prompt"] for fact in source.facts(())] == [""] * 4 + ["fine"]


LISTS = {
    "p.json": json.dumps(["good", "bad \ud800"]),
    "p.txt": "good\nbad \0\n",
    "P.tsv": "Prompt\tCategory\ngood\tA\nbad \0\tA\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_prompts_for_an_evaluation(tmp_path, name):
    (tmp_path / name).write_text(LISTS[name])
    with pytest.raises(UserError, match=rf"{name}: prompt 2: the prompt has (half a character|a NUL)") as error:
        read_prompt_set(str(tmp_path / name))
    str(error.value).encode("utf-8")


def test_prompts_of_the_command_line(tmp_path, capfd):
    (tmp_path / "p.txt").write_text("good\nbad \0\n")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("p.txt", "NUL"), ("pipe", "no regular file")):
        with pytest.raises(SystemExit) as end:
            more = ("--prompts", str(tmp_path / name), "--output", str(tmp_path / "o.png"))
            in_time(lambda more=more: run_command("inpo_fast.sample", "--base", "b", "--model", "m", *more))
        assert end.value.code == 2 and words in capfd.readouterr().err


def test_names_in_a_tar_that_are_no_utf8(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as out:
        for name, content in (("é.0.png", GREY[0]), ("é.1.png", GREY[1]), ("é.json", b'{"prompt": "p", "label": 0}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    source = open_source(str(path))
    assert source.id(0) == "0.tar:\\udce9" and source.read(0).winner == GREY[0] and identity_of(source)["pairs"] == 1


# ---- places that are given, but empty


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_place_is_not_the_current_folder(tmp_path, monkeypatch, empty):
    parquet_of(tmp_path, ["a"])
    monkeypatch.chdir(tmp_path)
    assert len(open_source(".")) == 1
    for read in (open_source, read_prompt_set, lambda path: open_data(DataConfig(source=path))):
        with pytest.raises(UserError, match="is empty"):
            read(empty)


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("vote", "--pictures"),
        ("vote", "--output"),
        ("validate", "--source"),
        ("relabel", "--judge"),
        ("sample", "--vae"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_an_option_that_is_given_empty_is_refused(tmp_path, monkeypatch, capfd, command, option, empty, joined):
    monkeypatch.chdir(tmp_path)
    words = [f"{option}={empty}"] if joined else [option, empty]
    with pytest.raises(SystemExit) as end:
        run_command(f"inpo_fast.{command}", *words)
    said = capfd.readouterr().err
    assert end.value.code == 2 and f"argument {option}: is empty; give it a value or leave it out" in said
    assert said.count("\n") == 1


def test_a_line_that_is_nested_without_end_is_no_json(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"metadata.jsonl:1: not JSON"):
        open_source(str(tmp_path))
