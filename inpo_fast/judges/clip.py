"""CLIP-style judges: 100 cos(image, text), with transformers alone (no torchvision).

CLIP-H, PickScore and the pocket's own are CLIPModels as they are; HPS v2 is one with OpenCLIP's names, its own way to
scale pictures and its own cleaning of prompts. On a GPU they compute in bf16, on the CPU in fp32.
"""

import html
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from inpo_fast.judges import Scores
from inpo_fast.judges.open_clip import clip_model, read_state
from inpo_fast.judges.preprocess import letterbox
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.fingerprint import fingerprint, tokenizer_fingerprint
from inpo_fast.runtime.memory import JUDGED, Sizes, fits

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
ToPixels = Callable[[Sequence[np.ndarray]], torch.Tensor]  # (H, W, 3) uint8 each -> (N, 3, side, side) fp32


class ClipScorer:
    """Any image and text tower with a common space. Subclasses open the model."""

    tie = 1e-6

    def __init__(
        self,
        name: str,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        pixels: ToPixels,
        device: torch.device | str,
        batch: int,
        how: str = "",
    ):
        """how: what decides the pixels and tokens, in words; part of the id."""
        self.name, self.device, self.batch, self.how = name, torch.device(device), batch, how
        self.dtype, self.sizes = working_dtype(self.device), Sizes()
        self.model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.tokenizer, self.pixels = tokenizer, pixels
        self.tokens = model.config.text_config.max_position_embeddings

    @cached_property
    def id(self) -> str:
        words = tokenizer_fingerprint(self.tokenizer)
        return f"{self.name} {fingerprint(self.model)[:16]} {words[:16]} {self.dtype} {self.how}"

    def check(self, prompts: Sequence[str]) -> None:
        """Any text will do."""

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        if not len(images):
            return Scores(np.zeros(0))
        return self.sizes.fitting(lambda: self._score(images, prompts))

    def _score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        different = list(dict.fromkeys(prompts))  # a prompt is often drawn many times
        row = {prompt: i for i, prompt in enumerate(different)}
        words = self._text(different)[torch.tensor([row[prompt] for prompt in prompts])]
        found = [features.float() for features in image_features(self, images)]
        return Scores(100 * torch.cosine_similarity(torch.cat(found), words).cpu().numpy().astype(np.float64))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _text(self, prompts: list[str]) -> torch.Tensor:
        """(N, D) fp32."""
        found, batch = [], self.sizes.of(JUDGED, self.batch)
        for lo in range(0, len(prompts), batch):
            some = [self.clean(prompt) for prompt in prompts[lo : lo + batch]]
            tokens = self.tokenizer(
                some, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
            ).to(self.device)
            with fits(JUDGED, len(some)):
                found.append(self.model.get_text_features(**tokens).pooler_output.float())
        return torch.cat(found)

    @staticmethod
    def clean(prompt: str) -> str:
        return prompt


class ClipJudge(ClipScorer):
    """Any CLIPModel in transformers layout: CLIP-H, PickScore, the pocket's own."""

    def __init__(
        self,
        place: str,
        device: torch.device | str = "cpu",
        batch: int = 64,
        *,
        name: str = "clip",
        processor: str | None = None,
    ):
        """place: folder or hub id. processor: where tokenizer and image processor come from; None: from `place`."""
        name = f"{name}:{place}"
        processor = processor or place
        with opening(name):
            model = CLIPModel.from_pretrained(place, **offline(name, place))
            tokenizer, prepare = open_tokenizer(name, processor), open_processor(name, processor)
        pixels = partial(processed, prepare)
        super().__init__(name, model, tokenizer, pixels, device, batch, settings(prepare))


class HpsJudge(ClipScorer):
    """HPS v2.0 and v2.1 (arXiv 2306.09341): ViT-H/14 in OpenCLIP's names, from the published .pt file.

    antialias: of the resizing; off in the torchvision of the papers that report HPS v2.0, on in today's.
    """

    def __init__(
        self,
        name: str,
        file: Path,
        tokenizer: str = CLIP_H,
        device: torch.device | str = "cpu",
        batch: int = 64,
        *,
        antialias: bool = False,
    ):
        try:
            model = clip_model(read_state(file, name))
        except (ValueError, KeyError) as problem:
            if isinstance(problem, UserError):
                raise
            raise UserError(f"judge {name}: {file} is not an OpenCLIP ViT ({problem})") from problem
        side = model.config.vision_config.image_size
        pixels = partial(letterbox, side=side, antialias=antialias)
        with opening(name):
            words = open_tokenizer(name, tokenizer)
        super().__init__(name, model, words, pixels, device, batch, f"letterbox {side} antialias={antialias}")

    @staticmethod
    def clean(prompt: str) -> str:
        """OpenCLIP's, without the mending of wrongly decoded text (ftfy): entities, white space."""
        text = html.unescape(html.unescape(prompt)).strip()
        return re.sub(r"\s+", " ", text).strip()


def image_features(scorer, images: Sequence[np.ndarray]):
    """Yields (n, D) for each batch; the next batch's pixels are prepared meanwhile. TooLarge where one does not fit."""
    size = scorer.sizes.of(JUDGED, scorer.batch)
    batches = [images[lo : lo + size] for lo in range(0, len(images), size)]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(scorer.pixels, batches[0])
        for number in range(len(batches)):
            pixels = ahead.result()
            if number + 1 < len(batches):
                ahead = pool.submit(scorer.pixels, batches[number + 1])
            with fits(JUDGED, len(batches[number])):
                features = scorer.features(pixels.to(scorer.device, scorer.dtype))
            yield features


def working_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def processed(prepare: CLIPImageProcessorPil, images: Sequence[np.ndarray]) -> torch.Tensor:
    return prepare([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values


def settings(prepare: CLIPImageProcessorPil) -> str:
    """Of an image processor, in one line."""
    own = {
        k: v for k, v in prepare.to_dict().items() if k.startswith(("do_", "size", "crop", "image_", "resc", "resa"))
    }
    return json.dumps(own, sort_keys=True, default=str)


def has_processor(place: str) -> bool:
    """Whether a folder brings its own tokenizer and image processor. Of a hub id that is not known."""
    has_words = any(os.path.isfile(os.path.join(place, name)) for name in TOKENIZER_FILES)
    return has_words and os.path.isfile(os.path.join(place, "preprocessor_config.json"))


def open_tokenizer(name: str, place: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(place, **offline(name, place))


def open_processor(name: str, place: str) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil.from_pretrained(place, **offline(name, place))


def offline(name: str, place: str) -> dict:
    """A folder must not reach for the network; anything else that looks like a path must exist."""
    if os.path.isdir(place):
        found = git_lfs.pointers_below(place)
        own = os.path.join(place, "model.safetensors")
        if os.path.isfile(own) and not git_lfs.is_pointer(own):  # weights in other formats are not asked for
            found = [path for path in found if path.suffix in (".json", ".txt")]
        if found:
            raise UserError(f"judge {name}: {found[0]} {git_lfs.WHAT}")
        return {"local_files_only": True}
    if os.path.isfile(place) or place.count("/") != 1 or place.startswith((".", "/")):
        raise UserError(
            f"judge {name}: no such folder: {place}; give one in transformers layout or a hub id OWNER/NAME"
        )
    return {}


class opening:
    """What fails inside is refused in one line."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, _kind, problem, _trace) -> None:
        if isinstance(problem, UserError) or not isinstance(problem, OSError | ValueError | KeyError | RuntimeError):
            return
        line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise UserError(f"judge {self.name}: cannot be opened ({line})") from problem
