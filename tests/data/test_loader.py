"""Windows against the definition: a broken pair leaves its position empty and shifts nothing; draws depend on position,
side and purpose alone.
"""

import io
import logging
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from inpo_fast.data.loader import DataConfig, Item, PairLoader
from inpo_fast.data.order import describe, pair_index
from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.runtime.errors import UserError

SIZE = 8  # pixels a side


def picture(number: int) -> bytes:
    """Another one for each number; no mirror image of itself."""
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE + 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


class Pairs:
    """Pairs 0 … n - 1 in memory. broken: (index, side) whose image is cut short; unreadable: indices without record."""

    ties = 0

    def __init__(self, n: int, broken: set[tuple[int, int]] = frozenset(), unreadable: set[int] = frozenset()):
        self.n, self.broken, self.unreadable = n, broken, unreadable

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> Pair:
        if index in self.unreadable:
            raise BadPair(f"pair-{index}: no image")
        images = [picture(2 * index + side) for side in (0, 1)]
        images = [image[:90] if (index, side) in self.broken else image for side, image in enumerate(images)]
        return Pair(f"pair-{index}", f"prompt {index}", *images)


def loader(source: Pairs, rank: int = 0, world: int = 1, seed: int = 5, **config) -> PairLoader:
    config = {"prompt_dropout": 0.3, "crop": "random", "bad_pair_limit": 1.0, **config}
    return PairLoader(source, DataConfig(**config), resolution=SIZE, seed=seed, rank=rank, world=world)


def content(item: Item) -> tuple:
    sides = [(view.pixels.tobytes(), view.original, view.crop) for view in (item.winner, item.loser)]
    return item.position, item.id, item.prompt, *sides


def contents(source: Pairs, steps: int = 5, pairs_per_step: int = 8, first: int = 0, **options) -> list[list[tuple]]:
    return [[content(i) for i in w] for w in loader(source, **options).steps(first, steps, pairs_per_step)]


def test_clean_windows_hold_every_position_in_order():
    """5 steps of 8 pairs over 10 pairs: 4 epochs."""
    items = [item for window in loader(Pairs(10), prompt_dropout=0.0).steps(0, 5, 8) for item in window]
    assert [item.position for item in items] == list(range(40))
    assert [item.id for item in items] == [f"pair-{pair_index(i, 10, 5)}" for i in range(40)]
    assert [item.prompt for item in items] == [f"prompt {pair_index(i, 10, 5)}" for i in range(40)]
    assert set(Counter(item.id for item in items).values()) == {4}


@pytest.mark.parametrize("fault", ["winner", "loser", "record"])
def test_broken_pair_is_dropped_whole_and_shifts_nothing(caplog, fault):
    broken = Pairs(10, unreadable={3}) if fault == "record" else Pairs(10, broken={(3, fault == "loser")})
    reader = loader(broken)
    with caplog.at_level(logging.WARNING):
        got = [[content(item) for item in window] for window in reader.steps(0, 5, 8)]
    clean = contents(Pairs(10))
    assert got == [[item for item in window if item[1] != "pair-3"] for window in clean]
    assert sum(map(len, got)) == 36
    assert reader.seen == 40
    assert len(reader.dropped) == 4  # once an epoch
    assert all(line.startswith("pair-3: ") for line in reader.dropped)
    assert [record.getMessage() for record in caplog.records] == [f"dropped pair {line}" for line in reader.dropped]


def test_limit_stops_the_run_and_names_the_pair():
    several = Pairs(40, broken={(3, 0), (7, 1), (11, 0)})
    assert len(contents(several, steps=5, bad_pair_limit=0.2)) == 5
    with pytest.raises(
        UserError, match=r"3 of 40 pairs are unusable.*bad_pair_limit=0\.05; last: pair-\d+: .*Mend"
    ) as e:
        contents(several, steps=1, pairs_per_step=40, bad_pair_limit=0.05)
    last = max(i for i in range(40) if pair_index(i, 40, 5) in (3, 7, 11))
    assert f"last: pair-{pair_index(last, 40, 5)}: " in str(e.value)


def test_limit_is_a_share_and_never_stops_at_the_first():
    two = Pairs(40, broken={(3, 0), (7, 1)})
    assert len(contents(two, steps=1, pairs_per_step=40, bad_pair_limit=0.05)[0]) == 38  # 2 of 40 is not more than 5 %
    assert len(contents(Pairs(40, broken={(3, 0)}), steps=1, pairs_per_step=40, bad_pair_limit=0.0)[0]) == 39
    with pytest.raises(UserError, match=r"2 of 40 pairs"):
        contents(two, steps=1, pairs_per_step=40, bad_pair_limit=0.0)


