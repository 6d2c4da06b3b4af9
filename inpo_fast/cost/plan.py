"""What a run will need, before it is started: `python -m inpo_fast.train --config … --dry-run`.

Everything comes from shapes and counts (flops.py, step_cost.py): memory of weights, states and activations, the
step batch's arithmetic, FLOPs. Activations and states are exact for the tensors that torch keeps; workspace and the
allocator's slack are not known beforehand and stand as RESERVE.
"""

from dataclasses import dataclass
from math import prod

import torch
from rich.console import Console
from rich.table import Table

from inpo_fast.config import RunConfig, split_batch, variant_of
from inpo_fast.cost.flops import Passes, network_passes
from inpo_fast.cost.step_cost import PairCost, cost_of_a_pair
from inpo_fast.method.methods import method_of
from inpo_fast.models.denoiser import Denoiser
from inpo_fast.models.lora import add_adapter
from inpo_fast.models.models import DTYPES, TEXT_BATCH, vae_dtype
from inpo_fast.models.peak_memory import decoding_bytes, encoding_bytes, peak_bytes
from inpo_fast.models.shapes import Shapes, open_shapes
from inpo_fast.runtime.masking import masked
from inpo_fast.runtime.memory import GIB, largest_batch
from inpo_fast.training.optim import lr_at

RESERVE = 2.0  # GiB: CUDA context, workspaces of cuDNN and cuBLAS


