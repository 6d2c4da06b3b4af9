"""Judges by name: NAME, NAME:WEIGHTS or NAME:WEIGHTS@PROCESSOR; folders, files, or hub ids."""

from collections.abc import Sequence
from pathlib import Path

import torch

from inpo_fast.judges import Judge
from inpo_fast.runtime.errors import UserError

HPS_FILES = {"hps-v2.0": "HPS_v2_compressed.pt", "hps-v2.1": "HPS_v2.1_compressed.pt"}  # of the hub's xswu/HPSv2
PICKSCORE = "yuvalkirstain/PickScore_v1"
NAMES = {
    "pocket-rules": "the pocket world's rule",
    "clip:FOLDER": "any CLIP model in transformers layout",
    "clip-h": "CLIP ViT-H/14 of LAION",
    "pickscore": "PickScore v1",
    "hps-v2.0, hps-v2.1": "Human Preference Score; -antialias behind the name for today's resizing",
    "aesthetic:HEAD.pth": "LAION's aesthetic predictor",
    "http:JUDGE.yaml": "a model behind an OpenAI-compatible chat address",
    "scores:FILE.jsonl": "scores made elsewhere",
}


def make_judge(spec: str, device: torch.device | str = "cpu", batch: int = 64) -> Judge:
    """batch: pictures at once. UserError for an unknown name and for weights that cannot be opened."""
    name, _, rest = spec.partition(":")
    weights, _, processor = rest.rpartition("@") if "@" in rest else (rest, "", "")
    base = name.removesuffix("-antialias")
    if spec == "pocket-rules":
        from inpo_fast.judges.pocket_rules import RuleJudge

        return RuleJudge()
    if name in ("clip", "clip-h", "pickscore"):
        from inpo_fast.judges.clip import CLIP_H, ClipJudge, has_processor

        place = weights or {"clip-h": CLIP_H, "pickscore": PICKSCORE}.get(name)
        if place is None:
            raise UserError("judge clip: names no model; write clip:FOLDER")
        if name == "pickscore" and not processor and not has_processor(place):
            processor = CLIP_H  # as published: the model was tuned from CLIP-H
        return ClipJudge(place, device, batch, name=name, processor=processor or None)
    if base in HPS_FILES:
        from inpo_fast.judges.clip import CLIP_H, HpsJudge

        file = Path(weights).expanduser() if weights else _download(base)
        return HpsJudge(name, file, processor or CLIP_H, device, batch, antialias=name != base)
    if name == "aesthetic":
        from inpo_fast.judges.aesthetic import CLIP_L, AestheticJudge

        if not weights:
            raise UserError(
                "judge aesthetic: names no file; write aesthetic:sac+logos+ava1-l14-linearMSE.pth, the file of "
                "github.com/christophschuhmann/improved-aesthetic-predictor"
            )
        return AestheticJudge(Path(weights).expanduser(), processor or CLIP_L, device, batch)
    if name == "http":
        from inpo_fast.judges.http import HttpJudge

        return HttpJudge(Path(rest).expanduser())
    if name == "scores":
        from inpo_fast.judges.score_file import ScoreFileJudge

        return ScoreFileJudge(Path(rest).expanduser())
    raise UserError(f"unknown judge {spec!r}; one of {', '.join(NAMES)}")


def make_judges(specs: Sequence[str], device: torch.device | str = "cpu", batch: int = 64) -> list[Judge]:
    """UserError where two have the same name."""
    judges = [make_judge(spec, device, batch) for spec in specs]
    names = [judge.name for judge in judges]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"judge {name} is named twice; name it once")
    return judges


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("xswu/HPSv2", HPS_FILES[name]))
    except Exception as problem:  # the hub's and the network's own kinds
        line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise UserError(
            f"judge {name}: {HPS_FILES[name]} of xswu/HPSv2 cannot be had ({line}); write {name}:FILE.pt for a file on "
            "this machine"
        ) from problem
