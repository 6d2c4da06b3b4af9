"""Damaged files against every reader: `python tests/faults/fuzz.py READER --minutes 10`.

Each execution damages a valid file (bits, bytes, cuts, repeats, numbers) and reads all of it. Good are a result, a
UserError, a BadPair or a Damaged; anything else is a finding: it is printed with the seed that makes it again, and the
exit status is 1. A crash of the interpreter is one as well.
"""

import argparse
import json
import logging
import random
import resource
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny_world import pair_table, save_pairs

from inpo_fast.comparison.prompts import read_prompt_set
from inpo_fast.comparison.votes import Votes, cases_of_evaluation
from inpo_fast.config import parse
from inpo_fast.config.run import OptimConfig
from inpo_fast.data.identity import identity_of
from inpo_fast.data.images import decode
from inpo_fast.data.pair import BadPair
from inpo_fast.data.relabelled import METADATA, read_sidecar
from inpo_fast.data.sources import open_source
from inpo_fast.judges.score_file import ScoreFileJudge
from inpo_fast.models.master_weights import MasterWeights
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.record_store import RecordStore
from inpo_fast.training import checkpoint, saved_checkpoint
from inpo_fast.training.optim import make_optimizer

MEMORY = 8 * 2**30  # a length field that was believed would take more
SECONDS = 20  # nor may one damaged file hold a reader for ever


def read_source(path: Path) -> None:
    source = open_source(str(path))
    identity_of(source)
    for index in range(len(source)):
        try:
            pair = source.read(index)
            for image in (pair.winner, pair.loser):
                decode(image, 10**6)
        except BadPair:
            pass


def parquet(folder: Path) -> Path:
    return Path(save_pairs(folder / "pairs.parquet", rows=6))


def images(folder: Path) -> list[str]:
    names = []
    for number, row in enumerate(pair_table(3).to_pylist()):
        for side in "01":
            names.append(f"{number}-{side}.png")
            (folder / names[-1]).write_bytes(row[f"jpg_{side}"])
    return names


def listing(folder: Path) -> Path:
    names = images(folder)
    pairs = zip(names[::2], names[1::2], strict=True)
    lines = [{"prompt": "p", "chosen": chosen, "rejected": rejected, "weight": 0.5} for chosen, rejected in pairs]
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def hpd(folder: Path) -> Path:
    names = images(folder)
    records = [{"prompt": "p", "path1": names[0], "path2": names[1], "confidence": 0.8}]
    records += [{"prompt": "q", "path1": names[2], "path2": names[3], "confidence": 0.5}]
    path = folder / "list.json"
    path.write_text(json.dumps(records))
    return path


def webdataset(folder: Path) -> Path:
    names, path = images(folder), folder / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            (folder / "p.txt").write_text(f"prompt {number}")
            for ending, name in (("0.png", names[2 * number]), ("1.png", names[2 * number + 1])):
                tar.add(folder / name, f"{number}.{ending}")
            (folder / "p.json").write_text(json.dumps({"caption": f"p {number}", "label_0": 1, "label_1": 0}))
            tar.add(folder / "p.json", f"{number}.json")
    return path


def image(folder: Path) -> Path:
    (folder / "a.png").write_bytes(pair_table(1).to_pylist()[0]["jpg_0"])
    return folder / "a.png"


def read_image(path: Path) -> None:
    decode(path.read_bytes(), 10**6)


def sidecar(folder: Path) -> Path:
    about = {"source": "s", "source_identity": "i", "judges": ["j"], "temperature": 1.0}
    table = pa.table({"id": ["a", "b"], "soft": [0.9, 0.4], "hard": [1.0, 0.0]})
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(about).encode()}), folder / "labels.parquet")
    return folder / "labels.parquet"


def scores(folder: Path) -> Path:
    lines = [{"image": f"{i:064x}", "prompt": "p", "score": i / 2, "parts": {"a": 1.0}} for i in range(4)]
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "scores.jsonl"


def pictures(folder: Path) -> Path:
    """Of an evaluation: two models on three prompts, and votes on them."""
    lines = []
    for number, name in enumerate(images(folder)):
        about = {
            "model": "ab"[number % 2],
            "prompt": f"p{number // 2}",
            "seed": 0,
            "file": name,
            "image": f"{number:032x}",
        }
        lines.append(about)
    (folder / "pictures.jsonl").write_text("\n".join(map(json.dumps, lines)))
    votes = Votes(cases_of_evaluation(folder, (), 0), folder / "v.parquet")
    for number, choice in enumerate(("left", "right", "tie")):
        votes.vote(number, choice)
    votes.undo()
    votes.close()
    return folder / "pictures.jsonl"


def vote_log(folder: Path) -> Path:
    pictures(folder)
    return folder / "v.parquet.votes.jsonl"


def read_votes(path: Path) -> None:
    votes = Votes(cases_of_evaluation(path.parent, (), 0), path.parent / "v.parquet")
    try:
        votes.save()
    finally:
        votes.close()


