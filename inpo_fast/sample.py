"""Prompts to pictures with the stock diffusers pipeline; the noise of a picture depends on its key only.

    python -m inpo_fast.sample --base MODEL --model ALIGNED --prompts prompts.txt --output sheet.png

A contact sheet: the base's pictures above the aligned model's, same prompts and same noise.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from inpo_fast import distributed, draws
from inpo_fast.costs import one_by_one
from inpo_fast.files import write_bytes
from inpo_fast.loading import load_pipeline, load_vae, open_unet, quiet_libraries
from inpo_fast.memory import TooLarge, fits, with_less
from inpo_fast.models import DTYPES
from inpo_fast.progress import picture_progress
from inpo_fast.refusal import Refusal, command_line, run_or_refuse

log = logging.getLogger(__name__)
FITTED: WeakKeyDictionary[DiffusionPipeline, int] = WeakKeyDictionary()  # pictures at once, where fewer than asked fit


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    keys: Sequence[draws.Key],
    *,
    steps: int,
    guidance: float,
    batch: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> list[np.ndarray]:
    """One (H, W, 3) uint8 picture for each prompt.

    keys: one each; equal keys give equal initial noise, whatever the model or the batch.
    advance: called with the number of pictures after each batch (for a progress bar).

    The VAE decodes one picture at a time: 16 of SDXL's would take 24 GiB in bf16, 48 in fp32, and one is little work
    beside the UNet's. Where memory does not suffice, the batch is halved, for this pipeline once and for all.
    """
    unet = pipeline.unet
    side = unet.config.sample_size
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[np.ndarray] = []

    def some() -> np.ndarray:
        size = min(batch, FITTED.get(pipeline, batch))
        part = slice(len(pictures), len(pictures) + size)
        noise = draws.normals((unet.config.in_channels, side, side), list(keys[part]))
        with fits("batch", size), _decoding(pipeline.vae):
            return pipeline(
                list(prompts[part]),
                latents=noise.to(unet.device, unet.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="np",
            ).images

    def lower(_key: str, size: int) -> None:
        FITTED[pipeline] = size
        log.warning("out of memory: from here on %d pictures are drawn at once", size)

    while len(pictures) < len(prompts):
        try:
            images = with_less(some, lower)
        except TooLarge:
            raise Refusal(
                "out of memory while one picture was drawn; take bf16 (models.precision, --precision) or a larger GPU"
            ) from None
        pictures += [np.round(image * 255).astype(np.uint8) for image in images]
        advance(len(images))
    return pictures


@contextmanager
def _decoding(vae: torch.nn.Module):
    """One picture at a time, in the VAE's own dtype: beside an fp16 UNet it may be fp32 (models.py), and a pipeline
    that raised SDXL's from fp16 to fp32 does not lower it again where it fails."""
    dtype, first = vae.dtype, vae.post_quant_conv or vae.decoder
    hook = first.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(vae.dtype), *inputs[1:]))
    try:
        with one_by_one(vae):
            yield
    finally:
        hook.remove()
        if vae.dtype != dtype:
            vae.to(dtype)


def use_ddim(pipeline: DiffusionPipeline) -> None:
    """Swap in the deterministic DDIM sampler with the model's own noise schedule."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)


@contextmanager
def drawing_with(pipeline: DiffusionPipeline, unet: torch.nn.Module):
    """Within the block the pipeline draws with this UNet and the deterministic DDIM sampler."""
    own, scheduler = pipeline.unet, pipeline.scheduler
    try:
        pipeline.unet = unet
        use_ddim(pipeline)
        yield pipeline
    finally:
        pipeline.unet, pipeline.scheduler = own, scheduler


@contextmanager
def scaled_eps(pipeline: DiffusionPipeline, scale: float):
    """Within the block the UNet's prediction is multiplied by `scale` (the control row of an evaluation)."""

    def multiply(_module, _inputs, output):
        output[0].mul_(scale)
        return output

    handle = pipeline.unet.register_forward_hook(multiply)
    try:
        yield pipeline
    finally:
        handle.remove()


@contextmanager
def aligned(pipeline: DiffusionPipeline, model: str):
    """Within the block the pipeline draws with another model: a LoRA, or anything whose UNet fits."""
    own = pipeline.unet
    pipeline.unet = open_unet("--model", model, pipeline)
    try:
        yield pipeline
    finally:
        pipeline.unet = own


def main() -> None:
    from inpo_fast.report.pictures import Comparison, contact_sheet

    parser = command_line("python -m inpo_fast.sample", __doc__)
    parser.add_argument("--base", required=True, help="a diffusers folder, .safetensors file or hub id")
    parser.add_argument("--model", required=True, help="aligned model: the same, or a LoRA (file or folder)")
    parser.add_argument(
        "--single-file-config", help="for a --base in one file: a diffusers folder with its configuration and tokenizer"
    )
    parser.add_argument("--vae", help="another VAE for both: a folder, .safetensors file or hub id")
    parser.add_argument("--prompts", help="text file, one prompt a line")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given again")
    parser.add_argument("--output", required=True, help="the PNG to write")
    parser.add_argument("--seeds", type=int, default=1, help="pictures per prompt (default 1)")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    parser.add_argument("--guidance", type=float, default=7.5, help="7.5 for SD1.5 (default), 5 for SDXL")
    parser.add_argument("--batch", type=int, default=8, help="pictures at once (default 8)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default fp32")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    own = parser.parse_args()
    prompts = list(own.prompt)
    if own.prompts:
        try:
            lines = Path(own.prompts).read_text(encoding="utf-8").splitlines()
        except OSError as problem:
            raise Refusal(f"--prompts {own.prompts}: {problem.strerror}") from problem
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise Refusal("no prompts: give --prompts FILE or --prompt TEXT")
    quiet_libraries()
    _, _, device = distributed.start()
    pipeline = load_pipeline(own.base, DTYPES[own.precision], own.single_file_config, key="--base")
    if own.vae:
        pipeline.vae = load_vae(own.vae, pipeline, key="--vae").to(pipeline.unet.dtype)
    pipeline.to(device)
    use_ddim(pipeline)
    unet = open_unet("--model", own.model, pipeline)  # before anything is drawn
    captions = [prompt for prompt in prompts for _ in range(own.seeds)]
    keys = [("sample", own.seed, i, seed) for i in range(len(prompts)) for seed in range(own.seeds)]
    how = {"steps": own.steps, "guidance": own.guidance, "batch": own.batch}
    with picture_progress(2 * len(captions), "draw") as advance:
        before = draw(pipeline, captions, keys, advance=lambda n: advance(n, "base"), **how)
        with drawing_with(pipeline, unet):
            after = draw(pipeline, captions, keys, advance=lambda n: advance(n, "aligned"), **how)
    sheet = contact_sheet([Comparison(*row) for row in zip(captions, before, after, strict=True)])
    Path(own.output).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(own.output), sheet)
    print(f"{len(captions)} comparisons: {own.output}")


if __name__ == "__main__":
    run_or_refuse("python -m inpo_fast.sample", main)
