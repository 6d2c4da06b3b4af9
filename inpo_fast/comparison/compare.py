"""Several models, several judges, one set of prompts: the table, and the pictures that it rests on.

All models draw the same prompts from the same initial noise with the base's VAE and text encoders; a model is a UNet or
a LoRA in that pipeline. Pictures and scores are saved as they come, so an interrupted comparison goes on where it
stopped, and another judge or model later costs only itself. The control is the base with its noise prediction scaled:
no better model, so a judge that prefers it measures grain.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.comparison.drawing import aligned, draw, scaled_eps, use_ddim
from inpo_fast.comparison.picture_store import PictureStore, Stored
from inpo_fast.comparison.prompts import PromptSet
from inpo_fast.comparison.published_scores import reference
from inpo_fast.comparison.win_rates import interval, points
from inpo_fast.judges import Judge, Scores, judge_id
from inpo_fast.judges.cache import CHUNK, ScoreCache, image_hash
from inpo_fast.models.families import denoiser_of
from inpo_fast.models.files.lora_files import read_lora
from inpo_fast.models.files.lora_place import lora_file
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import write_text
from inpo_fast.runtime.fingerprint import fingerprint
from inpo_fast.runtime.progress import picture_progress
from inpo_fast.runtime.record_store import digest

BASE, CONTROL = "base", "control"


@dataclass
class Contest:
    """What was drawn and judged. scores: judge -> model -> Scores, prompt-major like `pictures` of each model."""

    prompts: PromptSet
    seeds: int
    models: dict[str, str]  # name -> where it is
    judges: list[Judge]
    pictures: dict[str, Stored] = field(default_factory=dict)
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)

    @property
    def captions(self) -> list[str]:
        return [prompt for prompt in self.prompts.prompts for _ in range(self.seeds)]


def named_models(base: str, given: list[str]) -> dict[str, str]:
    """name -> place of each, the base first. NAME=PLACE, or a place, which names itself by its folder."""
    models = {BASE: base}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals:
            place = text
            parts = [part for part in Path(text).parts if part not in ("/", ".", "..")]
            # runs/sd15/model is "sd15", not "model"
            name = parts[-2] if len(parts) > 1 and parts[-1] in ("model", "lora", "unet") else (parts or [text])[-1]
        if not name or name == CONTROL or name in models:
            raise UserError(f"--model {text}: the name {name!r} is taken; write --model NAME=PLACE with another one")
        models[name] = place
    return models


def draw_all(contest: Contest, pipeline: DiffusionPipeline, config: EvaluateConfig, folder: Path) -> None:
    """Draws what is not on disk yet; every process its share, all see all of it afterwards."""
    rank, world = distributed.rank_and_world()
    use_ddim(pipeline)
    for name, place in contest.models.items():  # a LoRA that does not fit is told before anything is drawn
        if name != BASE and lora_file(place, "--model"):
            read_lora("--model", place, denoiser_of(pipeline).module(pipeline))
    common = _identity(pipeline, config)
    rows = [(name, place, 1.0) for name, place in contest.models.items()]
    if config.control_eps_scale != 1.0:
        rows.append((CONTROL, contest.models[BASE], config.control_eps_scale))
    for name, place, scale in rows:
        with _drawing_with(pipeline, name, place):
            own = {"weights": _weights(pipeline, name, place), "eps_scale": scale}
            store = PictureStore(folder / "pictures", name, common | own)
            if rank == 0:
                store.start()
            distributed.barrier()
            missing = store.missing(contest.prompts.prompts, contest.seeds)
            distributed.barrier()  # all have looked before anybody adds
            jobs = missing[rank::world]

            def pictures(some, scale=scale):
                keys = [("evaluate", config.seed, prompt, seed) for prompt, seed in some]
                how = {"steps": config.sampler_steps, "guidance": config.guidance, "batch": config.batch}
                with scaled_eps(pipeline, scale):
                    return draw(pipeline, [prompt for prompt, _ in some], keys, **how)

            with picture_progress(len(jobs), "draw", shown=rank == 0 and bool(jobs)) as advance:
                store.fill(jobs, pictures, config.batch, lambda n, name=name: advance(n, name))
            distributed.barrier()
            contest.pictures[name] = store.all(contest.prompts.prompts, contest.seeds)


def _identity(pipeline: DiffusionPipeline, config: EvaluateConfig) -> dict:
    """What decides a picture beside the network."""
    denoiser = denoiser_of(pipeline)
    return {
        "vae": fingerprint(pipeline.vae),
        "text": [fingerprint(encoder) for encoder in denoiser.encoders(pipeline)],
        "sampler": "DDIM",
        "schedule": digest(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode()),
        "steps": config.sampler_steps,
        "guidance": config.guidance,
        "seed": config.seed,
        "dtype": str(denoiser.module(pipeline).dtype),
    }


def _drawing_with(pipeline: DiffusionPipeline, name: str, place: str):
    import contextlib

    return contextlib.nullcontext() if name in (BASE, CONTROL) else aligned(pipeline, place)


def _weights(pipeline: DiffusionPipeline, name: str, place: str) -> str:
    """Of the network that draws; the fingerprint leaves adapters out, so a LoRA's file is added."""
    adapter = None if name in (BASE, CONTROL) else lora_file(place)
    return fingerprint(denoiser_of(pipeline).module(pipeline)) + (digest(adapter.read_bytes()) if adapter else "")


