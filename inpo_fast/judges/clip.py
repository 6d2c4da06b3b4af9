"""CLIP-style judges: 100 cos(image, text), with transformers alone (no torchvision)."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from inpo_fast.judges import Scores
from inpo_fast.refusal import Refusal


class ClipJudge:
    """Any CLIPModel in transformers layout: CLIP-H, PickScore, the pocket's own."""

    tie = 1e-6

    def __init__(self, place: str, device: torch.device | str = "cpu", batch: int = 64):
        self.name, self.device, self.batch = f"clip:{place}", device, batch
        try:
            self.model = CLIPModel.from_pretrained(place).to(device).eval().requires_grad_(False)
            self.tokenizer = CLIPTokenizer.from_pretrained(place)
            self.preprocess = CLIPImageProcessorPil.from_pretrained(place)
        except (OSError, ValueError) as problem:
            raise Refusal(f"judge {self.name}: cannot be opened ({str(problem).splitlines()[0]})") from problem

    def check(self, prompts: Sequence[str]) -> None:
        """Any text will do."""

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        totals = []
        for lo in range(0, len(images), self.batch):
            some = [Image.fromarray(image) for image in images[lo : lo + self.batch]]
            pixels = self.preprocess(some, return_tensors="pt").pixel_values.to(self.device)
            text = self.tokenizer(
                list(prompts[lo : lo + self.batch]), padding="max_length", truncation=True, return_tensors="pt"
            ).to(self.device)
            image = self.model.get_image_features(pixel_values=pixels).pooler_output
            words = self.model.get_text_features(**text).pooler_output
            totals.append(100 * torch.cosine_similarity(image.float(), words.float()))
        return Scores(total=torch.cat(totals).cpu().numpy().astype(np.float64))
