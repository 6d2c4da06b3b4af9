"""Which pairs are read, from where, and how an image becomes a training view: the settings, which need no library."""

from dataclasses import dataclass, field
from typing import Literal

Format = Literal["auto", "parquet", "folder", "hpd", "webdataset"]
LabelsAs = Literal["hard", "soft"]
Shuffle = Literal["auto", "full", "blocks"]
MODELS = ("model_0", "model_1")  # of the two images, as Pick-a-Pic v2 names them


@dataclass(frozen=True)
class FilterConfig:
    """Pairs that are left out, and weights by words. Nothing is left out unless it is named here."""

    block_words: tuple[str, ...] = ()
    """Leave out pairs whose prompt has one of these words or phrases (whole words, any case)."""
    block_list: str | None = None
    """A text file of such words or phrases, one a line; lines that begin with # are comments."""
    score: str | None = None
    """Name of a column or field with a number; pairs below min_score are left out, as are those without one."""
    min_score: float = 0.0
    models: tuple[str, ...] = ()
    """Keep only pairs both of whose images were drawn by one of these (model_0, model_1)."""
    min_side: int = 0
    """Leave out pairs with an image whose shorter side has fewer pixels, as it is stored (read from its header)."""
    weights: dict[str, float] = field(default_factory=dict)
    """Word or phrase -> factor of the weight of pairs whose prompt has it, e.g. {"anime": 0.5}; factors multiply."""

    @property
    def active(self) -> bool:
        return bool(self.block_words or self.block_list or self.score or self.models or self.weights or self.min_side)

    @property
    def fields(self) -> tuple[str, ...]:
        """What a filter looks at beside the prompt."""
        return (*((self.score,) if self.score else ()), *(MODELS if self.models else ()))


@dataclass(frozen=True)
class DataConfig:
    """Where the preference pairs come from and how an image becomes a training view."""

    source: str = ""
    """Parquet in the Pick-a-Pic v2 schema, webdataset .tar shards (a file, a folder, a pattern in quotes or an fsspec
    URL such as hf://datasets/NAME), a folder with metadata.jsonl, or a JSON file in the manner of HPDv2 and HPDv3."""
    format: Format = "auto"
    """auto: by what lies there: metadata.jsonl, the endings .json, .jsonl, .parquet, .tar, in this order."""
    images: str | None = None
    """Folder that the image paths of a JSON listing start from. None: the listing's own."""
    labels: str | None = None
    """A sidecar of `python -m inpo_fast.relabel`: judges' labels in place of the source's own. None: the source's."""
    labels_as: LabelsAs = "hard"
    """hard: the better image by the judges (the paper's 5.3). soft: with the probability that it is the better one."""
    shuffle: Shuffle = "auto"
    """full: any pair may follow any other. blocks: parquet row groups are shuffled, and pairs among several of them, so
    that each is read once an epoch. auto: full where pairs can be read alone or all take up to 256 MiB, else blocks."""
    resolution: int | None = None
    """Pixels per side. None: the model's own (UNet sample size times the VAE's factor)."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut out after the short side was resized."""
    flip: bool = True
    """Mirror each image with probability 1/2; the two images of a pair independently (as published)."""
    prompt_dropout: float = 0.0
    """Share of prompts replaced by the empty one. The published script: 0.2; the paper does not mention it."""
    vae_sample: bool = True
    """Draw latents from the VAE's posterior (as published), or take its mean."""
    vae_batch: int | None = None
    """Images that the VAE encodes at once. No effect beyond rounding. None: from the model and the resolution, so that
    it takes at most 3 GiB."""
    max_pixels: int = 50_000_000
    """A larger image is dropped with its pair (decompression bombs)."""
    bad_pair_limit: float = 0.001
    """Stop when more than this share of the pairs read so far had to be dropped (never before the second), or of the
    rows has labels that are none."""
    workers: int = 2
    """Threads that read and decode images."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    cache: str | None = None
    """Folder of latents and text embeddings that `python -m inpo_fast.cache` made for this very configuration."""
    prefetch_mb: int = 1024
    """MiB of decoded views per process that are kept ready for the next steps. No effect on the result."""
    cache_mb: int | None = None
    """MiB of parquet row groups per process that are kept in memory. None: what the order needs. No effect on the
    result; with less, row groups are read again and again."""
