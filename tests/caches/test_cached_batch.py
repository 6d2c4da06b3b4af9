"""CachedBatch: x_t replayed from records against x_t inverted, bit for bit, and what is computed for it."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from inpo_fast.caches.frozen_steps import FrozenSteps
from inpo_fast.caches.trajectory_replay import OutputRecorder, TrajectoryRecord, TrajectoryReplay
from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.method.inversion import invert
from inpo_fast.method.inversion_schedule import inversion_schedule
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.record_store import RecordStore, digest

GRIDS = product(["exact", "snap", "diffusers-0.20", "diffusers-0.22"], ["source", "target"])
GLOBAL = sorted(set(GRIDS) - {("exact", "target")})
PATHS = [
    DDPMPath.of(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=offset))
    for offset in (0, 1)
]


@pytest.fixture
def nan_in_empty():
    """What is allocated and never written is not a number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def eps(x, time, rows):
    """A prediction that rounds alike in every batch, and depends on x, time and row."""
    wave = torch.cos(time.double() / 300 + rows.double()).float()[:, None, None, None]
    return torch.tanh(1.7 * x + wave) + 0.3 * x.roll(1, -1)


def store(folder: Path) -> RecordStore:
    opened = RecordStore(folder, {})
    opened.start()
    return opened


def replay(
    folder: Path, keys: list[str], outputs: int, dtype: torch.dtype = torch.float32, highest: int = 999
) -> TrajectoryReplay:
    return TrajectoryReplay(store(folder), keys, TrajectoryRecord(highest, outputs, (3, 4, 6), dtype))


LONG = [(grid, 300, torch.bfloat16) for grid in GLOBAL[2::2]]  # one of each of the later diffusers, exact and snap
SHORT = list(product(GLOBAL, [(1, torch.float32), (3, torch.bfloat16), (10, torch.float32)]))


@pytest.mark.parametrize(("levels", "steps", "dtype"), [*((grid, *how) for grid, how in SHORT), *LONG])
def test_replayed_is_inverted(tmp_path, nan_in_empty, levels, steps, dtype):
    """x_t of any t from the answers of the highest trajectory is x_t of its own, bit for bit; v-prediction too."""
    grid, evaluate_at = levels
    t = torch.tensor([333, 0, 999, 1, 640, 100, 99, 2, 101, 902, 1, 500])
    x_0 = torch.randn(len(t), 3, 4, 6, generator=torch.Generator().manual_seed(0))
    narrow = lambda *asked: eps(*asked).to(dtype)  # noqa: E731
    for output in ("epsilon", "v"):
        path = replace(PATHS[1], output=output)

        def schedule_of(t, path=path):
            return inversion_schedule(path, t, steps=steps, grid=grid, evaluate_at=evaluate_at)

        want, _ = invert(narrow, x_0, schedule_of(t), batch=5)
        answers = int(schedule_of(torch.tensor([999])).evaluations[0])
        keys = [digest(f"{output}{i}".encode()) for i in range(len(t))]
        for spent in (len(t) * answers, 0):  # written, then read
            got, evaluations = replay(tmp_path, keys, answers, dtype).x_t(narrow, x_0, t, schedule_of, batch=5)
            assert torch.equal(got, want) and got.dtype == torch.float32 and evaluations == spent


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize(("grid", "evaluate_at"), GLOBAL)
def test_a_lower_trajectory_serves_all_below(tmp_path, nan_in_empty, grid, evaluate_at, steps):
    """Recorded up to the first t that needs as many answers as t = 450 does: each t up to there, bit for bit."""

    def schedule_of(t):
        return inversion_schedule(PATHS[0], t, steps=steps, grid=grid, evaluate_at=evaluate_at)

    counts = schedule_of(torch.arange(1000)).evaluations
    answers = max(1, int(counts[450]))
    top = int((counts >= answers).nonzero()[0])
    t = torch.tensor([450, 0, 449, 99, 100, 300, 1, min(top, 450)])
    x_0 = torch.randn(len(t), 3, 4, 6, generator=torch.Generator().manual_seed(0))
    cached = replay(tmp_path, [digest(b"%d" % i) for i in range(len(t))], answers, highest=top)
    got, spent = cached.x_t(eps, x_0, t, schedule_of, batch=5)
    assert torch.equal(got, invert(eps, x_0, schedule_of(t), batch=5)[0]) and spent == len(t) * answers


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("images", "width"), [(10, 4), (3, 4), (1, 4), (8, 4)])
def test_every_call_has_one_width(tmp_path, frozen, images, width):
    """Whatever is new: as many samples in each call as a compiled graph has; the same x_t, the same count, no record
    of a filled place."""
    t, x_0, sizes = torch.arange(images) * 90, torch.randn(images, 3, 4, 6), []
    keys = [digest(b"%d" % i) for i in range(images)]
    schedule_of = lambda t: inversion_schedule(PATHS[0], t, steps=3)  # noqa: E731

    def counted(x, time, rows):
        sizes.append(len(x))
        return eps(x, time, rows)

    cached = FrozenSteps(store(tmp_path), keys, []) if frozen else replay(tmp_path, keys, 3)
    got, spent = cached.x_t(counted, x_0, t, schedule_of, batch=width, width=width)
    want, evaluations = invert(eps, x_0, schedule_of(t), batch=width)
    assert set(sizes) == {width} and torch.equal(got, want)
    assert spent == (evaluations if frozen else 3 * images)
    if not frozen:
        again = replay(tmp_path, keys, 3)
        assert len(again.store) == images and not again.missing
        assert torch.equal(again.x_t(counted, x_0, t, schedule_of, batch=1)[0], want)


