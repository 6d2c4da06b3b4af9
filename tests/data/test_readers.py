"""Every reader against plain Python lists: random labels, weights, number types, row groups, shards, spellings."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inpo_fast.data.pair import Pair
from inpo_fast.data.sources import open_source

some = settings(max_examples=40, deadline=None, database=None)
# label of the second image; 0.5 is a tie. Sums of a float and its complement are not always 1 to the last bit.
seconds = st.sampled_from([0.0, 1.0, 0.5, 0.3, 0.7, 0.1, 0.999])
weights = st.sampled_from([1.0, 0.0, 0.25, 3.0])
rows = st.lists(st.tuples(seconds, weights), min_size=1, max_size=40).filter(lambda r: any(s != 0.5 for s, _ in r))


def pair(id: str, i: int, second: float, weight: float = 1.0) -> Pair:
    """What row i stands for: images 'first i', 'second i', prompt 'prompt i ü'."""
    images = [b"first %d" % i, b"second %d" % i]
    side = int(second > 0.5)
    return Pair(id, f"prompt {i} ü", images[side], images[1 - side], max(second, 1 - second), weight)


def read_all(source) -> list[Pair]:
    """Backwards, so that nothing can depend on reading in order."""
    return [source.read(i) for i in reversed(range(len(source)))][::-1]


def parquet_table(part: list, start: int, kind: pa.DataType, text: pa.DataType, weighted: bool, shift: int) -> pa.Table:
    """shift: turns the order of the columns; `extra` is never read."""
    numbers = range(start, start + len(part))
    columns = {
        "caption": pa.array([f"prompt {i} ü" for i in numbers], text),
        "extra": ["unread"] * len(part),
        "jpg_0": pa.array([b"first %d" % i for i in numbers], pa.binary()),
        "jpg_1": pa.array([b"second %d" % i for i in numbers], pa.large_binary()),
        "label_0": pa.array([1 - second for second, _ in part], kind),
        "label_1": pa.array([second for second, _ in part], kind),
    }
    if weighted:  # null counts as 1
        columns["weight"] = pa.array([None if weight == 1 else weight for _, weight in part], kind)
    names = list(columns)
    names = names[shift:] + names[:shift]
    return pa.table({name: columns[name] for name in names})


@some
@given(
    parts=st.lists(rows, min_size=1, max_size=3),
    group=st.integers(1, 9),
    kinds=st.lists(st.sampled_from([pa.float64(), pa.float32()]), min_size=3, max_size=3),
    text=st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
    weighted=st.lists(st.booleans(), min_size=3, max_size=3),
    shift=st.integers(0, 6),
    remote=st.booleans(),
    cache=st.sampled_from([None, 1e-6, 1]),
)
def test_parquet(parts, group, kinds, text, weighted, shift, remote, cache):
    expected, ties, start = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        memory = fsspec.filesystem("memory")
        for number, part in enumerate(parts):
            name, kind = f"{number}.parquet", kinds[number]
            table = parquet_table(part, start, kind, text, weighted[number], shift)
            buffer = io.BytesIO()
            pq.write_table(table, buffer, row_group_size=group)
            Path(folder, name).write_bytes(buffer.getvalue())
            memory.pipe(f"/readers/set/{name}", buffer.getvalue())
            for row, (second, weight) in enumerate(part):
                if second != 0.5:
                    id = f"{name}:{row // group}:{row % group}"
                    expected.append(pair(id, start + row, second, weight if weighted[number] else 1.0))
                ties += second == 0.5
            start += len(part)
        try:
            source = open_source("memory://readers/set" if remote else folder, cache_mb=cache)
            got = read_all(source)
        finally:
            memory.rm("/readers", recursive=True)
    assert source.ties == ties
    assert source.blocks[-1] == len(source) == len(expected)
    blocks = [id.rpartition(":")[0] for id in (p.id for p in expected)]
    ends = [i + 1 for i in range(len(blocks)) if i + 1 == len(blocks) or blocks[i + 1] != blocks[i]]
    assert source.blocks.tolist() == ends
    for one, other in zip(got, expected, strict=True):
        assert (one.id, one.prompt, one.winner, one.loser) == (other.id, other.prompt, other.winner, other.loser)
        assert one.label == pytest.approx(other.label, abs=1e-7)  # float32 shares
        assert one.weight == other.weight


def spelled(i: int, second: float, weight: float, spelling: int) -> dict:
    """The forms that metadata.jsonl knows, of the same row."""
    images = [f"first {i}", f"second {i}"]
    side = int(second > 0.5)
    forms = [
        {"prompt": f"prompt {i} ü", "image_0": images[0], "image_1": images[1], "label": second},
        {
            "caption": f"prompt {i} ü",
            "image_0": images[0],
            "image_1": images[1],
            "label_0": 1 - second,
            "label_1": second,
        },
        {
            "prompt": f"prompt {i} ü",
            "chosen": images[side],
            "rejected": images[1 - side],
            "confidence": max(second, 1 - second),
        },
    ]
    return forms[spelling] | ({} if weight == 1 else {"weight": weight})


def write_images(folder: Path, count: int) -> None:
    for i in range(count):
        for side in ("first", "second"):
            (folder / f"{side} {i}").write_bytes(f"{side} {i}".encode())


@some
@given(
    rows=rows,
    spelling=st.integers(0, 2),
    blank=st.integers(0, 2),
    ascii=st.booleans(),
    end=st.booleans(),
    between=st.sampled_from(["\n", "\r\n", " \n"]),
)
def test_folder(rows, spelling, blank, ascii, end, between):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, len(rows))
        lines = [
            "\n" * blank + json.dumps(spelled(i, second, weight, spelling), ensure_ascii=ascii)
            for i, (second, weight) in enumerate(rows)
        ]
        (folder / "metadata.jsonl").write_text(between.join(lines) + "\n" * end, encoding="utf-8", newline="")
        source = open_source(name)
        got = read_all(source)
    expected = [
        pair(f"metadata.jsonl:{(blank + 1) * (i + 1)}", i, second, weight)
        for i, (second, weight) in enumerate(rows)
        if second != 0.5
    ]
    assert got == expected
    assert source.ties == len(rows) - len(expected)


@some
@given(
    rows=rows,
    as_list=st.booleans(),
    second_version=st.booleans(),
    indent=st.sampled_from([None, 2]),
    chunk=st.sampled_from([1, 7, 64, 2**20]),
    ascii=st.booleans(),
    apart=st.booleans(),
)
def test_hpd(rows, as_list, second_version, indent, chunk, ascii, apart):
    """A list is read in chunks of any size, characters of several bytes at their borders too."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("inpo_fast.data.records.CHUNK", chunk)
        images = Path(name, "elsewhere") if apart else Path(name)
        images.mkdir(exist_ok=True)
        write_images(images, len(rows))
        records = []
        for i, (second, weight) in enumerate(rows):
            if second_version:
                shares = {"human_preference": [1 - second, second], "file_path": [f"first {i}", f"second {i}"]}
                records.append({"prompt": f"prompt {i} ü", **shares, "weight": weight})
            else:
                form = spelled(i, second, weight, 2)
                records.append({k.replace("chosen", "path1").replace("rejected", "path2"): v for k, v in form.items()})
        encoded = (
            json.dumps(records, indent=indent, ensure_ascii=ascii)
            if as_list
            else "\n".join(json.dumps(record, ensure_ascii=ascii) for record in records)
        )
        Path(name, "train.json").write_text(encoded, encoding="utf-8")
        source = open_source(str(Path(name, "train.json")), images=str(images) if apart else None)
        got = read_all(source)
    expected = [pair(f"train.json:{i + 1}", i, s, weight) for i, (s, weight) in enumerate(rows) if s != 0.5]
    assert got == expected
    assert source.ties == len(rows) - len(expected)


