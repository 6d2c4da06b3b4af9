"""Tar shards against those that the webdataset package writes and reads; damaged ones are refused by name."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.data.sources import open_source
from inpo_fast.data.webdataset import WebdatasetSource
from inpo_fast.runtime.errors import UserError

ABOUT = {"prompt": "p", "label": 0}


def sample(key: str, about: object = ABOUT, **members: bytes | None) -> list[tuple[str, bytes]]:
    contents = {"0.png": b"first " + key.encode(), "1.png": b"second " + key.encode()}
    contents |= {"json": about if isinstance(about, bytes) else json.dumps(about).encode()}
    contents |= {name.strip("_").replace("_", "."): content for name, content in members.items()}
    return [(f"{key}.{name}", content) for name, content in contents.items() if content is not None]


def save(path: Path, *samples: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in (member for one in samples for member in one):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_shards_written_by_the_webdataset_package(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    expected = []
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{number:04d}.tar")) as writer:
            for i in range(5):
                key, label = f"{number}{i:03d}", (0, 1, 0.5, 0.8, 1)[i]
                images = [b"first " + key.encode(), b"second " + key.encode()]
                about = {"prompt": f"prompt {key}", "label": label, "weight": i}
                writer.write({"__key__": key, "0.jpg": images[0], "1.jpg": images[1], "json": about})
                if label != 0.5:
                    winner, loser = images if label < 0.5 else images[::-1]
                    label = max(label, 1 - label)
                    expected.append(Pair(f"{number:04d}.tar:{key}", f"prompt {key}", winner, loser, label, float(i)))
    source = open_source(str(tmp_path))
    assert isinstance(source, WebdatasetSource) and source.ties == 2 and source.blocks is None
    assert [source.read(i) for i in range(8)] == expected
    assert open_source(str(tmp_path / "*.tar")).read(7) == expected[7]


def test_our_shards_are_read_by_the_webdataset_package(tmp_path):
    """Keys and extensions mean the same to both."""
    webdataset = pytest.importorskip("webdataset")
    path = save(tmp_path / "a.tar", sample("x/000"), sample("x/001"))
    theirs = {s["__key__"]: s for s in webdataset.WebDataset(path, shardshuffle=False)}
    for i, key in enumerate(("x/000", "x/001")):
        ours = open_source(path).read(i)
        assert ours.id == f"a.tar:{key}"
        assert (theirs[key]["0.png"], theirs[key]["1.png"]) == (ours.winner, ours.loser)


def test_folders_links_and_other_members_are_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("ü")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in sample("ü/000", txt=b"not read"):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), {"comment": "x" * 600}
            tar.addfile(member, io.BytesIO(content))
    assert open_source(str(path)).read(0) == Pair("a.tar:ü/000", "p", "first ü/000".encode(), "second ü/000".encode())


def cut(tmp_path: Path, bytes: int) -> str:
    path = Path(save(tmp_path / "a.tar", sample("0"), sample("1", _0_png=b"x" * 30_000)))
    path.write_bytes(path.read_bytes()[:bytes])
    return str(path)


REFUSALS = {
    "cut in an image": (lambda d: cut(d, 20_000), r"a\.tar: not a readable tar \(.*\); download it again or remove it"),
    "cut in a header": (lambda d: cut(d, 3_200), r"a\.tar: not a readable tar"),
    "cut between members": (lambda d: cut(d, 3_072), r"a\.tar: not a readable tar \(its end is missing\)"),
    "compressed": (lambda d: save(d / "a.tar.gz", sample("0")), r"a\.tar\.gz: a compressed tar has no random access"),
    "no image": (
        lambda d: save(d / "a.tar", sample("0"), sample("1", _1_png=None)),
        r"a\.tar:1: no member 1\.1\.<image>",
    ),
    "no JSON": (lambda d: save(d / "a.tar", sample("0", json=None)), r"a\.tar:0: no member 0\.json"),
    "not JSON": (lambda d: save(d / "a.tar", sample("0", b"{")), r"a\.tar:0: not JSON in UTF-8"),
    "no prompt": (lambda d: save(d / "a.tar", sample("0", {"label": 1})), r"a\.tar:0: no text under `prompt`"),
    "not an object": (lambda d: save(d / "a.tar", sample("0", [1])), r"a\.tar:0: no text under `prompt`"),
    "no label": (
        lambda d: save(d / "a.tar", sample("0", {"prompt": ""})),
        r"a\.tar:0: its JSON needs label, or label_0",
    ),
    "text label": (
        lambda d: save(d / "a.tar", sample("0", {"prompt": "", "label": "0"})),
        r"a\.tar:0: label '0'; expec",
    ),
    "twice": (
        lambda d: save(d / "a.tar", sample("0", _0_jpg=b"again")),
        r"a\.tar:0: two members 0\.0; a key names one",
    ),
    "images": (lambda d: (save(d / "a.tar", sample("0")), str(d)), r"data\.images: only a listing"),
    "none": (lambda d: str(d), r"holds no \*\.tar"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_shard_and_the_key(tmp_path, name):
    make, message = REFUSALS[name]
    made = make(tmp_path)
    path, images = made if isinstance(made, tuple) else (made, None)
    with pytest.raises(UserError, match=message) as caught:
        open_source(path, "webdataset", images=images)
    assert "\n" not in str(caught.value)


def test_empty_image_is_a_bad_pair(tmp_path):
    source = open_source(save(tmp_path / "a.tar", sample("0"), sample("1", _0_png=b""), sample("2")))
    with pytest.raises(BadPair, match=r"a\.tar:1: image missing"):
        source.read(1)
    assert source.read(2).id == "a.tar:2"


def test_shard_that_changes_while_it_is_used_is_refused(tmp_path):
    source = open_source(save(tmp_path / "a.tar", sample("0"), sample("1")))
    save(tmp_path / "a.tar", sample("0", _0_png=b"x" * 700), sample("1"))
    with pytest.raises(UserError, match=r"a\.tar:1: changed since it was opened .*; start again"):
        source.read(1)
