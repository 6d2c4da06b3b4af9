"""What everything here is measured against, in our own words: the published script's training step, and a better one.

naive_step: one pair per micro-batch, scheduler objects that recompute coefficients on every call, VAE and text encoder
in the loop, full-precision weights cast at each forward (autocast) when a lower precision is asked for, and several
`.item()` per micro-step, each of which makes the host wait. With eta = 0 and diffusers >= 0.22 its inversion is
`grid: diffusers-0.22, evaluate_at: target, guidance: 1` of inpo_fast.

lockstep_step: what a good engineer makes of it in an afternoon. Weights in the working precision, batches of pairs, the
compiler on the UNets, no `.item()` inside; a batch is inverted together until its slowest sample is there.

Kept from the script: what costs time. Left out: its mistakes (one timestep for a whole batch, the schedule in bf16,
data order that depends on decoding), as they would change the gradients.
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler

from inpo_fast.data.loader import Item
from inpo_fast.models.models import Models
from inpo_fast.runtime import keyed_rng


def naive_step(
    items: list[Item],
    models: Models,
    *,
    beta: float,
    inversion_steps: int,
    seed: int,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Accumulates the mean gradient over the pairs in the policy's `.grad` (which must be zero or None).

    Draws the same timesteps and VAE noise as inpo_fast.training.step_batch, from the same keys.
    """
    device = models.device
    scheduler = models.pipeline.scheduler
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(inversion_steps, device=device)
    alphas = scheduler.alphas_cumprod.to(device)
    seen = {"loss": 0.0, "implicit_accuracy": 0.0, "model_mse": 0.0, "ref_mse": 0.0, "unet_evaluations": 0.0}

    def ask(unet, x, time, text) -> torch.Tensor:
        # the script's launcher wraps each call by itself: the weights' casts are thrown away in between
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            return unet(x, time, **text).sample.float()

    for item in items:
        with torch.no_grad():
            latents = torch.cat(
                [
                    _latent(view.pixels, models, (seed, item.position, side))
                    for side, view in enumerate((item.winner, item.loser))
                ]
            )
            text = _condition([item], models)
            t = torch.tensor([keyed_rng.integer(0, 999, "t", seed, item.position)], device=device)
            noisy = latents.clone()
            for s in inverse.timesteps[inverse.timesteps < t[0]]:
                predicted = ask(models.policy, noisy, s.repeat(2), text)
                noisy = inverse.step(predicted, s, noisy).prev_sample
                seen["unet_evaluations"] += 2
            a, b = alphas[t[0]] ** 0.5, (1 - alphas[t[0]]) ** 0.5
            tau = (noisy - a * latents) / b
            reference = ask(models.reference, noisy, t.repeat(2), text)
        predicted = ask(models.policy, noisy, t.repeat(2), text)
        e = (predicted - tau).square().mean((1, 2, 3))
        r = (reference - tau).square().mean((1, 2, 3))
        inside = -0.5 * beta * ((e[0] - e[1]) - (r[0] - r[1]))
        loss = -F.logsigmoid(inside)
        (loss / len(items)).backward()
        seen["loss"] += loss.item() / len(items)
        seen["implicit_accuracy"] += (inside > 0).float().item() / len(items)
        seen["model_mse"] += e.mean().item() / len(items)
        seen["ref_mse"] += r.mean().item() / len(items)
        seen["unet_evaluations"] += 4
    return seen


def lockstep_step(
    items: list[Item], models: Models, *, beta: float, inversion_steps: int, seed: int, batch: int
) -> torch.Tensor:
    """As naive_step for `batch` pairs at a time; returns the losses (N,). The UNets of `models` may be compiled."""
    device, losses = models.device, []
    scheduler = models.pipeline.scheduler
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(inversion_steps, device=device)
    walked = inverse.timesteps.tolist()
    alphas = scheduler.alphas_cumprod.to(device)
    for part in (items[lo : lo + batch] for lo in range(0, len(items), batch)):
        views = [(side, item, view) for side in range(2) for item in part for view in [(item.winner, item.loser)[side]]]
        with torch.no_grad():
            pixels = torch.from_numpy(np.stack([view.pixels for _, _, view in views]))
            posterior = models.vae.encode(
                (pixels.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1).to(models.vae.dtype)
            ).latent_dist
            shape = tuple(posterior.mean.shape[1:])
            noise = keyed_rng.normals(shape, [("vae", seed, item.position, side) for side, item, _ in views]).to(device)
            latents = (posterior.mean.float() + posterior.std.float() * noise) * models.vae.config.scaling_factor
            text = _condition(part, models)
            t = [keyed_rng.integer(0, 999, "t", seed, item.position) for item in part] * 2
            times = torch.tensor(t, device=device)
            noisy = latents.clone()
            for s in (s for s in walked if s < max(t)):
                predicted = models.predict("policy", noisy, torch.full_like(times, s), text)
                moved = inverse.step(predicted.float(), s, noisy).prev_sample
                noisy = torch.where((times > s)[:, None, None, None], moved, noisy)
            a, b = (c[:, None, None, None] for c in (alphas[times] ** 0.5, (1 - alphas[times]) ** 0.5))
            tau = (noisy - a * latents) / b
            reference = models.predict("reference", noisy, times, text)
        predicted = models.predict("policy", noisy, times, text)
        e_w, e_l = (predicted.float() - tau).square().mean((1, 2, 3)).chunk(2)
        r_w, r_l = (reference.float() - tau).square().mean((1, 2, 3)).chunk(2)
        loss = -F.logsigmoid(-0.5 * beta * ((e_w - e_l) - (r_w - r_l)))
        (loss.sum() / len(items)).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def _condition(items: list[Item], models: Models) -> dict:
    """The UNet's arguments for the winners, then the losers of some pairs, by the pipeline's own method."""
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    out = models.pipeline.encode_prompt([item.prompt for item in items], device=models.device, **options)
    more = {"encoder_hidden_states": out[0].repeat(2, 1, 1)}
    if models.denoiser.takes_sizes:
        views = [view for side in range(2) for item in items for view in [(item.winner, item.loser)[side]]]
        sizes = [(*view.original, *view.crop, *view.pixels.shape[:2]) for view in views]
        time_ids = torch.tensor(sizes, device=models.device).float()
        more["added_cond_kwargs"] = {"text_embeds": out[2].repeat(2, 1), "time_ids": time_ids}
    return more


def _latent(pixels, models: Models, key: keyed_rng.Key) -> torch.Tensor:
    image = torch.from_numpy(pixels.copy()).to(models.device).permute(2, 0, 1)[None].float() / 127.5 - 1
    posterior = models.vae.encode(image.to(models.vae.dtype)).latent_dist
    noise = keyed_rng.normal(tuple(posterior.mean.shape[1:]), "vae", *key)[None].to(models.device)
    return (posterior.mean.float() + posterior.std.float() * noise) * models.vae.config.scaling_factor