@some
@given(
    parts=st.lists(rows, min_size=1, max_size=3),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    folder_inside=st.sampled_from(["", "./", "deep/er/", "long/" * 30]),
    order=st.permutations(["0.jpg", "1.png", "json", "extra.txt"]),
    remote=st.booleans(),
)
def test_webdataset(parts, format, folder_inside, order, remote):
    expected, ties, i = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        memory = fsspec.filesystem("memory")
        for number, part in enumerate(parts):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
                for second, weight in part:
                    about = {"prompt": f"prompt {i} ü", "label": second, "weight": weight}
                    contents = {"0.jpg": b"first %d" % i, "1.png": b"second %d" % i, "extra.txt": b"not read"}
                    for extension in order:
                        content = contents.get(extension, json.dumps(about).encode())
                        member = tarfile.TarInfo(f"{folder_inside}{i:06d}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    if second != 0.5:
                        expected.append(pair(f"{number}.tar:{folder_inside}{i:06d}", i, second, weight))
                    ties += second == 0.5
                    i += 1
            Path(folder, f"{number}.tar").write_bytes(buffer.getvalue())
            memory.pipe(f"/readers/set/{number}.tar", buffer.getvalue())
        try:
            source = open_source("memory://readers/set" if remote else folder)
            assert read_all(source) == expected
        finally:
            memory.rm("/readers", recursive=True)
    assert source.ties == ties
