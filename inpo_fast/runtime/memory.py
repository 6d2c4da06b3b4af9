"""How much is computed at once: sizes from counted bytes, and less of it where memory does not suffice after all."""

import logging
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from inpo_fast.runtime.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)
GIB = 2**30
LIMIT = 3 * GIB
MOST = {"cpu": 8, "cuda": 32}
# sizes that are no setting of a run, or have another name in each command
PICTURES, PROMPTS, JUDGED, HELD_OUT = "pictures", "prompts", "judged", "held_out"
WORDS = {
    PICTURES: "pictures to draw",
    PROMPTS: "prompts to encode",
    JUDGED: "pictures and prompts to judge",
    HELD_OUT: "held-out pairs",
}
REMEDY = "models.gradient_checkpointing=true, models.lora.rank=16, optim.kind=adamw-8bit or a smaller data.resolution"


def largest_batch(each: int, kind: str) -> int:
    """Images that a VAE encodes at once on a device of this kind; each: bytes that one of them takes.

    The largest power of two that stays below 3 GiB, at most 32 and on a CPU 8, at least 1. The size decides how an
    image's last bits are rounded, so it is a function of the model and the resolution alone: what happens to be free on
    a card would give another run, or the same one resumed, other bits. 3 GiB is small beside what training takes
    anyway, and should be enough for speed (SD1.5 at 512 px: 8 images in bf16; SDXL at 1024 px: 2): the convolutions of
    a few images have work for a whole GPU.
    """
    most = MOST.get(kind, MOST["cuda"])
    return max(size for size in (1, 2, 4, 8, 16, 32) if size == 1 or (size <= most and size * each <= LIMIT))


class Sizes:
    """The one owner of what memory made smaller, by key: a setting's name, or one of WORDS.

    A run, all that draws with its pipeline, its VAE and its text encoders ask the same one (`sizes_of`); a judge, which
    has weights of its own, has its own. In checkpoints, as sizes decide how results are rounded.
    """

    def __init__(self) -> None:
        self.lowered: dict[str, int] = {}

    def of(self, key: str, asked: int) -> int:
        """How much to compute at once where so much is asked for."""
        return min(asked, self.lowered.get(key, asked))

    def fitting(self, work: Callable[[], T], say: Callable[[str], None] = log.warning) -> T:
        """work(), which asks `of`: again with less where memory does not suffice. say: is told of each halving."""

        def lower(key: str, size: int) -> None:
            self.lowered[key] = size
            what = f"{WORDS[key]} now come in batches of {size}" if key in WORDS else f"{key} is now {size}"
            say(f"out of memory; {what} on this process")

        return with_less(work, lower)


def sizes_of(owner: object) -> Sizes:
    """Those of whatever holds the weights, a pipeline for instance; they live as long as it does."""
    return _SIZES.setdefault(owner, Sizes())


class TooLarge(UserError):
    """Out of memory; `key` is what to lower from `size`. Nothing was reduced over processes yet."""

    def __init__(self, key: str, size: int):
        less = f"{key}={size // 2}, " if size > 1 else ""
        where, remedy = f"at {key}={size}", f"take {less}{REMEDY}"
        if key in WORDS:
            where = f"with {size} of the {WORDS[key]}"
            remedy = "take bf16 (models.precision, --precision) or a larger GPU"
        super().__init__(f"out of memory {where}; {remedy}")
        self.key, self.size = key, size


class fits:
    """TooLarge where what is done inside, `size` at once, runs out of memory.

    No generator: from Python 3.12 on, an exception that contextlib's turns into another keeps its frames, and what did
    not fit with them, until the next search for garbage.
    """

    def __init__(self, key: str, size: int):
        self.key, self.size = key, size

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(problem, torch.OutOfMemoryError):
            raise TooLarge(self.key, self.size) from None


def with_less(work: Callable[[], T], lower: Callable[[str, int], None]) -> T:
    """work(), again after lower(key, half of what was too much) where memory does not suffice. TooLarge at 1."""
    tried: dict[str, int] = {}
    while True:
        try:
            return work()
        except TooLarge as problem:
            key, size = problem.key, problem.size
            if size == 1 or size >= tried.get(key, size + 1):  # or who works does not ask: it would never end
                raise
            tried[key] = size
        if torch.cuda.is_available():  # only out here: until now the traceback kept all alive that did not fit
            torch.cuda.empty_cache()
        lower(key, size // 2)


_SIZES: WeakKeyDictionary[object, Sizes] = WeakKeyDictionary()