def test_one_image_many_times_in_a_window_is_one_record(tmp_path):
    """Encoded and inverted once, each with its own t."""
    t, keys = torch.tensor([999, 5, 400, 999]), [digest(name) for name in (b"a", b"a", b"b", b"a")]
    kind, x_0 = torch.tensor([0, 0, 1, 0]), torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    schedule_of = lambda t: inversion_schedule(PATHS[0], t, steps=3)  # noqa: E731
    conditioned = lambda x, time, rows: eps(x, time, kind[rows])  # noqa: E731
    cached = replay(tmp_path, keys, 3)
    assert cached.missing == [0, 2]
    latents = cached.x_0([x_0[:1], x_0[1:]], x_0.device)
    assert torch.equal(latents, x_0[kind])
    got, spent = cached.x_t(conditioned, latents, t, schedule_of, batch=2)
    want, _ = invert(conditioned, latents, schedule_of(t), batch=2)
    assert torch.equal(got, want) and spent == 2 * 3 and len(cached.store) == 2
    warm = replay(tmp_path, keys, 3)
    assert warm.missing == [] and torch.equal(warm.x_0([], x_0.device), latents) and warm.hits.tolist() == [1] * 4
    part = replay(tmp_path, [digest(b"c"), *keys], 3)
    assert part.missing == [0] and part.hits.tolist() == [0, 1, 1, 1, 1]
    assert torch.equal(part.x_0([x_0[1:]], x_0.device), torch.cat([x_0[1:], latents]))


@pytest.mark.parametrize("batch", [60, 64, 300])
def test_a_large_window_is_recorded_in_full_batches(tmp_path, batch):
    """700 images: as few calls as groups of whole batches need; the answers of one group are kept at a time."""
    sizes, x_0 = [], torch.zeros(700, 3, 4, 6)
    cached = replay(tmp_path, [digest(b"%d" % i) for i in range(700)], 2)

    def counted(x, time, rows):
        sizes.append(len(x))
        return eps(x, time, rows)

    def schedule_of(t):
        return inversion_schedule(PATHS[0], t, steps=2)

    t = torch.arange(700)
    got, spent = cached.x_t(counted, x_0, t, schedule_of, batch)
    assert torch.equal(got, invert(eps, x_0, schedule_of(t), batch=batch)[0])
    group = max(1, 256 // batch) * batch
    groups = [min(group, 700 - lo) for lo in range(0, 700, group)]
    assert spent == sum(sizes) == 1400 and max(sizes) <= batch
    assert len(sizes) == sum(max(2, -(-2 * images // batch)) for images in groups)
    assert len(list(tmp_path.glob("*.safetensors"))) == {60: 3, 64: 3, 300: 5}[batch]


def test_empty_slots_are_not_recorded():
    """An inversion that fills its batches up with row -1 records the same; one that repeats a row is noticed."""
    recorder = OutputRecorder(eps, torch.tensor([4, 2]), 2)
    x, time = torch.randn(3, 3, 4, 6), torch.tensor([5, 6, 7])
    for rows in ([0, 1, -1], [1, 0, -1]):
        recorder(x, time, torch.tensor(rows))
    want, turned = (eps(x, time, torch.tensor(rows)) for rows in ([4, 2, 2], [2, 4, 2]))
    assert torch.equal(
        recorder.outputs(), torch.stack([torch.stack([want[0], turned[1]]), torch.stack([want[1], turned[0]])])
    )
    recorder(x[:1], time[:1], torch.tensor([0]))
    with pytest.raises(AssertionError, match="planned were 2"):
        recorder.outputs()


def test_a_disk_that_forgets_is_refused(tmp_path, monkeypatch):
    cached = replay(tmp_path, [digest(b"a")], 3)
    monkeypatch.setattr(cached.store, "write", lambda keys, parts: None)
    with pytest.raises(UserError, match="cannot be read back"):
        cached.x_t(
            eps, torch.zeros(1, 3, 4, 6), torch.tensor([5]), lambda t: inversion_schedule(PATHS[0], t, steps=3), 2
        )
