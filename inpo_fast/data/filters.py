"""Which pairs of a source are used, and with what weight: by words of the prompt, a score, the models that drew them,
the size of their images.

Everything is decided when the source is opened, from the records; of images only headers are looked at, and only where
their size matters. What was left out, and why, is counted and stands in the run's manifest.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from inpo_fast.data.config import MODELS, FilterConfig
from inpo_fast.data.identity import identity_of
from inpo_fast.data.images import short_side
from inpo_fast.data.labels import undecided_of
from inpo_fast.data.pair import BadPair, Pair, Source
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import read_text
from inpo_fast.runtime.record_store import digest

READERS, AHEAD = 8, 256  # threads that look at headers (disks are mostly waited for), pairs they are given at a time


class FilteredSource:
    """The pairs of another source that pass. left_out: reason -> pairs; a pair counts under the first that holds."""

    def __init__(self, source: Source, config: FilterConfig):
        words = [*config.block_words, *_block_list(config.block_list)]
        blocked = _pattern(words) if words else None
        factors = [(_pattern([word]), _factor(word, factor)) for word, factor in config.weights.items()]
        keep, weight = np.zeros(len(source), bool), np.ones(len(source))
        self.left_out: dict[str, int] = {}
        self.reweighted = 0
        for index, record in enumerate(_facts(source, config.fields)):
            if reason := _reason(record, config, blocked):
                self.left_out[reason] = self.left_out.get(reason, 0) + 1
                continue
            keep[index] = True
            for pattern, factor in factors:
                if pattern.search(record["prompt"]):
                    weight[index] *= factor
        if config.min_side:
            small = _with_small_image(source, np.flatnonzero(keep), config.min_side)
            keep[small] = False
            if len(small):
                self.left_out[f"image side below {config.min_side}"] = len(small)
        self.source, self.undecided = source, undecided_of(source)
        self.ties = self.undecided.ties
        self.labels = getattr(source, "labels", None)
        self.kept = np.flatnonzero(keep).astype(np.int64)
        self._weight = weight[self.kept]
        self.reweighted = int((self._weight != 1).sum())
        self.blocks = None if source.blocks is None else np.searchsorted(self.kept, source.blocks).astype(np.int64)
        self.bytes = int(source.bytes * len(self.kept) / max(1, len(source)))

    def identity(self) -> dict[str, str]:
        own = digest(self.kept.tobytes(), self._weight.tobytes())
        return identity_of(self.source) | {"pairs": len(self), "filters": own}

    def __len__(self) -> int:
        return len(self.kept)

    def read(self, index: int) -> Pair:
        pair = self.source.read(int(self.kept[index]))
        factor = float(self._weight[index])
        return pair if factor == 1.0 else _weighted(pair, factor)

    def facts(self, fields: Sequence[str]) -> Iterator[dict]:
        """As of the source, of the pairs that are left."""
        records = enumerate(self.source.facts(fields))
        for index in self.kept:
            yield next(record for number, record in records if number == index)


def filtered(source: Source, config: FilterConfig) -> Source:
    """The source itself where nothing is to be left out. UserError where nothing would be left."""
    if not config.active:
        return source
    out = FilteredSource(source, config)
    if not len(out):
        why = ", ".join(f"{n:,} {reason}" for reason, n in out.left_out.items())
        raise UserError(f"data.filters leave none of {len(source):,} pairs ({why}); loosen them")
    return out


def _facts(source: Source, fields: Sequence[str]) -> Iterator[dict]:
    if not hasattr(source, "facts"):
        raise UserError(f"data.filters: a {type(source).__name__} cannot be filtered")
    return source.facts(fields)


def _reason(record: dict, config: FilterConfig, blocked: re.Pattern | None) -> str | None:
    """Why a pair is left out, None where it stays."""
    if blocked is not None and blocked.search(record["prompt"]):
        return "blocked words"
    if config.score:
        score = record[config.score]
        if score is None:
            return f"without {config.score}"
        if not float(score) >= config.min_score:
            return f"{config.score} below {config.min_score:g}"
    if config.models and not all(record[name] in config.models for name in MODELS):
        return "other models"
    return None


def _with_small_image(source: Source, indices: np.ndarray, least: int) -> np.ndarray:
    """Those of the pairs. One that cannot be read is not: it is for the reader to drop it and count it as broken."""

    def is_small(index: int) -> bool:
        try:
            sides = [short_side(image) for image in _images(source, index)]
        except BadPair:
            return False
        return any(side is not None and side < least for side in sides)

    small: list[int] = []
    with ThreadPoolExecutor(READERS) as pool:
        for lo in range(0, len(indices), AHEAD):
            part = indices[lo : lo + AHEAD].tolist()
            small += [index for index, found in zip(part, pool.map(is_small, part), strict=True) if found]
    return np.array(small, np.int64)


def _images(source: Source, index: int) -> Sequence[Path | bytes]:
    """Files where each image is one, so that little more than a header is read; encoded bytes elsewhere."""
    if hasattr(source, "image_files"):
        return source.image_files(index)
    pair = source.read(index)
    return pair.winner, pair.loser


def _pattern(words: Sequence[str]) -> re.Pattern:
    """Any of them as whole words, any case, any white space between the words of a phrase."""
    phrases = (r"\s+".join(re.escape(part) for part in word.split()) for word in words)
    return re.compile(r"(?<!\w)(?:" + "|".join(phrases) + r")(?!\w)", re.IGNORECASE)


def _block_list(path: str | None) -> list[str]:
    if path is None:
        return []
    if git_lfs.is_pointer(Path(path).expanduser()):
        raise UserError(f"data.filters.block_list: {path} {git_lfs.WHAT}")
    try:
        lines = read_text(Path(path).expanduser()).splitlines()
    except (OSError, ValueError) as problem:
        raise UserError(f"data.filters.block_list: {path} cannot be read ({problem})") from problem
    words = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not words:
        raise UserError(f"data.filters.block_list: {path} names no word")
    return words


def _factor(word: str, factor: float) -> float:
    if not (np.isfinite(factor) and factor >= 0):
        raise UserError(f"data.filters.weights: {word!r} has factor {factor}; expected a finite number, not negative")
    return float(factor)


def _weighted(pair: Pair, factor: float) -> Pair:
    return Pair(pair.id, pair.prompt, pair.winner, pair.loser, pair.label, pair.weight * factor)
