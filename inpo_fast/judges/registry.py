"""Judges by name."""

import torch

from inpo_fast.judges import Judge
from inpo_fast.refusal import Refusal


def make_judge(name: str, device: torch.device | str = "cpu") -> Judge:
    """`pocket-rules`, or `clip:FOLDER` for a CLIP model in transformers layout (folder or hub id)."""
    if name == "pocket-rules":
        from inpo_fast.pocket.judge import RuleJudge

        return RuleJudge()
    if name.startswith("clip:"):
        from inpo_fast.judges.clip import ClipJudge

        return ClipJudge(name.removeprefix("clip:"), device)
    raise Refusal(f"unknown judge {name!r}; one of pocket-rules, clip:FOLDER")
