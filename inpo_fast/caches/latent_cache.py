"""Latents and text embeddings made beforehand: the views that a run will draw, and its unique prompts.

Flip, crop, prompt dropout and the VAE's noise are functions of (seed, position, side), so what a run sees at a position
is known before it begins. A record holds the latents of both sides as a run would compute them, and what else
an item says (id, prompt, label, weight, sizes); a pair found broken has a record that says so. Training from it
computes what training without it does. Text is kept once for each prompt.
"""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from inpo_fast.data.identity import WORDS, identity_of
from inpo_fast.data.images import View
from inpo_fast.data.loader import DataConfig, Item
from inpo_fast.data.pair import BadPair, Source
from inpo_fast.models.denoiser import Text
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.fingerprint import fingerprint
from inpo_fast.runtime.record_store import RecordStore

# what of DataConfig decides a view; the rest is about reading
VIEW = ("shuffle", "crop", "flip", "prompt_dropout", "vae_sample", "max_pixels")


class LatentCache:
    """Two folders of shards: latents/ by position, text/ by prompt."""

    def __init__(self, folder: Path, models: Models, config: DataConfig, source: Source, resolution: int, seed: int):
        """Reads the index; writes nothing. UserError, naming what differs, where it was made for something else."""
        self.folder, self.resolution = folder, resolution
        self.vae_batch = config.vae_batch or models.vae_batch(resolution)
        common = {"layout": 1, "device": models.device.type, "torch": version("torch")}
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
        (facts,) = self.latent_store.read("item", [key])
        (x_0,) = self.latent_store.read("x_0", [key])
        if facts is None or x_0 is None:
            return None
        facts = json.loads(facts[0].numpy().tobytes().rstrip(b"\0"))
        if "broken" in facts:
            raise BadPair(facts["broken"])
        views = [View(None, *map(tuple, sizes)) for sizes in facts.pop("views")]
        return Item(position, facts["id"], facts["prompt"], *views, facts["label"], facts["weight"], x_0)

    def add(self, found: list[tuple[int, Item | str]], x_0: torch.Tensor) -> None:
        """Writes pairs, or what is wrong with them; x_0: (len(found), 2, C, h, w) fp32."""
        texts = [json.dumps(_facts(item), ensure_ascii=False).encode() for _, item in found]
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
    return latents


def _facts(item: Item | str) -> dict:
    if isinstance(item, str):
        return {"broken": item}
    views = [(view.original, view.crop) for view in (item.winner, item.loser)]
    return {"id": item.id, "prompt": item.prompt, "label": item.label, "weight": item.weight, "views": views}
