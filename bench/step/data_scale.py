"""How opening and reading grow with the set: made sets of small pairs, each opened in a fresh process.

    python -m bench.step.data_scale [--rows 1000 10000 100000] [--sources parquet folder hpd webdataset]

A pair is two 32 x 32 PNGs of noise, a parquet row group has 1000 of them, a tar shard 10,000. Measured: seconds until
the source is open, resident memory beyond that of the imports after opening and at most while 2000 pairs were read in
training order, and pairs read and decoded a second, by two threads. "parquet, before": any pair after any other and
eight row groups in memory, as inpo_fast read until it knew blocks.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.runtime.errors import command_line

PIXELS, GROUP, SHARD, PAIRS = 32, 1000, 10_000, 2000
BEFORE = "parquet, before"
SOURCES = ("parquet", "folder", "hpd", "webdataset")


def main() -> None:
    parser = command_line("python -m bench.step.data_scale", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000], help="pairs of each set")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=["parquet"])
    parser.add_argument("--folder", help="where the sets are made and removed; default: the system's temporary folder")
    parser.add_argument("--measure", nargs=2, metavar=("SOURCE", "PATH"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(*asked.measure)))
        return
    console = Console(width=120)
    table = Table(
        "source", "pairs", "open, s", "after opening, MiB", "while reading, MiB", "pairs/s", "order", box=MARKDOWN
    )
    for source in asked.sources:
        for rows in asked.rows:
            with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
                path = MAKE[source](Path(folder), rows)
                for way in (source, BEFORE) if source == "parquet" else (source,):
                    table.add_row(way, f"{rows:,}", *in_fresh_process(way, path))
    console.print(table)


def in_fresh_process(source: str, path: Path) -> list[str]:
    command = [sys.executable, "-m", "bench.step.data_scale", "--measure", source, str(path)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    numbers = ("seconds", ".2f"), ("opened", ".0f"), ("reading", ".0f"), ("rate", ",.0f")
    return [*(format(found[name], form) for name, form in numbers), found["order"]]


def measure(source: str, path: str) -> dict:
    """In this process: seconds, MiB beyond the imports', pairs/s."""
    import pyarrow.parquet  # noqa: F401 - counted among the imports

    import inpo_fast.data.parquet
    import inpo_fast.data.webdataset  # noqa: F401

    process = psutil.Process()
    imports = process.memory_info().rss
    begun = time.perf_counter()
    group_mb = 8 * GROUP * 2 * 3.2 / 1024  # eight row groups
    opened = open_source(path, cache_mb=group_mb if source == BEFORE else None)
    config = DataConfig(shuffle="full" if source == BEFORE else "auto", crop="random")
    loader = PairLoader(opened, config, resolution=PIXELS, seed=0, rank=0, world=1)
    seconds = time.perf_counter() - begun
    after = most = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, pairs = time.perf_counter(), min(PAIRS, len(opened))
    read = sum(len(items) for items in loader.steps(0, pairs // 250, 250))
    rate = read / (time.perf_counter() - begun)
    done.set()
    watcher.join()
    mib = 2**20
    order = "full" if loader.order.blocks is None else f"blocks, {loader.order.blocks_per_run} a run"
    memory = {"opened": (after - imports) / mib, "reading": (most - imports) / mib}
    return {"seconds": seconds, "rate": rate, "order": order, **memory}


def pairs(rows: int) -> Iterator[tuple[int, bytes, bytes]]:
    for i in track(range(rows), f"making {rows:,} pairs"):
        generator = np.random.default_rng(i)
        yield i, *(_png(generator) for _ in range(2))


def _png(generator: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def make_parquet(folder: Path, rows: int) -> Path:
    kinds = {"caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary()}
    schema = pa.schema({**kinds, "label_0": pa.float64(), "label_1": pa.float64()})
    with pq.ParquetWriter(folder / "pairs.parquet", schema) as writer:
        held = []
        for i, first, second in pairs(rows):
            held.append((f"a small picture of noise, number {i}", first, second, 1.0, 0.0))
            if len(held) == GROUP or i == rows - 1:
                writer.write_batch(pa.record_batch([pa.array(c, f.type) for c, f in zip(zip(*held), schema)], schema))  # noqa: B905
                held = []
    return folder / "pairs.parquet"


def make_folder(folder: Path, rows: int) -> Path:
    with (folder / "metadata.jsonl").open("w") as listing:
        for i, *images in pairs(rows):
            names = [f"{i // GROUP}/{i}-{side}.png" for side in (0, 1)]
            (folder / str(i // GROUP)).mkdir(exist_ok=True)
            for name, image in zip(names, images, strict=True):
                (folder / name).write_bytes(image)
            record = {"prompt": f"a small picture of noise, number {i}", "chosen": names[0], "rejected": names[1]}
            listing.write(json.dumps(record) + "\n")
    return folder


def make_hpd(folder: Path, rows: int) -> Path:
    listing = make_folder(folder, rows) / "metadata.jsonl"
    records = [json.loads(line) for line in listing.open()]
    listing.unlink()
    records = [{"prompt": r["prompt"], "path1": r["chosen"], "path2": r["rejected"]} for r in records]
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def make_webdataset(folder: Path, rows: int) -> Path:
    tar = None
    for i, first, second in pairs(rows):
        if i % SHARD == 0:
            if tar:
                tar.close()
            tar = tarfile.open(folder / f"{i // SHARD:04d}.tar", "w")  # noqa: SIM115
        about = json.dumps({"prompt": f"a small picture of noise, number {i}", "label": 0}).encode()
        for extension, content in (("0.png", first), ("1.png", second), ("json", about)):
            member = tarfile.TarInfo(f"{i:08d}.{extension}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            tar.members = []
    tar.close()
    return folder


MAKE = {"parquet": make_parquet, "folder": make_folder, "hpd": make_hpd, "webdataset": make_webdataset}

if __name__ == "__main__":
    main()
