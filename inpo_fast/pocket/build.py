"""Builds everything in assets/ from nothing: `make pocket` (about an hour on two cores).

    torchrun --standalone --nproc-per-node 2 -m inpo_fast.pocket.build --overwrite [--only STAGE] [--output DIR]

Stages read what the stages before them wrote, so one can be repeated alone. Everything is written beside the folder,
which it takes the place of when all of it is there. Seeds are pinned; the files are the same on the same machine and
versions, and equal in quality elsewhere. manifest.json holds their hashes.
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from inpo_fast.comparison.drawing import draw, use_deterministic_sampler
from inpo_fast.judges.pocket_rules import RuleJudge
from inpo_fast.models.files.diffusers_folder import write_folder
from inpo_fast.models.loading import quiet_libraries
from inpo_fast.pocket import ASSETS, base_model, clip_model, pairs, reader
from inpo_fast.pocket.scenes import all_scenes, split_scenes
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError, run_command
from inpo_fast.runtime.files import json_or_none, write_text

SEED = 0  # of weights, batches, samples and labels
RENDER_SEED = 1
PICTURES = 40_000  # renderings the base model learns from
VAE_STEPS, VAE_BATCH, VAE_LR = 6_000, 32, 2e-3
UNET_STEPS, UNET_BATCH, UNET_LR = 4_500, 128, 2e-3
PAIRS = 1_440


def build_vae(output: Path) -> None:
    seen, _ = split_scenes()
    pixels, _ = base_model.render_training_set(seen, PICTURES, RENDER_SEED)
    vae = base_model.train_vae(pixels, steps=VAE_STEPS, batch=VAE_BATCH, lr=VAE_LR, seed=SEED)
    vae.half().save_pretrained(output / "model" / "vae")


def build_denoiser(output: Path) -> None:
    seen, _ = split_scenes()
    vae = AutoencoderKL.from_pretrained(output / "model" / "vae")
    pixels, captions = base_model.render_training_set(seen, PICTURES, RENDER_SEED)
    tokenizer = base_model.make_tokenizer([scene.caption for scene in all_scenes()])
    torch.set_num_threads(1 if distributed.rank_and_world()[1] > 1 else os.cpu_count() or 1)
    unet, text_encoder = base_model.train_denoiser(
        base_model.encode_all(vae, pixels),
        captions,
        tokenizer,
        steps=UNET_STEPS,
        batch=UNET_BATCH,
        lr=UNET_LR,
        seed=SEED,
    )
    if distributed.rank_and_world()[0] == 0:
        pipeline = base_model.make_pipeline(vae, unet, text_encoder, tokenizer)
        write_folder(pipeline.to(torch.float16), output / "model", {})


def build_clip(output: Path) -> None:
    tokenizer = base_model.make_tokenizer([scene.caption for scene in all_scenes()])
    clip_model.train_clip(all_scenes(), tokenizer, SEED, output / "clip")


def build_reader(output: Path) -> None:
    torch.set_num_threads(1)  # the shipped one's: sums of more threads are rounded otherwise
    reader.train_reader(all_scenes(), SEED, output / "reader")


def build_pairs(output: Path) -> None:
    seen, held_out = split_scenes()
    pipeline = StableDiffusionPipeline.from_pretrained(output / "model", safety_checker=None, dtype=torch.float32)
    pairs.write_pairs(pairs.draw_pairs(pipeline, seen, PAIRS, SEED), output / "pairs.parquet")
    write_text(output / "prompts-held-out.txt", "".join(scene.caption + "\n" for scene in held_out))
    every = seen[:: len(seen) // 32][:32]
    write_text(output / "prompts-seen.txt", "".join(scene.caption + "\n" for scene in every))


def check_base(output: Path) -> None:
    """How good the base is: at least 85 % of samples on seen prompts show the right colour and shape."""
    seen, _ = split_scenes()
    pipeline = StableDiffusionPipeline.from_pretrained(output / "model", safety_checker=None, dtype=torch.float32)
    use_deterministic_sampler(pipeline)
    captions = [scene.caption for scene in seen[::2]]
    pictures = draw(
        pipeline,
        captions,
        [("check", i) for i in range(len(captions))],
        steps=pairs.SAMPLER_STEPS,
        guidance=pairs.GUIDANCE,
        batch=128,
    )
    parts = RuleJudge().score(pictures, captions).parts
    right = (parts["colour"] == 1) & (parts["shape"] > 0.5)
    print(f"right colour and shape: {100 * right.mean():.1f} % of {len(captions)} samples on seen prompts")
    print("parts: " + "  ".join(f"{name} {values.mean():.2f}" for name, values in parts.items()))


def forget_paths(output: Path) -> None:
    """Drops the folder that a part was loaded from, which libraries write into its config."""
    for path in output.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(config, indent=2) + "\n")


def write_manifest(output: Path) -> None:
    forget_paths(output)
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != "manifest.json")
    hashes = {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    settings = {
        "seed": SEED,
        "render_seed": RENDER_SEED,
        "pictures": PICTURES,
        "pairs": PAIRS,
        "vae": {"steps": VAE_STEPS, "batch": VAE_BATCH, "lr": VAE_LR},
        "denoiser": {"steps": UNET_STEPS, "batch": UNET_BATCH, "lr": UNET_LR},
        "sampler": {"name": "DDIM", "steps": pairs.SAMPLER_STEPS, "guidance": pairs.GUIDANCE},
        "bradley_terry_temperature": pairs.TEMPERATURE,
    }
    write_text(output / "manifest.json", json.dumps({"settings": settings, "sha256": hashes}, indent=1))
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB in {output}")


STAGES = {
    "vae": build_vae,
    "denoiser": build_denoiser,
    "clip": build_clip,
    "reader": build_reader,
    "pairs": build_pairs,
    "check": check_base,
    "manifest": write_manifest,
}
SHARED = ("denoiser",)  # split over processes; the first one does the other stages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m inpo_fast.pocket.build", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=STAGES, action="append", help="repeat this stage (may be given again)")
    parser.add_argument("--output", type=Path, default=ASSETS, help="default: the assets of the package")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier build left there")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    check(output, arguments.overwrite)
    quiet_libraries()
    rank, _, _ = distributed.start(patience_minutes=600)  # the first process does most stages alone
    aside = output.with_name(f".tmp-{output.name}")
    if rank == 0:
        start(output, aside, bool(arguments.only))
        again = f"--output {aside} --overwrite --only STAGE"
        print(f"== into {aside}, which takes the place of {output}; to go on after a crash: {again}", flush=True)
    distributed.barrier()
    for name, stage in STAGES.items():
        if not arguments.only or name in arguments.only:
            if rank == 0:
                print(f"== {name}", flush=True)
            torch.set_num_threads(os.cpu_count() or 1)
            if rank == 0 or name in SHARED:
                stage(aside)
            distributed.barrier()
    if rank == 0:
        swap(aside, output)
    distributed.stop()


def check(output: Path, overwrite: bool) -> None:
    """UserError where something lies there that no build wrote, or that is not to be replaced."""
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"--output {output} is there already; --overwrite replaces it once all of it is built anew")
    if output.is_dir() and (output.name.startswith(".tmp-") or _is_build(output / "manifest.json")):
        return
    raise UserError(f"--output {output} was not written by inpo_fast.pocket.build; name another folder")


def _is_build(manifest: Path) -> bool:
    return (json_or_none(manifest) or {}).keys() == {"settings", "sha256"}


def start(output: Path, aside: Path, keep: bool) -> None:
    """An empty folder to build in; keep: with what is there, so that a stage can be repeated."""
    shutil.rmtree(aside, ignore_errors=True)
    if keep and output.is_dir():
        shutil.copytree(output, aside)
    aside.mkdir(parents=True, exist_ok=True)


def swap(aside: Path, output: Path) -> None:
    """What was built takes the place of what is there, which goes then."""
    old = output.with_name(f".tmp-old-{output.name}")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    aside.rename(output)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    run_command("inpo_fast.pocket.build", main)
