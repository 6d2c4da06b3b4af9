"""Checkpoints: bit-for-bit round trip, exact continuation, and nothing lost when something fails."""

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inpo_fast.config.run import OptimConfig
from inpo_fast.models.master_weights import MasterWeights
from inpo_fast.runtime import sealed_json
from inpo_fast.runtime.errors import UserError
from inpo_fast.training import checkpoint, saved_checkpoint
from inpo_fast.training.checkpoint import Checkpoints
from inpo_fast.training.optim import Average, make_optimizer
from inpo_fast.training.saved_checkpoint import Misfit, State

STEPS = 8


class Tiny:
    """A policy, AdamW and averaged weights; step(n) is the same function of n in every run."""

    def __init__(self, seed: int, width: int = 6):
        torch.manual_seed(seed)
        self.policy = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.LayerNorm(width), torch.nn.SiLU(), torch.nn.Linear(width, 3)
        )
        self.weights = MasterWeights(self.policy.named_parameters())
        config = OptimConfig(lr=0.01, average="last-half")
        self.optimizer = make_optimizer(self.policy.parameters(), config)
        self.average = Average(list(self.policy.parameters()), config, STEPS)

    def step(self, number: int) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
        self.policy(x).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(number)

    def run(self, first: int, last: int) -> "Tiny":
        for number in range(first, last):
            self.step(number)
        return self

    def save(self, folder: Path, step: int, keep: int = 9, milestones: int = 0) -> Path:
        everything = (self.weights, self.optimizer, self.average)
        saving = Checkpoints(folder, keep=keep, milestones=milestones)
        return saving.save(State(step, 1.5 * step, ["pair-3: cut"]), *everything, wait=True)

    def load(self, folder: Path) -> State:
        return saved_checkpoint.load(folder, self.weights, self.optimizer, self.average)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that decides how training goes on."""
        out = dict(self.policy.state_dict())
        for name, parameter in self.policy.named_parameters():
            out |= {f"{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        return out | {f"mean {number}": mean for number, mean in enumerate(self.average.mean)}


def assert_same(one: Tiny, other: Tiny) -> None:
    first, second = one.tensors(), other.tensors()
    assert first.keys() == second.keys()
    assert len(first) == 6 + 6 * 3 + 6  # weights; step and two moments of 6 parameters; averages
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


def test_round_trip_is_bit_for_bit(tmp_path):
    saved, other = Tiny(0).run(0, 5), Tiny(1)
    folder = saved.save(tmp_path / "checkpoints", 5)
    assert folder == tmp_path / "checkpoints" / "step-0005"
    assert other.load(folder) == State(5, 7.5, ["pair-3: cut"])
    assert_same(saved, other)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}  # no pickle


def test_continued_run_equals_the_uninterrupted_one(tmp_path):
    whole = Tiny(0).run(0, STEPS)
    for cut in (1, 4, 5):
        folder = Tiny(0).run(0, cut).save(tmp_path, cut)
        resumed = Tiny(7).run(0, 2)  # other weights and moments: all must be replaced
        resumed.load(folder)
        assert_same(whole, resumed.run(cut, STEPS))


def test_without_average(tmp_path):
    """Before the average begins it is the newest weights; later a checkpoint without one does not do."""
    for steps in (2, STEPS - 1):
        tiny = Tiny(0).run(0, steps)
        state = State(steps, 0.0, [])
        folder = Checkpoints(tmp_path, keep=2).save(state, tiny.weights, tiny.optimizer, None, wait=True)
        other = Tiny(1)
        saved_checkpoint.load(folder, other.weights, other.optimizer, None)
        assert torch.equal(tiny.policy[0].weight, other.policy[0].weight)
    with pytest.raises(Misfit, match=r"step-0007: checkpoint cannot be loaded .*average"):
        other.load(folder)
    other.load(tmp_path / "step-0002")
    assert all(torch.equal(mean, p) for mean, p in zip(other.average.mean, other.policy.parameters(), strict=True))


def test_newest_stay_and_what_is_not_ours_is_left_alone(tmp_path):
    tiny = Tiny(0).run(0, 1)
    assert saved_checkpoint.found(tmp_path / "none") == []
    kept = tiny.save(tmp_path, 50).rename(tmp_path / "step-0050-kept")
    for step in (9, 99, 100, 9999, 10000):
        tiny.save(tmp_path, step, keep=2)
        assert saved_checkpoint.found(tmp_path)[-1].name == f"step-{step:04d}"
    assert [path.name for path in saved_checkpoint.found(tmp_path)] == ["step-9999", "step-10000"]
    assert kept.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"step-9999", "step-10000", "step-0050-kept"}


def test_milestones_stay(tmp_path):
    tiny = Tiny(0).run(0, 1)
    for step in range(2, 14, 2):
        tiny.save(tmp_path, step, keep=1, milestones=4)
    assert [path.name for path in saved_checkpoint.found(tmp_path)] == ["step-0004", "step-0008", "step-0012"]


def test_what_is_written_is_the_state_when_it_was_asked_for(tmp_path, monkeypatch):
    """The training goes on while the background thread writes, and does not change what it writes."""
    held, sha256 = threading.Event(), checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: (held.wait(60), sha256(path))[1])
    tiny, then, other = Tiny(0).run(0, 3), Tiny(0).run(0, 3), Tiny(1)
    saving = Checkpoints(tmp_path, keep=2)
    folder = saving.save(State(3, 0.0, []), tiny.weights, tiny.optimizer, tiny.average)
    tiny.run(3, 5)
    assert not folder.exists()
    saving.check()  # does not wait
    held.set()
    saving.wait()
    other.load(folder)
    assert_same(then, other)
    with pytest.raises(AssertionError):
        assert_same(tiny, other)


def test_one_is_written_at_a_time(tmp_path, monkeypatch):
    held, sha256 = threading.Event(), checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: (held.wait(60), sha256(path))[1])
    tiny, saving = Tiny(0).run(0, 3), Checkpoints(tmp_path, keep=2)
    everything = (tiny.weights, tiny.optimizer, tiny.average)
    saving.save(State(3, 0.0, []), *everything)
    second = threading.Thread(target=saving.save, args=(State(4, 0.0, []), *everything))
    second.start()
    second.join(0.5)
    assert second.is_alive() and [p.name for p in tmp_path.iterdir()] == [".tmp-step-0003"]
    held.set()
    second.join()
    saving.wait()
    assert [p.name for p in saved_checkpoint.found(tmp_path)] == ["step-0003", "step-0004"]


def test_a_large_state_is_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 300)
    tiny, other = Tiny(0).run(0, 3), Tiny(1)
    folder = tiny.save(tmp_path, 3)
    assert len(list(folder.glob("*.safetensors"))) > 2
    other.load(folder)
    assert_same(tiny, other)


def test_same_step_again_replaces_it(tmp_path):
    Tiny(0).run(0, 1).save(tmp_path, 4)
    second = Tiny(1).run(0, 4)
    second.save(tmp_path, 4)
    other = Tiny(2)
    other.load(saved_checkpoint.found(tmp_path)[-1])
    assert_same(second, other)


def test_half_written_folder_is_not_found_and_does_not_stop_the_next(tmp_path, monkeypatch):
    first = Tiny(0).run(0, 2)
    first.save(tmp_path, 2)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nobody is left to clean up
        with pytest.raises(UserError, match="step-0004"):
            first.run(2, 4).save(tmp_path, 4)
    half = tmp_path / ".tmp-step-0004"
    assert list(half.glob("*.safetensors"))
    assert [path.name for path in saved_checkpoint.found(tmp_path)] == ["step-0002"]
    (half / "rubbish").write_text("from the crash")
    final = first.save(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"step-0002", "step-0004"}
    assert not (final / "rubbish").exists()


def test_every_file_reaches_the_disk_before_the_rename(tmp_path, monkeypatch):
    order, rename, fsync, sync = [], Path.rename, os.fsync, checkpoint._sync
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (sync(path), order.append(path.name)))
    monkeypatch.setattr(
        os, "fsync", lambda handle: (order.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(Path, "rename", lambda self, to: (order.append("rename"), rename(self, to)))
    final = Tiny(0).run(0, 1).save(tmp_path / "checkpoints", 1)
    before = [name for name in order[: order.index("rename")] if "/" not in name]
    data = {Path(name).name for name in order[: order.index("rename")] if name.endswith(".safetensors")}
    assert before == ["state.json", ".tmp-step-0001"] and data == {p.name for p in final.glob("*.safetensors")}
    assert [name for name in order[order.index("rename") + 1 :] if "/" not in name] == ["checkpoints"]


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "noise": lambda content: bytes(b ^ 0x5A for b in content),
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "missing": None,
}


@pytest.mark.parametrize("pattern", ["*.safetensors", "state.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, pattern, damage):
    before = Tiny(0).run(0, 2)
    before.save(tmp_path, 2)
    (file,) = Tiny(0).run(0, 3).save(tmp_path, 3).glob(pattern)
    content = file.read_bytes()
    if pattern == "state.json" and damage == "one bit":
        content = content.replace(b'"step": 3', b'"step": 7') + bytes(9)  # still JSON but for the bytes at the end
    file.unlink()
    if damage != "missing":
        file.write_bytes(DAMAGE[damage](content))
    warnings, other = [], Tiny(5)
    saved = Checkpoints(tmp_path, keep=2)
    state = saved.load_newest(other.weights, other.optimizer, other.average, warnings.append)
    assert state.step == 2
    assert_same(before, other)
    assert len(warnings) == 1 and "step-0003" in warnings[0] and "continuing from step-0002" in warnings[0]
    assert "\n" not in warnings[0]
    shutil.rmtree(tmp_path / "step-0002")
    with pytest.raises(UserError, match=r"no checkpoint can be loaded: .*step-0003.*--overwrite"):
        saved.load_newest(other.weights, other.optimizer, other.average, warnings.append)


def test_a_step_that_is_not_the_folders_is_damage(tmp_path):
    """Copied or renamed by hand, or a number that flipped before state.json was sealed."""
    Tiny(0).run(0, 2).save(tmp_path, 2)
    Tiny(0).run(0, 3).save(tmp_path, 3).rename(tmp_path / "step-0009")
    warnings, other = [], Tiny(5)
    assert load_newest(other, tmp_path, warnings).step == 2
    assert len(warnings) == 1 and "step-0009" in warnings[0] and "it is of step 3" in warnings[0]


def test_only_listed_shards_are_read(tmp_path):
    """A file that somebody put there is no part of the checkpoint, whatever tensors it has."""
    saved, other = Tiny(0).run(0, 3), Tiny(1)
    folder = saved.save(tmp_path, 3)
    noise = {f"policy/{name}": torch.zeros_like(p) for name, p in saved.policy.named_parameters()}
    save_file(noise, folder / "zz.safetensors")
    save_file(noise, folder / "aa.safetensors")
    other.load(folder)
    assert_same(saved, other)


def test_one_that_cannot_be_loaded_leads_to_the_one_before(tmp_path):
    """Hashes right, content not: the moments of a parameter that nobody knows."""
    good = Tiny(0).run(0, 2)
    good.save(tmp_path, 2)
    folder = Tiny(0).run(0, 3).save(tmp_path, 3)
    state = json.loads((folder / "state.json").read_text())
    (name,) = state["files"]
    tensors = load_file(folder / name)
    tensors["optimizer/unknown/exp_avg"] = torch.zeros(2)
    save_file(tensors, folder / name)
    files = {name: saved_checkpoint.sha256_of(folder / name)}
    del state["sha256"]
    (folder / "state.json").write_text(sealed_json.dumps(state | {"files": files}))
    warnings, other = [], Tiny(5)
    assert load_newest(other, tmp_path, warnings).step == 2
    assert_same(good, other)
    assert len(warnings) == 1 and "step-0003 cannot be loaded" in warnings[0] and "\n" not in warnings[0]


def test_other_settings_do_not_fall_back(tmp_path):
    """An older checkpoint that happens to fit is not what the run with these settings had."""
    Tiny(0).run(0, 2).save(tmp_path, 2)
    Tiny(0, width=7).run(0, 3).save(tmp_path, 3)
    with pytest.raises(Misfit, match=r"step-0003: checkpoint cannot be loaded \(it was saved with other trained"):
        load_newest(Tiny(5), tmp_path, [])


@pytest.mark.parametrize(
    "change", [{"step": 2}, {"seconds": -1}, {"dropped": [3]}, {"numbers": {"a": 1}}, {"files": {"../x": "0" * 64}}]
)
def test_checkpoints_of_before_have_no_seal_and_are_checked_all_the_same(tmp_path, change):
    before = Tiny(0).run(0, 2)
    before.save(tmp_path, 2)
    saved = Tiny(0).run(0, 3)
    folder = saved.save(tmp_path, 3)
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    other = Tiny(5)
    assert load_newest(other, tmp_path, []).step == 3
    assert_same(saved, other)
    (folder / "state.json").write_text(json.dumps(state | change, indent=1))
    assert load_newest(other, tmp_path, []).step == 2
    assert_same(before, other)


def load_newest(tiny: Tiny, folder: Path, warnings: list[str]) -> State:
    saved = Checkpoints(folder, keep=9)
    return saved.load_newest(tiny.weights, tiny.optimizer, tiny.average, warnings.append)


def test_a_damaged_one_further_on_does_not_push_out_the_good_one(tmp_path):
    (file,) = Tiny(0).run(0, 1).save(tmp_path, 9).glob("*.safetensors")
    file.write_bytes(b"damaged")
    good = Tiny(1).run(0, 2)
    good.save(tmp_path, 5, keep=1)
    other = Tiny(5)
    saved = Checkpoints(tmp_path, keep=1)
    assert saved.load_newest(other.weights, other.optimizer, other.average, print).step == 5
    assert_same(good, other)


def test_no_checkpoint_at_all(tmp_path):
    tiny = Tiny(0)
    assert Checkpoints(tmp_path / "none", keep=1).load_newest(tiny.weights, tiny.optimizer, None, print) is None


def test_checkpoint_of_another_model_is_refused(tmp_path):
    folder = Tiny(0, width=7).run(0, 1).save(tmp_path, 1)
    with pytest.raises(UserError, match="step-0001: checkpoint cannot be loaded"):
        Tiny(0).load(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.name != "posix" or os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("room", ["for nothing", "for half the shard", "for the shard but not for state.json"])
def test_full_disk_leaves_the_previous_checkpoint(small_disk, tmp_path, room):
    folder = small_disk / "checkpoints"
    good = Tiny(0).run(0, 2)
    good.save(folder, 2)
    bigger = Tiny(0, width=400).run(0, 4)
    free = shutil.disk_usage(small_disk).free
    (shard,) = bigger.save(tmp_path / "elsewhere", 4).glob("*.safetensors")
    pages = -(-shard.stat().st_size // 4096)
    spare = {"for nothing": 0, "for half the shard": pages // 2}.get(room, pages)
    (small_disk / "other").write_bytes(bytes(max(0, free - spare * 4096)))
    with pytest.raises(UserError, match=r"step-0004: checkpoint could not be written .*No space.*--resume"):
        bigger.save(folder, 4, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-0002"]
    other = Tiny(5)
    assert other.load(folder / "step-0002").step == 2
    assert_same(good, other)
