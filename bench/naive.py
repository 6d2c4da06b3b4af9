"""The training step as the published script does it, in our own words: what everything here is measured against.

One pair per micro-batch, scheduler objects that recompute coefficients on every call, VAE and text encoder in
the loop, full-precision weights cast at each forward (autocast) when a lower precision is asked for, and several
`.item()` per micro-step, each of which makes the host wait. With eta = 0 and diffusers >= 0.22 its inversion is
`grid: diffusers-0.22, evaluate_at: target, guidance: 1` of inpo_fast.

Kept from it: what costs time. Left out: its mistakes (one timestep for a whole batch, the schedule in bf16, data
order that depends on decoding), as they would change the gradients.
"""

import contextlib

import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler

from inpo_fast import draws
from inpo_fast.data.windows import Item
from inpo_fast.models import Models


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

    Draws the same timesteps and VAE noise as inpo_fast.step, from the same keys.
    """
    device = models.device
    scheduler = models.pipeline.scheduler
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(inversion_steps, device=device)
    alphas = scheduler.alphas_cumprod.to(device)
    precision = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
    seen = {"loss": 0.0, "implicit_accuracy": 0.0, "model_mse": 0.0, "ref_mse": 0.0, "unet_evaluations": 0.0}
    for item in items:
        with precision:
            with torch.no_grad():
                latents = torch.cat(
                    [
                        _latent(view.pixels, models, (seed, item.position, side))
                        for side, view in enumerate((item.winner, item.loser))
                    ]
                )
                text = _text(item.prompt, models)
                t = torch.tensor([draws.integer(0, 999, "t", seed, item.position)], device=device)
                noisy = latents.clone()
                for s in inverse.timesteps[inverse.timesteps < t[0]]:
                    predicted = models.policy(noisy, s.repeat(2), text).sample
                    noisy = inverse.step(predicted, s, noisy).prev_sample
                    seen["unet_evaluations"] += 2
                a, b = alphas[t[0]] ** 0.5, (1 - alphas[t[0]]) ** 0.5
                tau = (noisy - a * latents) / b
                reference = models.reference(noisy, t.repeat(2), text).sample
            predicted = models.policy(noisy, t.repeat(2), text).sample
        e = (predicted.float() - tau.float()).square().mean((1, 2, 3))
        r = (reference.float() - tau.float()).square().mean((1, 2, 3))
        inside = -0.5 * beta * ((e[0] - e[1]) - (r[0] - r[1]))
        loss = -F.logsigmoid(inside)
        (loss / len(items)).backward()
        seen["loss"] += loss.item() / len(items)
        seen["implicit_accuracy"] += (inside > 0).float().item() / len(items)
        seen["model_mse"] += e.mean().item() / len(items)
        seen["ref_mse"] += r.mean().item() / len(items)
        seen["unet_evaluations"] += 4
    return seen


def _text(prompt: str, models: Models) -> torch.Tensor:
    """By the pipeline's own method, once for each pair."""
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    return models.pipeline.encode_prompt([prompt], models.device, **options)[0].repeat(2, 1, 1)


def _latent(pixels, models: Models, key: draws.Key) -> torch.Tensor:
    image = torch.from_numpy(pixels.copy()).to(models.device).permute(2, 0, 1)[None].float() / 127.5 - 1
    posterior = models.vae.encode(image).latent_dist
    noise = draws.normal(tuple(posterior.mean.shape[1:]), "vae", *key)[None].to(posterior.mean)
    return (posterior.mean + posterior.std * noise) * models.vae.config.scaling_factor
