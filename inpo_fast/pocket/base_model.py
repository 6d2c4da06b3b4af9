"""The pocket's base model: a Stable Diffusion 1.x in miniature, trained from nothing on rendered scenes.

Same parts and file layout as SD1.5 (CLIP BPE tokenizer, CLIP text encoder, AutoencoderKL, conditional
UNet, DDIM schedule), about three million parameters. Built once by `build.py`, shipped in `assets/`.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import track
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from inpo_fast.judges.pocket_scenes import BACKGROUNDS, COLOURS, RADIUS, SHAPES, SIZE, Scene
from inpo_fast.pocket.scenes import random_finish, render
from inpo_fast.runtime import distributed

MAX_TOKENS = 16
WIDTH = 64  # of the text encoder
WRONG_WORD = 0.03  # share of captions with one wrong word: the data is deliberately imperfect
EMPTY_PROMPT = 0.1  # share of prompts dropped, so that classifier-free guidance works


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP BPE tokenizer whose merges are learnt from the captions; any text can be encoded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(captions, trainer)

    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae() -> AutoencoderKL:
    """32x32x3 pixels to 8x8x4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(40, 80),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )


def make_scheduler() -> DDIMScheduler:
    """SD1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def render_training_set(scenes: list[Scene], count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """(count, 3, 32, 32) pictures in [-1, 1] of imperfect finish, and their captions (some with a wrong word)."""
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for _ in track(range(count), description="render"):
        scene = scenes[rng.integers(len(scenes))]
        images.append(render(scene, random_finish(rng), rng))
        captions.append((_misname(scene, rng) if rng.random() < WRONG_WORD else scene).caption)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, captions


def _misname(scene: Scene, rng: np.random.Generator) -> Scene:
    words = {"size": tuple(RADIUS), "colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}
    field = rng.choice(list(words))
    return Scene(**{**vars(scene), str(field): str(rng.choice(words[field]))})


def one_cycle(step: int, steps: int) -> float:
    """Learning-rate factor: 5 % linear warm-up, then cosine to 2 %."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.49 * (1 + float(np.cos(np.pi * (step - warm) / (steps - warm))))


def train_vae(pixels: torch.Tensor, *, steps: int, batch: int, lr: float, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, steps))
    order = torch.Generator().manual_seed(seed)
    for step in track(range(steps), description="vae"):
        x = pixels[torch.randint(len(pixels), (batch,), generator=order)]
        with torch.autocast("cpu", torch.bfloat16):  # 1.5 times as fast on a CPU with bf16 instructions
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = F.mse_loss(decoded, x) + 0.5 * F.l1_loss(decoded, x)
        loss = error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"vae step {step}: mse {F.mse_loss(decoded, x).item():.5f}", flush=True)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=round(1 / float(encode_all(vae, pixels[:4096], scale=False).std()), 5))
    return vae


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, pixels: torch.Tensor, scale: bool = True) -> torch.Tensor:
    """Latent means (N, 4, 8, 8), times the scaling factor if `scale`."""
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])
    return latents * vae.config.scaling_factor if scale else latents


def train_denoiser(
    latents: torch.Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    ema_decay: float = 0.998,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Text encoder and UNet together, epsilon prediction; returns their averaged weights.

    Under torchrun each process takes its share of the batch; all draw the same numbers and end with the same weights.
    """
    rank, world = distributed.rank_and_world()
    torch.manual_seed(seed)
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    both = torch.nn.ModuleList([unet, text_encoder])
    parameters = list(both.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, steps))
    noising = make_scheduler()
    ids = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    order = torch.Generator().manual_seed(seed)
    running = 0.0
    for step in track(range(steps), description="unet", disable=rank != 0):
        pick = torch.randint(len(latents), (batch,), generator=order)
        text = torch.where(torch.rand(batch, generator=order) < EMPTY_PROMPT, len(captions), pick)
        x_0 = latents[pick]
        eps = torch.randn(x_0.shape, generator=order)
        t = torch.randint(1000, (batch,), generator=order)
        x_t, t, text, eps = (v[rank::world] for v in (noising.add_noise(x_0, eps, t), t, text, eps))
        loss = F.mse_loss(unet(x_t, t, text_encoder(ids[text])[0]).sample, eps)
        optimizer.zero_grad()
        (loss / world).backward()
        distributed.sum_([p.grad for p in parameters])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 200 == 0 and rank == 0:
            print(f"unet step {step}: loss {running:.4f}", flush=True)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    both.eval().requires_grad_(False)
    return unet, text_encoder


def make_pipeline(vae, unet, text_encoder, tokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
