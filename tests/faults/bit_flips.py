"""Every bit of what a resumed run reads, flipped alone: `python tests/faults/bit_flips.py FILE [--every N]`.

FILE is one of state, shard, manifest, config, metrics. A flip is noticed when

- state, shard: the checkpoint is Damaged, so the one before it is taken;
- manifest: --resume refuses in one line;
- config: --resume refuses in one line, or the flip is of no meaning: the settings that count are those of the command
  line, and this file is only compared with them (a key that may differ, or the same value written otherwise);
- metrics: nothing that is computed reads it, so what counts is that no other step's line is lost or changed, and no
  line of the flipped step has another step's number but where the number itself was hit.

Prints flips noticed of flips tried; the exit status is 1 where one was not.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from inpo_fast.config import RunConfig, flat, to_yaml
from inpo_fast.config.run import OptimConfig
from inpo_fast.models.master_weights import MasterWeights
from inpo_fast.runtime import sealed_json
from inpo_fast.runtime.errors import UserError
from inpo_fast.training import checkpoint, run_folder, run_length, saved_checkpoint
from inpo_fast.training.metrics import MetricsFile
from inpo_fast.training.optim import Average, make_optimizer

MANIFEST = {
    "variant": "inpo-rms",
    "config_sha256": "5" * 64,
    "data": {"source": "pairs.parquet", "pairs": 512, "dropped": ["pairs.parquet:0:3"]},
    "model": {"base": "model", "init": None, "reference": "models.base"},
    "inputs": {
        "data.source": {"pairs": 512, "content": "0123456789abcdef" * 2},
        "models.vae": {"content": "f" * 32},
    },
    "continued_from_step": 0,
}


class Tiny:
    """A layer, AdamW with its state, an average: small enough that all bits can be tried."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        layer, config = torch.nn.Linear(3, 2), OptimConfig(average="last-half")
        self.weights = MasterWeights(layer.named_parameters())
        self.optimizer = make_optimizer(self.weights.masters, config)
        self.average = Average(self.weights.masters, config, 1)  # a mean from the second step on
        for step in range(3):
            layer(torch.full((1, 3), step + 1.0)).sum().backward()
            self.optimizer.step()
            self.average.update(step)

    def everything(self) -> list[torch.Tensor]:
        states = [self.optimizer.state[master] for master in self.weights.masters]
        return [*self.weights.masters, *(state[name] for state in states for name in sorted(state)), *self.average.mean]

    def save(self, folder: Path, step: int) -> Path:
        state = saved_checkpoint.State(
            step, 6.021, ["a: cut"], (65536.0, 2), {"bias": {"k": 1.5}}, lowered={"data.vae_batch": 8}
        )
        saving = checkpoint.Checkpoints(folder, keep=9)
        return saving.save(state, self.weights, self.optimizer, self.average, wait=True)


def _checkpoints(folder: Path, pattern: str) -> tuple[Path, Callable[[], bool]]:
    before, saved = Tiny(0), Tiny(1)
    before.save(folder, 2)
    path, other = next(saved.save(folder, 3).glob(pattern)), Tiny(2)
    good = [x.clone() for x in before.everything()]

    def noticed() -> bool:
        """Damaged, in one line. That the one before is what is loaded then is looked at once in a while."""
        try:
            saved_checkpoint.verify(path.parent)
        except saved_checkpoint.Damaged as damage:
            is_line = "\n" not in str(damage)
        else:
            return False
        noticed.calls += 1
        if noticed.calls % 50 == 1:
            warnings: list[str] = []
            load = checkpoint.Checkpoints(folder, keep=9).load_newest
            state = load(other.weights, other.optimizer, other.average, warnings.append)
            same = all(torch.equal(a, b) for a, b in zip(other.everything(), good, strict=True))
            return is_line and state.step == 2 and len(warnings) == 1 and same
        return is_line

    noticed.calls = 0
    return path, noticed


def state(folder: Path) -> tuple[Path, Callable[[], bool]]:
    return _checkpoints(folder, "state.json")


def shard(folder: Path) -> tuple[Path, Callable[[], bool]]:
    return _checkpoints(folder, "*.safetensors")


def _run(folder: Path) -> tuple[RunConfig, run_folder.RunFolder]:
    config = replace(RunConfig(), output=str(folder / "run"), resume=True)
    config = replace(config, data=replace(config.data, source="pairs.parquet"))
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(to_yaml(replace(config, resume=False)))
    (folder / "run" / "manifest.json").write_text(sealed_json.dumps(MANIFEST))
    (folder / "run" / "checkpoints" / "step-0003").mkdir(parents=True)
    return config, run_folder.RunFolder(folder / "run", config)


def manifest(folder: Path) -> tuple[Path, Callable[[], bool]]:
    _, run = _run(folder)
    return folder / "run" / "manifest.json", lambda: _refused(run._read_manifest)


def config(folder: Path) -> tuple[Path, Callable[[], bool]]:
    wanted, run = _run(folder)
    path, asked = folder / "run" / "config.yaml", flat(yaml.safe_load(to_yaml(wanted)))
    free = run_folder.FREE_ON_RESUME

    def noticed() -> bool:
        if _refused(run.check):
            return True
        held = flat(yaml.safe_load(path.read_text(encoding="utf-8")))
        differ = {key for key in asked if held.get(key) != asked[key] and not key.startswith(free)}
        # another length, or end of the schedule, that no step done so far depends on: asked for or not, the same bits
        return differ <= set(run_length.KEYS)

    return path, noticed


def _refused(check: Callable[[], None]) -> bool:
    try:
        check()
    except UserError as refusal:
        assert "\n" not in str(refusal), refusal
        return True
    return False


def metrics(folder: Path) -> tuple[Path, Callable[[], bool]]:
    path = folder / "metrics.jsonl"
    lines = [
        json.dumps({"step": n, "loss": 0.6931471 / n, "grad_norm": 1e-05 * n, "margin": None}) for n in range(1, 7)
    ]
    whole = "".join(f"{line}\n" for line in lines)
    path.write_text(whole)

    def noticed() -> bool:
        before = path.read_bytes().split(b"\n")
        hit = {n for n, line in enumerate(lines) if n >= len(before) or before[n] != line.encode()}
        MetricsFile(path, keep_steps=5).close()
        after = path.read_text(encoding="utf-8").splitlines()
        others = [line for n, line in enumerate(lines[:5]) if n not in hit and n - 1 not in hit]
        return all(line in after for line in others) and all(json.loads(line)["step"] <= 5 for line in after)

    return path, noticed


FILES = {"state": state, "shard": shard, "manifest": manifest, "config": config, "metrics": metrics}


def flips(name: str, every: int = 1) -> Iterator[tuple[int, bool]]:
    """Bit number of the file and whether its flip was noticed, for each `every`-th bit."""
    with tempfile.TemporaryDirectory() as place:
        path, noticed = FILES[name](Path(place))
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), every):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            yield bit, noticed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", choices=[*FILES, "all"])
    parser.add_argument("--every", type=int, default=1, help="only each N-th bit (default: all)")
    own = parser.parse_args()
    logging.disable(logging.CRITICAL)
    failed = False
    for name in FILES if own.file == "all" else [own.file]:
        found = list(flips(name, own.every))
        missed = [bit for bit, noticed in found if not noticed]
        print(f"{name}: {len(found) - len(missed)} of {len(found)} flips noticed {missed[:20] or ''}", flush=True)
        failed |= bool(missed)
    sys.exit(failed)


if __name__ == "__main__":
    main()
