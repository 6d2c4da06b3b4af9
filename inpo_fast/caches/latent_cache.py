"""Latents and text embeddings made beforehand: the views that a run will draw, and its unique prompts.

Flip, crop, prompt dropout and the VAE's noise are functions of (seed, position, side), so what a run sees at a position
is known before it begins. A record holds the latents of both sides as a run would compute them, and what else
an item says (id, prompt, label, weight, sizes); a pair found broken has a record that says so. Training from it
computes what training without it does. Text is kept once for each prompt.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from inpo_fast.data.identity import WORDS, identity_of
from inpo_fast.data.images import View
from inpo_fast.data.loader import DataConfig, Item
from inpo_fast.data.order import FULL_BYTES, Order, make_order
from inpo_fast.data.pair import BadPair, Pair, Source
from inpo_fast.models.denoiser import Text
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.fingerprint import fingerprint, tokenizer_fingerprints
from inpo_fast.runtime.record_store import RecordStore, digest

# what of DataConfig decides a view; the rest is about reading
VIEW = ("shuffle", "crop", "flip", "prompt_dropout", "vae_sample", "max_pixels")

# pairs that are read again when a cache is opened: how many, in how many blocks of the source, how far from each place
SPOTS, SPOT_BLOCKS, NEAR = 16, 4, 64


class LatentCache:
    """Two folders of shards: latents/ by position, text/ by prompt."""

    def __init__(self, folder: Path, models: Models, config: DataConfig, source: Source, resolution: int, seed: int):
        """Reads the index; writes nothing. UserError, naming what differs, where it was made for something else."""
        self.folder, self.resolution = folder, resolution
        self.vae_batch = config.vae_batch or models.vae_batch(resolution)
        common = {"layout": 2, "device": models.device.type, "torch": version("torch")}
        data = asdict(config)
        latents = common | {
            "holds": "latents",
            **{WORDS[name]: value for name, value in identity_of(source).items()},
            "seed": seed,
            "resolution": resolution,
            **{f"data.{name}": data[name] for name in VIEW},
            "vae": fingerprint(models.vae),
            "vae_dtype": str(models.vae_dtype),
            "data.vae_batch": self.vae_batch,  # decides the last bits
            "diffusers": version("diffusers"),
        }
        text = common | {
            "holds": "text",
            "text": [fingerprint(encoder) for encoder in models.encoders],
            "tokenizers": tokenizer_fingerprints(models.pipeline),
            "text_dtype": str(models.dtype),
            "transformers": version("transformers"),
        }
        self.latent_store = RecordStore(folder / "latents", latents)
        self.text_store = RecordStore(folder / "text", text)

    def start(self) -> None:
        """Makes the folders and manifests."""
        for store in (self.latent_store, self.text_store):
            store.start()

    def reopened(self) -> tuple[RecordStore, RecordStore]:
        """Latents and texts as they are on disk now, by whatever process they were written."""
        return tuple(RecordStore(store.folder, store.identity) for store in (self.latent_store, self.text_store))

    def has(self, position: int) -> bool:
        return self._key(position) in self.latent_store

    def item(self, position: int) -> Item | None:
        """The pair at a position, without pixels. BadPair where it was found broken, None where it is not there."""
        key = self._key(position)
        facts = self._facts(position)
        (x_0,) = self.latent_store.read("x_0", [key])
        if facts is None or x_0 is None:
            return None
        if "broken" in facts:
            raise BadPair(facts["broken"])
        views = [View(None, *map(tuple, sizes)) for sizes in facts.pop("views")]
        return Item(position, facts["id"], facts["prompt"], *views, facts["label"], facts["weight"], x_0)

    def check_pairs(self, source: Source, order: Order) -> None:
        """Reads some pairs of the source again, and compares them with their records by content. UserError, naming what
        differs: what `identity_of` cannot see is seen here, where it is many pairs."""
        count = len(self.latent_store)
        blocks = source.blocks if getattr(source, "bytes", 0) > FULL_BYTES else None
        for position in spots(count, blocks, order.index, self.has):
            facts = self._facts(position)
            if facts is None:
                continue  # damaged, and named in a warning
            index = order.index(position)
            try:
                pair = source.read(index)
            except BadPair as problem:
                pair, now = None, [str(problem)]
            else:
                now = content_of(pair)
            if now != facts["content"] or (pair and "label" in facts and _sure(facts) != [pair.label, pair.weight]):
                what = _differing(facts["content"], now) if pair else f"what cannot be read now ({now[0]})"
                raise UserError(
                    f"{self.folder} was made from other pairs: the record of sample {position} "
                    f"({facts.get('id') or facts['broken']}) has {what}; name another folder, or remove this one and "
                    "fill it again"
                )

    def _facts(self, position: int) -> dict | None:
        """What a record says beside its latents."""
        (facts,) = self.latent_store.read("item", [self._key(position)])
        return None if facts is None else json.loads(facts[0].numpy().tobytes().rstrip(b"\0"))

    def add(self, found: list[tuple[int, Item | str]], contents: list[list[str]], x_0: torch.Tensor) -> None:
        """Writes pairs, or what is wrong with them. contents: `content_of` each; x_0: (len(found), 2, C, h, w) fp32."""
        said = [_facts(item) | {"content": content} for (_, item), content in zip(found, contents, strict=True)]
        texts = [json.dumps(facts, ensure_ascii=False).encode() for facts in said]
        longest = max(map(len, texts))
        rows = np.stack([np.frombuffer(text.ljust(longest, b"\0"), np.uint8) for text in texts])
        parts = {"x_0": x_0, "item": torch.from_numpy(rows)[:, None]}
        self.latent_store.write([self._key(position) for position, _ in found], parts)

    def unknown_prompts(self, prompts: list[str]) -> list[str]:
        store = self.text_store
        return [prompt for prompt in dict.fromkeys(prompts) if store.key(prompt.encode()) not in store]

    def add_prompts(self, prompts: list[str], text: Text) -> None:
        parts = {name: x[:, None] for name, x in text.tensors.items()}
        self.text_store.write([self.text_store.key(prompt.encode()) for prompt in prompts], parts)

    def encode_prompts(self, prompts: list[str], models: Models) -> Text:
        """As `Models.encode_prompts`; what is not there is encoded."""
        keys = [self.text_store.key(prompt.encode()) for prompt in prompts]
        known = {name: self.text_store.read(name, keys) for name in models.denoiser.text_names}
        new = [i for i, parts in enumerate(zip(*known.values(), strict=True)) if any(part is None for part in parts)]
        made = models.encode_prompts([prompts[i] for i in new]) if new else None
        for name, rows in known.items():
            for place, i in enumerate(new):
                rows[i] = made.tensors[name][place : place + 1].cpu()
        return Text(**{name: torch.cat(rows).to(models.device, non_blocking=True) for name, rows in known.items()})

    def _key(self, position: int) -> str:
        return self.latent_store.key(str(position).encode())


def open_latent_cache(
    models: Models, config: DataConfig, source: Source, resolution: int, seed: int
) -> LatentCache | None:
    """The cache that data.cache names, None where it names none. UserError where there is nothing."""
    if config.cache is None:
        return None
    latents = LatentCache(Path(config.cache), models, config, source, resolution, seed)
    if not len(latents.latent_store):
        raise UserError(
            f"data.cache={config.cache} holds no latents; fill it first: python -m inpo_fast.cache, with the same "
            "configuration and --data.cache"
        )
    latents.check_pairs(source, make_order(source, config.shuffle, seed))
    return latents


def content_of(pair: Pair | None) -> list[str]:
    """Of the pair that a record is made from: its prompt and both pictures, 16 digits each; [] where it has none."""
    return [] if pair is None else [digest(x)[:16] for x in (pair.prompt.encode(), pair.winner, pair.loser)]


def _differing(there: list[str], here: list[str]) -> str:
    names = ("another prompt", "another better picture", "another worse picture")
    if not there or not here:
        return "no picture that could be read"
    found = [name for name, a, b in zip(names, there, here, strict=True) if a != b]
    return " and ".join(found) or "another label or weight"


def _sure(facts: dict) -> list[float]:
    return [facts["label"], facts["weight"]]


def spots(
    count: int, blocks: np.ndarray | None, index_of: Callable[[int], int], has: Callable[[int], bool]
) -> Iterator[int]:
    """SPOTS positions below `count`, spread evenly; where pairs are read in blocks, in few of these."""
    places = SPOTS if blocks is None else SPOT_BLOCKS
    for place in range(places):
        first = place * count // places
        near = [p for p in range(first, min(first + NEAR, count)) if has(p)]
        if blocks is not None:
            block = [int(np.searchsorted(blocks, index_of(p), "right")) for p in near]
            near = [p for p, own in zip(near, block, strict=True) if own == block[0]]
        yield from near[: SPOTS // places]


def _facts(item: Item | str) -> dict:
    if isinstance(item, str):
        return {"broken": item}
    views = [(view.original, view.crop) for view in (item.winner, item.loser)]
    return {"id": item.id, "prompt": item.prompt, "label": item.label, "weight": item.weight, "views": views}