def test_refusal_from_the_source_reaches_the_loop():
    class Damaged(Pairs):
        def read(self, index: int) -> Pair:
            raise UserError("shard cannot be read")

    with pytest.raises(UserError, match="shard cannot be read"):
        contents(Damaged(10))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_see_what_one_process_sees(world):
    source = Pairs(10, broken={(3, 0), (6, 1)})
    together = [contents(source, rank=rank, world=world) for rank in range(world)]
    for step, alone in enumerate(contents(source)):
        assert sorted(item for rank in together for item in rank[step]) == alone


def test_worker_count_and_start_change_nothing():
    source = Pairs(10, broken={(3, 0)})
    alone = contents(source, workers=1)
    assert alone == contents(source, workers=4) == contents(source, workers=0)
    assert alone[3:] == contents(source, first=3)
    assert alone != contents(source, seed=6)
    assert contents(source, first=5) == []


def loads(n: int, **config) -> list[Item]:
    reader = loader(Pairs(20), crop="center", **config)
    return [reader.load(position) for position in range(n)]


def share(events) -> float:
    events = list(events)
    return sum(events) / len(events)


def is_flipped(item: Item, side: int) -> bool:
    view = (item.winner, item.loser)[side]
    source = 2 * int(item.id.removeprefix("pair-")) + side
    plain = np.asarray(Image.open(io.BytesIO(picture(source))))[:, 2 : 2 + SIZE]
    assert np.array_equal(view.pixels, plain) or np.array_equal(view.pixels, plain[:, ::-1])
    return not np.array_equal(view.pixels, plain)


def test_prompt_dropout_has_its_share_and_touches_nothing_else():
    """600 positions at 0.3: standard deviation 0.019. Each epoch of the 20 pairs draws anew."""
    items, full = loads(600, prompt_dropout=0.3), loads(600, prompt_dropout=0.0)
    dropped = [item.prompt == "" for item in items]
    assert abs(share(dropped) - 0.3) < 0.08
    assert all(item.prompt for item in full)
    assert all(not item.prompt for item in loads(30, prompt_dropout=1.0))
    for item, whole, gone in zip(items, full, dropped, strict=True):
        assert item.prompt == ("" if gone else whole.prompt)
        assert content(item)[3:] == content(whole)[3:]
    assert dropped == [item.prompt == "" for item in loads(600, prompt_dropout=0.3)]
    assert dropped != [item.prompt == "" for item in loads(600, prompt_dropout=0.3, seed=6)]
    of_one_pair = [gone for item, gone in zip(items, dropped, strict=True) if item.id == "pair-4"]
    assert len(of_one_pair) == 30
    assert len(set(of_one_pair)) == 2


def test_flips_of_the_two_sides_are_independent():
    """600 positions, standard deviation 0.02: halves, that agree half of the time, with each other and with dropout."""
    items = loads(600, prompt_dropout=0.5)
    winner, loser = ([is_flipped(item, side) for item in items] for side in (0, 1))
    dropped = [item.prompt == "" for item in items]
    for one in (winner, loser):
        assert abs(share(one) - 0.5) < 0.1
    for one, other in ((winner, loser), (winner, dropped), (loser, dropped)):
        assert abs(share(a == b for a, b in zip(one, other, strict=True)) - 0.5) < 0.1
    assert winner != [is_flipped(item, 0) for item in loads(600, seed=6)]
    assert not any(is_flipped(item, side) for item in loads(100, flip=False) for side in (0, 1))


def test_random_crops_of_the_two_sides_are_independent():
    reader = loader(Pairs(20), crop="random")
    crops = [[view.crop for view in (item.winner, item.loser)] for item in map(reader.load, range(300))]
    assert {left for pair in crops for _, left in pair} == {0, 1, 2, 3, 4}
    assert share(a == b for a, b in crops) < 0.4  # five places, the outer two half as likely: 0.22 expected


# ---- reading ahead, and the order by blocks ------------------------------------------------------


