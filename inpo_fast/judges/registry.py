"""Judges by name: NAME, NAME:WEIGHTS or NAME:WEIGHTS@PROCESSOR; folders, files, or hub ids.

To add one: a class with what `judges.Judge` asks for (score_file.py is a short one to imitate), a function here that
makes it, an entry in JUDGES. The class is imported when it is made: transformers takes seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from inpo_fast.judges import Judge
from inpo_fast.runtime.errors import UserError

HPS_FILES = {"hps-v2.0": "HPS_v2_compressed.pt", "hps-v2.1": "HPS_v2.1_compressed.pt"}  # of the hub's xswu/HPSv2
PICKSCORE = "yuvalkirstain/PickScore_v1"


@dataclass(frozen=True)
class Asked:
    """A judge as it was asked for. spec: the whole; rest: all behind its first colon, weights and processor: the halves
    of that, "" for none."""

    spec: str
    name: str
    rest: str
    weights: str
    processor: str
    device: torch.device | str
    batch: int  # pictures at once


@dataclass(frozen=True)
class Entry:
    written: str  # as --help and errors write it
    about: str
    make: Callable[[Asked], Judge]


def _pocket_rules(asked: Asked) -> Judge:
    from inpo_fast.judges.pocket_rules import RuleJudge

    if asked.spec != asked.name:
        raise UserError(f"judge {asked.spec}: has no weights; write {asked.name}")
    return RuleJudge()


def _pocket_reader(asked: Asked) -> Judge:
    from inpo_fast.judges.pocket_reader import ReaderJudge

    if not asked.rest:
        raise UserError("judge pocket-reader: names no folder; write pocket-reader:FOLDER")
    return ReaderJudge(Path(asked.rest).expanduser(), asked.device, asked.batch)


def _clip(asked: Asked, published: str = "", processor: str = "") -> Judge:
    from inpo_fast.judges.clip import ClipJudge

    place = asked.weights or published
    if not place:
        raise UserError("judge clip: names no model; write clip:FOLDER")
    processor = asked.processor or processor
    return ClipJudge(place, asked.device, asked.batch, name=asked.name, processor=processor or None)


def _clip_h(asked: Asked) -> Judge:
    from inpo_fast.judges.clip import CLIP_H

    return _clip(asked, CLIP_H)


def _pickscore(asked: Asked) -> Judge:
    from inpo_fast.judges.clip import CLIP_H, has_processor

    # as published: the model was tuned from CLIP-H
    return _clip(asked, PICKSCORE, "" if has_processor(asked.weights or PICKSCORE) else CLIP_H)


def _hps(asked: Asked) -> Judge:
    from inpo_fast.judges.clip import CLIP_H, HpsJudge

    name = asked.name.removesuffix("-antialias")
    file = Path(asked.weights).expanduser() if asked.weights else _download(name)
    how = {"antialias": name != asked.name}
    return HpsJudge(asked.name, file, asked.processor or CLIP_H, asked.device, asked.batch, **how)


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


def _aesthetic(asked: Asked) -> Judge:
    from inpo_fast.judges.aesthetic import CLIP_L, AestheticJudge

    if not asked.weights:
        raise UserError(
            "judge aesthetic: names no file; write aesthetic:sac+logos+ava1-l14-linearMSE.pth, the file of "
            "github.com/christophschuhmann/improved-aesthetic-predictor"
        )
    return AestheticJudge(Path(asked.weights).expanduser(), asked.processor or CLIP_L, asked.device, asked.batch)


def _http(asked: Asked) -> Judge:
    from inpo_fast.judges.http import HttpJudge

    return HttpJudge(Path(asked.rest).expanduser())


def _scores(asked: Asked) -> Judge:
    from inpo_fast.judges.score_file import ScoreFileJudge

    return ScoreFileJudge(Path(asked.rest).expanduser())


HPS = Entry("hps-v2.0, hps-v2.1", "Human Preference Score; -antialias behind the name for today's resizing", _hps)
JUDGES = {
    "pocket-rules": Entry("pocket-rules", "the pocket world's rule", _pocket_rules),
    "pocket-reader": Entry("pocket-reader:FOLDER", "the pocket world's independent judge", _pocket_reader),
    "clip": Entry("clip:FOLDER", "any CLIP model in transformers layout", _clip),
    "clip-h": Entry("clip-h", "CLIP ViT-H/14 of LAION", _clip_h),
    "pickscore": Entry("pickscore", "PickScore v1", _pickscore),
    **{name + kind: HPS for name in HPS_FILES for kind in ("", "-antialias")},
    "aesthetic": Entry("aesthetic:HEAD.pth", "LAION's aesthetic predictor", _aesthetic),
    "http": Entry("http:JUDGE.yaml", "a model behind an OpenAI-compatible chat address", _http),
    "scores": Entry("scores:FILE.jsonl", "scores made elsewhere", _scores),
}
NAMES = {entry.written: entry.about for entry in JUDGES.values()}


def make_judge(spec: str, device: torch.device | str = "cpu", batch: int = 64) -> Judge:
    """batch: pictures at once. UserError for an unknown name and for weights that cannot be opened."""
    name, _, rest = spec.partition(":")
    weights, _, processor = rest.rpartition("@") if "@" in rest else (rest, "", "")
    if name not in JUDGES:
        raise UserError(f"unknown judge {spec!r}; one of {', '.join(NAMES)}")
    return JUDGES[name].make(Asked(spec, name, rest, weights, processor, device, batch))


def make_judges(specs: Sequence[str], device: torch.device | str = "cpu", batch: int = 64) -> list[Judge]:
    """UserError where two have the same name."""
    judges = [make_judge(spec, device, batch) for spec in specs]
    names = [judge.name for judge in judges]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"judge {name} is named twice; name it once")
    return judges