@dataclass(frozen=True)
class Plan:
    """Numbers of a run on `gpus` GPUs. Bytes are of one GPU."""

    gpus: int
    parameters: int
    trained: int
    kept: dict[str, int]  # bytes held all the time, by what holds them
    step_batches: int  # bytes of latents and text: this step's and what is made of the next beside them
    inversion: int  # bytes while the inversion runs
    activations: int  # bytes per pair of a micro-batch, while the policy runs
    vae_batch: int  # images
    encoding: int  # bytes while the VAE encodes so many
    text: int  # bytes while a batch of prompts is encoded
    drawing: int  # bytes while pictures are drawn, 0 where none are
    pairs_per_gpu: int
    micro_batches: int
    work: PairCost
    forward: dict[str, int]  # FLOPs of one image through the network, by class
    gpu_hours: float

    def peak(self, micro_batch: int) -> int:
        """Bytes. Inversion, policy, VAE, text encoders and drawing take turns.

        The next step batch is encoded while the GPU still computes this step, but on the same stream: memory that the
        host has given back belongs to what is queued next, and activations are given back before the VAE is called.
        """
        most = max(self.beside, self.activations * micro_batch)
        return sum(self.kept.values()) + self.step_batches + most + int(RESERVE * GIB)

    @property
    def beside(self) -> int:
        """Bytes of what takes turns with the policy, whatever the micro-batch."""
        return max(self.inversion, self.encoding, self.text, self.drawing)

    def largest_micro_batch(self, memory: float) -> int:
        """Pairs that fit `memory` GiB; 0 where not even one does."""
        free = (memory - RESERVE) * GIB - sum(self.kept.values()) - self.step_batches
        return int(free // self.activations) if free > max(self.beside, self.activations) else 0


def make_plan(config: RunConfig, gpus: int) -> Plan:
    """UserError where the batch does not divide over the GPUs or the model's configuration cannot be read."""
    micro_batches = split_batch(config.train, gpus)
    shapes = open_shapes(config.models)
    network, denoiser, dtype = shapes.network, shapes.denoiser, DTYPES[config.models.precision]
    parts = ((network, dtype), (shapes.vae, vae_dtype(config.models)), *((text, dtype) for text in shapes.texts))
    for part, into in parts:
        torch.nn.Module.to(part, into)
    if config.models.lora.rank:
        network.requires_grad_(False)
        add_adapter(network, config.models.lora)
    factor = denoiser.downscale(shapes.vae.config)
    pixels = denoiser.training_side(config.data.resolution, shapes.vae.config)
    passes = network_passes(network, pixels // factor, shapes.tokens, config.models.gradient_checkpointing)
    trained = [p for p in network.parameters() if p.requires_grad]
    kept = _kept(config, shapes, passes, trained, gpus)
    activations = method_of(config.method).sides * passes.activations
    image = denoiser.forward_bytes(network, pixels // factor, shapes.tokens)
    if (
        config.models.fast == "compiled"
    ):  # compiled_blocks.py: without a gradient too, a block keeps what it had for one
        image += passes.block
    each = encoding_bytes(shapes.vae, pixels)
    vae_batch = config.data.vae_batch or largest_batch(each, "cuda")
    work = cost_of_a_pair(
        config,
        passes,
        network,
        shapes.vae,
        shapes.texts,
        pixels=pixels,
        side=pixels // factor,
        tokens=shapes.tokens,
    )
    pairs = config.train.steps * config.train.pairs_per_step
    return Plan(
        gpus=gpus,
        parameters=passes.parameters,
        trained=sum(p.numel() for p in trained),
        kept=kept,
        step_batches=_step_batches(config, shapes, pixels // factor, gpus),
        inversion=image * config.inversion.batch,
        vae_batch=vae_batch,
        encoding=each * vae_batch,
        text=text_bytes(denoiser, shapes.texts, shapes.tokens),
        drawing=_drawing(config, shapes, image),
        activations=activations,
        pairs_per_gpu=config.train.pairs_per_step // gpus,
        micro_batches=micro_batches,
        work=work,
        forward=passes.forward,
        gpu_hours=sum(work.flop.values()) * pairs / (config.plan.tflops * 1e12) / 3600,
    )


def _kept(
    config: RunConfig, shapes: Shapes, passes: Passes, trained: list[torch.nn.Parameter], gpus: int
) -> dict[str, int]:
    split = gpus > 1 and config.train.shard_states
    # rows of the first process's part, as zero1.py cuts them
    parts = [p[: -(-len(p) // gpus)] if split else p for p in trained]
    own = sum(p.numel() for p in parts)
    width, count = DTYPES[config.models.precision].itemsize, sum(p.numel() for p in trained)
    full = not config.models.lora.rank
    kept = {"policy": width * passes.parameters}
    kept["reference"] = width * passes.parameters if full else 0  # LoRA: the policy with its adapter off
    if width < 4 or split:
        kept["fp32 masters"] = 4 * own
    kept["gradient sums, fp32"] = 4 * count
    kept[f"optimizer ({config.optim.kind})"] = sum(_state_bytes(p, config.optim.kind) for p in parts)
    if split:
        kept["its reduced part, fp32"] = 4 * own
    if config.optim.average != "none":
        kept["averaged weights"] = 4 * own
    kept["VAE"] = sum(p.nbytes for p in shapes.vae.parameters())
    kept["text encoders"] = sum(p.nbytes for text in shapes.texts for p in text.parameters())
    return kept


def _step_batches(config: RunConfig, shapes: Shapes, side: int, gpus: int) -> int:
    """Latents (fp32) and text (no prompt twice) of this step batch and the next, or x_t in place of the latter's."""
    pairs, denoiser = config.train.pairs_per_step // gpus, shapes.denoiser
    latents = 4 * method_of(config.method).sides * pairs * prod(denoiser.latent_shape(side))
    text = pairs * shapes.tokens * denoiser.text_width * DTYPES[config.models.precision].itemsize
    return latents * (1 + config.objective.timesteps.per_pair) + 2 * text


def text_bytes(denoiser: Denoiser, texts: list[torch.nn.Module], tokens: int) -> int:
    """Of one batch of prompts, as Models.encode_prompts makes them on a GPU."""
    ids = torch.zeros(TEXT_BATCH["cuda"], tokens, dtype=torch.int64, device="meta")
    return peak_bytes(lambda: denoiser.encode_tokens(texts, [ids] * len(texts), [None] * len(texts)), texts)


def _drawing(config: RunConfig, shapes: Shapes, image: int) -> int:
    """Of a batch of pictures, the network's part or the decoder's; image: bytes of one in a pass of the network."""
    sizes = [(config.online.batch, config.online.guidance)] if config.online.every else []
    if config.evaluate.prompts or config.observe.images_every:
        sizes.append((config.evaluate.batch, config.evaluate.guidance))
    side = shapes.denoiser.native_side  # pictures have the model's own size
    passes = (batch * image * (2 if guidance > 1 else 1) for batch, guidance in sizes)
    return max((*passes, *(decoding_bytes(shapes.vae, side, batch) for batch, _ in sizes)), default=0)


def _state_bytes(p: torch.Tensor, kind: str) -> int:
    n = p.numel()
    if kind == "adamw-bf16":
        return 4 * n
    if kind == "adamw-8bit":  # two bytes and two fp32 scales for each 256; small tensors stay fp32
        return 2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n
    if kind == "adafactor":  # one number for each row and each column
        return 4 * (n if p.ndim < 2 else prod(p.shape[:-1]) + prod(p.shape[:-2]) * p.shape[-1])
    return 8 * n


def show(config: RunConfig, plan: Plan, console: Console) -> None:
    train, optim = config.train, config.optim
    name = masked(config.models.base or "") or f"random {config.models.random}"
    kind = f"LoRA rank {config.models.lora.rank}" if config.models.lora.rank else "full fine-tuning"
    method = variant_of(config)
    console.print(f"[bold]{method}[/bold] of {name}: {kind}, {config.models.precision}")
    console.print(f"{plan.parameters:,} parameters, {plan.trained:,} trained\n")

    recipe = _table("recipe", "")
    recipe.add_row(
        "steps x pairs per step",
        f"{train.steps} x {train.pairs_per_step} = {train.steps * train.pairs_per_step:,} pairs",
    )
    recipe.add_row(
        "learning rate", f"{optim.lr:g} ({optim.kind}), {optim.warmup_steps} steps of warm-up, then {optim.decay}"
    )
    recipe.add_row(
        "at step 1 / last", f"{lr_at(0, train.steps, optim):.4g} / {lr_at(train.steps - 1, train.steps, optim):.4g}"
    )
    recipe.add_row("beta", f"{config.objective.beta:g}")
    console.print(recipe)

    batch = _table(f"step batch of one of {plan.gpus} GPU{'s' * (plan.gpus > 1)}", "")
    each = config.objective.timesteps.per_pair
    times = "" if each == 1 else f", at {each} timesteps"
    batch.add_row("pairs", f"{plan.pairs_per_gpu} = {plan.micro_batches} micro-batches x {train.micro_batch}{times}")
    images = method_of(config.method).sides * plan.pairs_per_gpu
    batch.add_row(
        "inversion",
        f"{images} images x {plan.work.evaluations:.2f} evaluations on average, {config.inversion.batch} at a time",
    )
    console.print(batch)

    memory = _table("memory of one GPU", "GiB")
    for what, size in plan.kept.items():
        if size:
            memory.add_row(what, f"{size / GIB:.2f}")
    memory.add_row("latents and text of this step and the next", f"{plan.step_batches / GIB:.2f}")
    memory.add_row(f"VAE encoding, {plan.vae_batch} image{'s' * (plan.vae_batch > 1)}", f"{plan.encoding / GIB:.2f}")
    memory.add_row(f"text encoding, {TEXT_BATCH['cuda']} prompts", f"{plan.text / GIB:.2f}")
    if plan.drawing:
        memory.add_row("drawing pictures (estimate, without the judge)", f"{plan.drawing / GIB:.2f}")
    memory.add_row(f"inversion, {config.inversion.batch} images (estimate)", f"{plan.inversion / GIB:.2f}")
    memory.add_row(f"activations, micro-batch {train.micro_batch}", f"{plan.activations * train.micro_batch / GIB:.2f}")
    memory.add_row("reserve for context and workspaces", f"{RESERVE:.2f}")
    memory.add_row(
        "[bold]peak[/bold] (encoding, drawing, inversion and activations take turns)",
        f"[bold]{plan.peak(train.micro_batch) / GIB:.2f}[/bold]",
    )
    for micro_batch in (1, 2, 4, 8, 16, 32):
        memory.add_row(f"  peak at micro-batch {micro_batch}", f"{plan.peak(micro_batch) / GIB:.2f}")
    console.print(memory)
    if largest := plan.largest_micro_batch(config.plan.memory):
        console.print(f"Largest micro-batch in {config.plan.memory:g} GiB: {largest} pairs")
    else:
        console.print(
            f"[bold]Does not fit {config.plan.memory:g} GiB[/bold] even at micro-batch 1: try models.lora.rank=16, "
            "optim.kind=adamw-8bit or adafactor, models.gradient_checkpointing=true, a smaller inversion.batch"
            f"{', data.vae_batch=1' * (plan.vae_batch > 1)}"
        )

    cost = _table("work of one pair", "TFLOP", "share")
    total = sum(plan.work.flop.values())
    for phase, flop in plan.work.flop.items():
        if flop:
            cost.add_row(phase, f"{flop / 1e12:.2f}", f"{flop / total:.0%}")
    cost.add_row("[bold]all[/bold]", f"[bold]{total / 1e12:.2f}[/bold]", "")
    console.print(cost)
    console.print(
        f"{plan.gpu_hours:.2f} GPU-hours in all at {config.plan.tflops:g} TFLOP/s, a rate that plan.tflops sets and "
        f"nothing here measured: {plan.gpu_hours / plan.gpus:.2f} hours on {plan.gpus}."
    )
    if config.inversion.cache is not None:
        console.print("Work and hours are those of a run without inversion.cache: what it holds is not computed again.")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(columns))
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table
