"""Several models draw the same prompts from the same initial noise, and several judges score the pictures.

A model is a UNet or a LoRA in the base's pipeline, with the base's VAE and text encoders. Pictures and scores are saved
as they come, so an interrupted comparison goes on where it stopped, and another judge or model later costs only itself.
The negative control is the base with its noise prediction scaled: no better model, so a judge that prefers it measures
grain.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.comparison.drawing import aligned, draw, scaled_eps, use_deterministic_sampler
from inpo_fast.comparison.model_comparison import BASE, NEGATIVE_CONTROL, ModelComparison, summarise
from inpo_fast.comparison.picture_store import PictureStore
from inpo_fast.comparison.prompts import read_prompt_set
from inpo_fast.judges import Scores
from inpo_fast.judges.cache import CHUNK, ScoreCache, image_hash
from inpo_fast.judges.registry import make_judges
from inpo_fast.models.families import denoiser_of
from inpo_fast.models.files.lora_files import read_lora
from inpo_fast.models.files.lora_place import lora_file
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import write_text
from inpo_fast.runtime.fingerprint import fingerprint, tokenizer_fingerprints
from inpo_fast.runtime.masking import masked
from inpo_fast.runtime.progress import picture_progress
from inpo_fast.runtime.record_store import digest


def open_comparison(
    models: dict[str, str], config: EvaluateConfig, limit: int | None, device: torch.device
) -> ModelComparison:
    """Prompts and judges, before anything is drawn. UserError when one of them cannot be had. limit: prompts."""
    prompts = read_prompt_set(config.prompts, limit)
    names = config.judges or [name for name in (config.judge, config.outside_judge) if name]
    judges = make_judges(names, device)
    if not any(judge.name.startswith("scores:") for judge in judges):  # those know only pictures that are drawn
        for judge in judges:
            judge.check(prompts.prompts)
    return ModelComparison(prompts, config.seeds, models, judges)


def compare(comparison: ModelComparison, pipeline: DiffusionPipeline, config: EvaluateConfig, folder: Path) -> dict:
    """Draws and judges what is not in `folder` yet. Work is split over processes. The content of comparison.json."""
    rank, _ = distributed.rank_and_world()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    draw_all(comparison, pipeline, config, folder)
    if rank == 0:
        write_pictures_list(comparison, folder)
    judge_all(comparison, folder, print)
    return summarise(comparison, config)


def named_models(base: str, given: list[str]) -> dict[str, str]:
    """name -> place of each, the base first. NAME=PLACE, or a place, which names itself by its folder."""
    models = {BASE: base}
    for text in given:
        name, place = split_name(text)
        if name is None:
            parts = [part for part in Path(text).parts if part not in ("/", ".", "..")]
            # runs/sd15/model is "sd15", not "model"
            inner = len(parts) > 1 and parts[-1] in ("model", "lora", "unet")
            name = masked(parts[-2] if inner else (parts or [text])[-1])
        if not name or name == NEGATIVE_CONTROL or name in models:
            raise UserError(f"--model {text}: the name {name!r} is taken; write --model NAME=PLACE with another one")
        models[name] = place
    return models


def split_name(text: str) -> tuple[str | None, str]:
    """NAME and PLACE of NAME=PLACE; None and the place where it has no name. An address has = in its parameters."""
    name, equals, place = text.partition("=")
    return (name, place) if equals and "://" not in name else (None, text)


def draw_all(comparison: ModelComparison, pipeline: DiffusionPipeline, config: EvaluateConfig, folder: Path) -> None:
    """Draws what is not on disk yet; every process its share, all see all of it afterwards."""
    rank, world = distributed.rank_and_world()
    use_deterministic_sampler(pipeline)
    for name, place in comparison.models.items():  # a LoRA that does not fit is told before anything is drawn
        if name != BASE and lora_file(place, "--model"):
            read_lora("--model", place, denoiser_of(pipeline).module(pipeline))
    common = _identity(pipeline, config)
    rows = [(name, place, 1.0) for name, place in comparison.models.items()]
    if config.control_eps_scale != 1.0:
        rows.append((NEGATIVE_CONTROL, comparison.models[BASE], config.control_eps_scale))
    for name, place, scale in rows:
        with _drawing_with(pipeline, name, place):
            own = {"weights": _weights(pipeline, name, place), "eps_scale": scale}
            store = PictureStore(folder / "pictures", name, common | own)
            if rank == 0:
                store.start()
            distributed.barrier()
            missing = store.missing(comparison.prompts.prompts, comparison.seeds)
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
            comparison.pictures[name] = store.all(comparison.prompts.prompts, comparison.seeds)


def _identity(pipeline: DiffusionPipeline, config: EvaluateConfig) -> dict:
    """What decides a picture beside the network."""
    denoiser = denoiser_of(pipeline)
    return {
        "vae": fingerprint(pipeline.vae),
        "text": [fingerprint(encoder) for encoder in denoiser.encoders(pipeline)],
        "tokenizers": tokenizer_fingerprints(pipeline),
        "empty_prompt": "zeros" if denoiser.zeros_for_empty(pipeline) else "encoded",
        "sampler": "DDIM",
        "schedule": digest(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode()),
        "steps": config.sampler_steps,
        "guidance": config.guidance,
        "seed": config.seed,
        "dtype": str(denoiser.module(pipeline).dtype),
    }


def _drawing_with(pipeline: DiffusionPipeline, name: str, place: str):
    return contextlib.nullcontext() if name in (BASE, NEGATIVE_CONTROL) else aligned(pipeline, place)


def _weights(pipeline: DiffusionPipeline, name: str, place: str) -> str:
    """Of the network that draws; the fingerprint leaves adapters out, so a LoRA's file is added."""
    adapter = None if name in (BASE, NEGATIVE_CONTROL) else lora_file(place)
    return fingerprint(denoiser_of(pipeline).module(pipeline)) + (digest(adapter.read_bytes()) if adapter else "")