def prompts(folder: Path) -> Path:
    (folder / "prompts.json").write_text(json.dumps(["a red cube", "ein Würfel", "\U0001f600"], ensure_ascii=True))
    return folder / "prompts.json"


class Tiny:
    def __init__(self):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        self.weights = MasterWeights(layer.named_parameters())
        self.optimizer = make_optimizer(self.weights.masters, OptimConfig())
        layer(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()


def saved(folder: Path, pattern: str) -> Path:
    tiny, state = Tiny(), saved_checkpoint.State(3, 1.0, ["x"])
    path = checkpoint.Checkpoints(folder / "c", keep=1).save(state, tiny.weights, tiny.optimizer, None, wait=True)
    return next(path.glob(pattern))


def load_checked(path: Path) -> None:
    tiny = Tiny()
    saved = checkpoint.Checkpoints(path.parent.parent, keep=1)
    saved.load_newest(tiny.weights, tiny.optimizer, None, lambda line: None)


def load_unchecked(path: Path) -> None:
    """Past the hashes: what somebody wrote who knows how to make them."""
    tiny = Tiny()
    saved_checkpoint.load(path.parent, tiny.weights, tiny.optimizer, None)


def shard(folder: Path) -> Path:
    made = RecordStore(folder / "s", {"holds": "numbers"})
    made.start()
    made.write(["a" * 32], {"x": torch.arange(6.0)[None], "y": torch.ones(1, 2, dtype=torch.bfloat16)})
    return next((folder / "s").glob("*.safetensors"))


def read_shard(path: Path) -> None:
    made = RecordStore(path.parent, {"holds": "numbers"})
    for part in "xy":
        made.read(part, ["a" * 32])


def recipe(folder: Path) -> Path:
    text = "method: dpo\ntrain: {steps: 4, micro_batch: 2}\noptim:\n  lr: 1.0e-3\n  betas: [0.9, 0.99]\n"
    (folder / "a.yaml").write_text(text)
    return folder / "a.yaml"


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "parquet": (parquet, read_source),
    "folder": (listing, lambda path: read_source(path.parent)),
    "hpd": (hpd, read_source),
    "webdataset": (webdataset, read_source),
    "image": (image, read_image),
    "labels": (sidecar, lambda path: read_sidecar(str(path))),
    "scores": (scores, ScoreFileJudge),
    "pictures": (pictures, read_votes),
    "votes": (vote_log, read_votes),
    "prompts": (prompts, lambda path: read_prompt_set(str(path))),
    "checkpoint": (lambda folder: saved(folder, "*.safetensors"), load_checked),
    "checkpoint-state": (lambda folder: saved(folder, "state.json"), load_checked),
    "checkpoint-forged": (lambda folder: saved(folder, "*.safetensors"), load_unchecked),
    "shards": (shard, read_shard),
    "config": (recipe, lambda path: parse("fuzz", ["--config", str(path), "--output", "x"])),
}
WORDS = [b"-1", b"0", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"', b"9" * 20, b"\0", b"\xff\xfe", b"../"]


def damaged(content: bytes, draw: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        at = draw.randrange(max(1, len(out)))
        kind = draw.randrange(7)
        if kind == 0 and out:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and out:
            out[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + draw.randrange(1, 64)]
        elif kind == 4:
            out[at:at] = out[at : at + draw.randrange(1, 64)]
        elif kind == 5:
            out[at : at + draw.randrange(4)] = draw.choice(WORDS)
        else:
            width = draw.choice([1, 2, 4, 8])
            number = draw.choice([0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1)])
            out[at : at + width] = number.to_bytes(width, "little")
    return bytes(out)


def fuzz(reader: str, seconds: float, seed: int = 0, most: int | None = None) -> tuple[Counter, list[str]]:
    """How often each kind of end was seen, and the findings."""
    make, read = READERS[reader]
    ends, findings = Counter(), []
    with tempfile.TemporaryDirectory() as name:
        path = make(Path(name))
        content = path.read_bytes()
        read(path)  # the whole file is good
        deadline, number = time.monotonic() + seconds, 0
        while time.monotonic() < deadline and (most is None or number < most):
            draw = random.Random(f"{reader} {seed} {number}")
            path.write_bytes(damaged(content, draw))
            begun = time.monotonic()
            try:
                read(path)
                ends["read"] += 1
            except (UserError, BadPair, saved_checkpoint.Damaged) as problem:
                ends[type(problem).__name__] += 1
                if "\n" in str(problem):
                    findings.append(f"execution {number}: more than a line: {problem}")
            except Exception:
                ends["finding"] += 1
                findings.append(f"execution {number}: {traceback.format_exc(limit=-3)}")
            if time.monotonic() - begun > SECONDS:
                findings.append(f"execution {number}: took {time.monotonic() - begun:.0f} s")
            number += 1
    return ends, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    own = parser.parse_args()
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    ends, findings = fuzz(own.reader, 60 * own.minutes, own.seed)
    for finding in findings[:5]:
        print(finding)
    print(f"{own.reader}: {ends.total()} executions, {dict(ends)}, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