def judge_all(contest: Contest, folder: Path, say: Callable[[str], None]) -> None:
    """Scores of every judge for every picture; what is known is not asked again. `say` gets what it will cost."""
    rank, world = distributed.rank_and_world()
    cache = ScoreCache(folder / "scores")
    distributed.barrier()  # all have read before anybody adds
    captions = contest.captions
    total = len(captions) * len(contest.pictures) * len(contest.judges) // world
    _say_costs(contest, cache, say if rank == 0 else lambda text: None)
    with picture_progress(total, "judge", shown=rank == 0) as advance:
        for judge in contest.judges:
            contest.scores[judge.name] = {}
            for name, pictures in contest.pictures.items():
                mine = range(rank, len(captions), world)
                parts = []
                for lo in range(0, len(mine), CHUNK):
                    some = mine[lo : lo + CHUNK]
                    images, texts = [pictures[i] for i in some], [captions[i] for i in some]
                    parts.append(
                        cache.score(judge, images, texts, lambda n, who=judge.name, of=name: advance(n, f"{who}: {of}"))
                    )
                contest.scores[judge.name][name] = _interleaved(distributed.gather(Scores.joined(parts)), len(captions))


def _say_costs(contest: Contest, cache: ScoreCache, say: Callable[[str], None]) -> None:
    for judge in contest.judges:
        if hasattr(judge, "cost"):
            new = sum(cache.missing(judge, list(p), contest.captions) for p in contest.pictures.values())
            if new:
                say(f"judge {judge.name}: {judge.cost(new)}")


def _interleaved(shares: list[Scores], count: int) -> Scores:
    """Shares of ranks, i-th of every world-th picture, in order."""
    names = next((list(share.parts) for share in shares if len(share.total)), [])
    total, parts = np.zeros(count), {name: np.zeros(count) for name in names}
    for rank, share in enumerate(shares):
        total[rank :: len(shares)] = share.total
        for name in names if len(share.total) else ():
            parts[name][rank :: len(shares)] = share.parts[name]
    return Scores(total, parts)


def summarise(contest: Contest, config: EvaluateConfig) -> dict:
    """The content of comparison.json."""
    names = list(contest.pictures)
    scores = {
        judge.name: {name: _centre(contest, contest.scores[judge.name][name].total) for name in names}
        for judge in contest.judges
    }
    pairs = [(b, a) for i, a in enumerate(names) for b in names[i + 1 :] if b != CONTROL or a == BASE]
    rates = {
        judge.name: [
            {"model": ours, "against": theirs} | _rates(contest, judge, contest.scores[judge.name], ours, theirs)
            for ours, theirs in pairs
        ]
        for judge in contest.judges
    }
    base = contest.models[BASE]
    kind, judges = contest.prompts.kind, [judge.name for judge in contest.judges]
    return {
        "prompts": {
            "kind": kind,
            "count": len(contest.prompts.prompts),
            "published_set": contest.prompts.published,
            "digest": digest(*(prompt.encode() for prompt in contest.prompts.prompts)),
        },
        "seeds": contest.seeds,
        "sampler": {
            "name": "DDIM",
            "steps": config.sampler_steps,
            "guidance": config.guidance,
            "noise_seed": config.seed,
            "control_eps_scale": config.control_eps_scale,
        },
        "models": contest.models,
        "judges": {judge.name: {"id": judge_id(judge), "tie": judge.tie} for judge in contest.judges},
        "scores": scores,
        "win_rates": rates,
        "diversity": {name: _diversity(contest, name) for name in names},
        "paper": reference(base, kind, contest.prompts.published, config.guidance, judges),
    }


def _centre(contest: Contest, totals: np.ndarray) -> dict:
    out = {"mean": float(totals.mean()), "median": float(np.median(totals)), "groups": {}}
    for kind, labels in contest.prompts.groups.items():
        each = np.repeat(labels, contest.seeds)
        out["groups"][kind] = {
            label: {"mean": float(totals[each == label].mean()), "median": float(np.median(totals[each == label]))}
            for label in dict.fromkeys(labels)
        }
    return out


def _rates(contest: Contest, judge: Judge, scores: dict[str, Scores], ours: str, theirs: str) -> dict:
    won = points(scores[ours].total, scores[theirs].total, judge.tie, contest.seeds)
    out = _interval(won) | {"groups": {}}
    for kind, labels in contest.prompts.groups.items():
        own = np.array(labels)
        out["groups"][kind] = {label: _interval(won[own == label]) for label in dict.fromkeys(labels)}
    return out


def _interval(won: np.ndarray) -> dict:
    rate, low, high = interval(won)
    return {"win_rate": rate, "low": low, "high": high, "prompts": len(won)}


def _diversity(contest: Contest, name: str, prompts: int = 200) -> float | None:
    """Root mean square difference of a prompt's pictures, pixels in [0, 1], first prompts only; None for one seed."""
    if contest.seeds < 2:
        return None
    distances = []
    for row in range(min(prompts, len(contest.prompts.prompts))):
        some = contest.pictures[name][row * contest.seeds : (row + 1) * contest.seeds]
        flat = np.stack(some).reshape(contest.seeds, -1).astype(np.float32) / 255
        first, second = np.triu_indices(contest.seeds, 1)
        distances.append(np.sqrt(((flat[first] - flat[second]) ** 2).mean(-1)).mean())
    return float(np.mean(distances))


def write_pictures_list(contest: Contest, folder: Path) -> None:
    """pictures.jsonl: model, prompt, seed, file and hash of every picture, for judges elsewhere and for voting."""
    lines = []
    for name, pictures in contest.pictures.items():
        for i, path in enumerate(pictures.files):
            about = {"model": name, "prompt": contest.captions[i], "seed": i % contest.seeds}
            about |= {"file": path.relative_to(folder).as_posix(), "image": image_hash(pictures[i])}
            lines.append(json.dumps(about, ensure_ascii=False))
    write_text(folder / "pictures.jsonl", "\n".join(lines) + "\n")