def judge_all(comparison: ModelComparison, folder: Path, say: Callable[[str], None]) -> None:
    """Scores of every judge for every picture; what is known is not asked again. `say` gets what it will cost."""
    rank, world = distributed.rank_and_world()
    cache = ScoreCache(folder / "scores")
    distributed.barrier()  # all have read before anybody adds
    captions = comparison.captions
    total = len(captions) * len(comparison.pictures) * len(comparison.judges) // world
    _say_costs(comparison, cache, say if rank == 0 else lambda text: None)
    with picture_progress(total, "judge", shown=rank == 0) as advance:
        for judge in comparison.judges:
            comparison.scores[judge.name] = {}
            for name, pictures in comparison.pictures.items():
                mine = range(rank, len(captions), world)
                parts = []
                for lo in range(0, len(mine), CHUNK):
                    some = mine[lo : lo + CHUNK]
                    images, texts = [pictures[i] for i in some], [captions[i] for i in some]
                    parts.append(
                        cache.score(judge, images, texts, lambda n, who=judge.name, of=name: advance(n, f"{who}: {of}"))
                    )
                comparison.scores[judge.name][name] = _interleaved(
                    distributed.gather(Scores.joined(parts)), len(captions)
                )


def _say_costs(comparison: ModelComparison, cache: ScoreCache, say: Callable[[str], None]) -> None:
    for judge in comparison.judges:
        if hasattr(judge, "cost"):
            new = sum(cache.missing(judge, list(p), comparison.captions) for p in comparison.pictures.values())
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


def write_pictures_list(comparison: ModelComparison, folder: Path) -> None:
    """pictures.jsonl: model, prompt, seed, file and hash of every picture, for judges elsewhere and for voting."""
    lines = []
    for name, pictures in comparison.pictures.items():
        for i, path in enumerate(pictures.files):
            about = {"model": name, "prompt": comparison.captions[i], "seed": i % comparison.seeds}
            about |= {"file": path.relative_to(folder).as_posix(), "image": image_hash(pictures[i])}
            lines.append(json.dumps(about, ensure_ascii=False))
    write_text(folder / "pictures.jsonl", "\n".join(lines) + "\n")
