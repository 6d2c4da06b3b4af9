"""LAION's aesthetic predictor (improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth).

Five linear layers on the normalised image embedding of OpenAI's ViT-L/14, with dropout and no activation between them:
at inference they are one affine map. The prompt has no say. The output is about 1 to 10.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionModelWithProjection

from inpo_fast.judges import Scores
from inpo_fast.judges.clip import image_features, offline, open_processor, opening, processed, settings, working_dtype
from inpo_fast.judges.open_clip import read_state
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.fingerprint import fingerprint
from inpo_fast.runtime.memory import Sizes

CLIP_L = "openai/clip-vit-large-patch14"
LAYERS = (0, 2, 4, 6, 7)  # of nn.Sequential; dropout between the first ones


def affine(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(D,) and () of the map that the layers are together, multiplied in fp64. ValueError if they do not fit."""
    expected = {f"layers.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")}
    if differ := sorted(expected ^ state.keys()):
        raise ValueError(f"tensor {differ[0]} is missing or unknown")
    weight, bias = (state[f"layers.0.{kind}"].double() for kind in ("weight", "bias"))
    for layer in LAYERS[1:]:
        w, b = (state[f"layers.{layer}.{kind}"].double() for kind in ("weight", "bias"))
        if w.shape[1] != len(bias):
            raise ValueError(f"layers.{layer}.weight takes {w.shape[1]} inputs of {len(bias)}")
        weight, bias = w @ weight, w @ bias + b
    if len(bias) != 1:
        raise ValueError(f"{len(bias)} outputs, expected 1")
    return weight[0].float(), bias[0].float()


class AestheticJudge:
    tie = 1e-6

    def __init__(self, head: Path, place: str = CLIP_L, device: torch.device | str = "cpu", batch: int = 64):
        """head: the .pth file. place: the CLIP it was made for, a folder or hub id in transformers layout."""
        self.name, self.device, self.batch = "aesthetic", torch.device(device), batch
        self.dtype, self.sizes = working_dtype(self.device), Sizes()
        try:
            weight, bias = affine(read_state(head, self.name))
        except ValueError as problem:
            if isinstance(problem, UserError):
                raise
            raise UserError(f"judge aesthetic: {head} is not the predictor's linear head ({problem})") from problem
        self.weight, self.bias = weight.to(self.device), bias.to(self.device)
        with opening(self.name):
            self.model = CLIPVisionModelWithProjection.from_pretrained(place, **offline(self.name, place))
            prepare = open_processor(self.name, place)
        self.model = self.model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.pixels, self.how = partial(processed, prepare), settings(prepare)
        if (given := self.model.config.projection_dim) != len(weight):
            raise UserError(f"judge aesthetic: {head} takes embeddings of {len(weight)}, {place} gives {given}")

    @cached_property
    def id(self) -> str:
        head = fingerprint(torch.nn.ParameterDict({"weight": self.weight, "bias": self.bias}))
        return f"{self.name} {head[:16]} {fingerprint(self.model)[:16]} {self.dtype} {self.how}"

    def check(self, prompts: Sequence[str]) -> None:
        """No prompt is looked at."""

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        if not len(images):
            return Scores(np.zeros(0))
        return self.sizes.fitting(lambda: self._score(images))

    def _score(self, images: Sequence[np.ndarray]) -> Scores:
        totals = []
        for features in image_features(self, images):
            unit = torch.nn.functional.normalize(features.float(), dim=-1)
            totals.append(unit @ self.weight + self.bias)
        return Scores(torch.cat(totals).cpu().numpy().astype(np.float64))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).image_embeds