class Blocks(Pairs):
    """The same in blocks of unequal length; counts the blocks that a reader with room for `room` of them must load."""

    bytes = 2**40

    def __init__(self, n: int, ends: list[int], room: int = 2, **faults):
        super().__init__(n, **faults)
        self.blocks, self.held, self.room, self.loads = np.array(ends), [], room, 0

    def read(self, index: int) -> Pair:
        block = int(np.searchsorted(self.blocks, index, "right"))
        self.loads += block not in self.held
        self.held = [*[b for b in self.held if b != block][-self.room + 1 :], block]
        return super().read(index)


ENDS = [3, 4, 9, 15, 16, 22, 30, 31, 36, 40, 47]


def test_blocks_are_read_once_an_epoch():
    """47 pairs, 11 blocks in runs of 4 at most, room for two runs; a step of 16 on one thread."""
    source = Blocks(47, ENDS, room=8)
    reader = loader(source, workers=1)
    assert reader.order.blocks_per_run == 4 and describe(reader.order)["shuffle"] == "blocks"
    items = [item for window in reader.steps(0, 2, 16) for item in window]
    assert [item.position for item in items] == list(range(32))
    assert source.loads <= 11
    full = Blocks(47, ENDS, room=8)
    list(loader(full, workers=1, shuffle="full").steps(0, 2, 16))
    assert full.loads > 11


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_one_two_and_four_processes_see_the_same_and_go_on_on_any_other_number(shuffle):
    """8 pairs a step, 12 steps, two epochs: pairs, flips, crops, dropouts by position; a broken pair shifts nothing."""
    faults = {"broken": {(3, 0)}, "unreadable": {20}}
    alone = contents(Blocks(47, ENDS, **faults), steps=12, shuffle=shuffle)
    by_position = {item[0]: item for window in alone for item in window}
    lost = {p for p in range(96) if p not in by_position}
    assert 3 <= len(lost) <= 6
    for before, after in ((1, 4), (2, 1), (4, 2)):
        seen = []
        for world, first, last in ((before, 0, 5), (after, 5, 12)):
            for rank in range(world):
                source = Blocks(47, ENDS, **faults)
                seen += contents(source, steps=last, first=first, rank=rank, world=world, shuffle=shuffle)
        items = [item for window in seen for item in window]
        assert {item[0]: item for item in items} == by_position
        assert len(items) == len(by_position)


def test_read_ahead_and_cache_change_nothing():
    plain = contents(Blocks(47, ENDS), steps=8)
    for config in ({"prefetch_mb": 0}, {"workers": 3, "prefetch_mb": 0}, {"prefetch_mb": 4096}, {"cache_mb": 1}):
        assert contents(Blocks(47, ENDS), steps=8, **config) == plain


@pytest.mark.parametrize(("megabytes", "workers", "most"), [(0, 1, 1), (0, 3, 3), (1, 2, 5)])
def test_read_ahead_is_bounded(megabytes, workers, most):
    """1 MiB holds 5 pairs of 180 pixels. Never more pairs are begun beyond those that were taken."""
    taken, begun, worst = 0, 0, 0

    class Counted(Pairs):
        def read(self, index: int) -> Pair:
            nonlocal begun, worst
            begun += 1
            worst = max(worst, begun - taken)
            return super().read(index)

    config = DataConfig(workers=workers, prefetch_mb=megabytes, crop="random")
    reader = PairLoader(Counted(40), config, resolution=180, seed=0, rank=0, world=1)
    take = reader._take

    def counted(future):
        nonlocal taken
        item = take(future)
        taken += 1
        return item

    reader._take = counted
    assert reader.prefetch == most
    for window in reader.steps(0, 4, 10):
        time.sleep(0.02)
        assert len(window) == 10
    assert most <= worst <= most + 1  # the one that is taken and not yet counted


def test_full_order_over_large_row_groups_is_warned_of(caplog, monkeypatch):
    loader(Blocks(47, ENDS), shuffle="full")
    assert "data.shuffle=full: a row group is read for nearly every pair; take blocks, or keep" in caplog.text
    caplog.clear()
    loader(Blocks(47, ENDS), shuffle="full", cache_mb=1)
    loader(Blocks(47, ENDS))
    loader(Pairs(47), shuffle="full")
    monkeypatch.setenv("RANK", "1")  # the first process says it for all
    loader(Blocks(47, ENDS), shuffle="full")
    assert not caplog.text


def test_reader_that_is_given_up_stops_reading():
    count = []

    class Slow(Pairs):
        def read(self, index: int) -> Pair:
            count.append(index)
            time.sleep(0.01)
            return super().read(index)

    steps = loader(Slow(400)).steps(0, 50, 8)
    next(steps)
    steps.close()
    assert len(count) < 60
