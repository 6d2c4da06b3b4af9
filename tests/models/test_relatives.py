"""The relatives of Stable Diffusion by shape, small but with the published block structure, of transformers that are
less deep where they are deep: opened, planned, trained for a step, and given away so that diffusers opens them.

Structures: SSD-1B and Vega (arXiv 2401.02677), KOALA (2312.04005), BK-SDM (2305.15798) as in their unet/config.json,
whose depths ComfyUI's model_detection.py lists too; SD 2.x has linear projections, heads by width and OpenCLIP's text.
"""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from tiny_world import WIDTH, WIDTH_2, save_pairs, tiny_pipeline, tiny_xl

from inpo_fast.config import parse
from inpo_fast.cost.plan import make_plan
from inpo_fast.models.fast.fast_unet import make_fast
from inpo_fast.models.loading import load_unet
from inpo_fast.training import loop
from inpo_fast.training.set_up import prepare

XL = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH + WIDTH_2,
    "attention_head_dim": (1, 2, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH_2,
    "layers_per_block": 2,
}
SD = {
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "layers_per_block": 1,
}
SHAPES = {
    "SSD-1B": XL
    | {
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "Vega": XL
    | {
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "KOALA-700M": XL
    | {"layers_per_block": [1, 1, 1], "transformer_layers_per_block": [0, 1, 2], "mid_block_type": None},
    "KOALA-1B": XL | {"layers_per_block": 1, "transformer_layers_per_block": [0, 1, 3]},
    "BK-SDM base": SD,
    "BK-SDM small": SD | {"mid_block_type": None},
    "BK-SDM tiny": SD
    | {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "mid_block_type": None,
    },
    "SD 2.x": SD | {"layers_per_block": 2, "attention_head_dim": [2, 4, 4, 4], "use_linear_projection": True},
}
NOISE = {
    "noise": {},
    "v": {"prediction_type": "v_prediction"},
    "v, zero SNR": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}


def make_unet(shape: str) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4, **SHAPES[shape])


def make(shape: str, noise: str):
    pipeline = tiny_xl() if SHAPES[shape].get("addition_embed_type") else tiny_pipeline()
    pipeline.unet = make_unet(shape)
    if shape == "SD 2.x":
        pipeline.text_encoder.config.hidden_act = "gelu"
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **NOISE[noise])
    return pipeline


# Vega has SSD-1B's structure; BK-SDM small is the base without a middle, which tiny has none of either
RUNS = {
    "KOALA-700M": "noise",
    "KOALA-1B": "noise",
    "BK-SDM base": "noise",
    "BK-SDM tiny": "noise",
    "SD 2.x": "v",
    "SSD-1B": "v, zero SNR",
}


@pytest.mark.parametrize(("shape", "noise"), RUNS.items())
def test_a_relative_is_opened_planned_trained_and_given_away(tmp_path, shape, noise):
    base = make(shape, noise)
    base.save_pretrained(tmp_path / "base")
    save_pairs(tmp_path / "pairs.parquet")
    words = [f"--models.base={tmp_path / 'base'}", f"--data.source={tmp_path / 'pairs.parquet'}"]
    words += [f"--output={tmp_path / 'run'}", "--train.steps=1", "--train.pairs_per_step=2", "--train.micro_batch=2"]
    config = parse("test", [*words, "--inversion.steps=2", "--optim.lr=0.01", "--optim.warmup_steps=0"])
    assert make_plan(config, 1).parameters == sum(p.numel() for p in base.unet.parameters())
    run = prepare(config, 0, 1, torch.device("cpu"))
    assert (run.models.noise_path.output == "v") == (noise != "noise")
    assert (float(run.models.noise_path.abar[-1]) == 0) == (noise == "v, zero SNR")
    loop.train(run, Console(quiet=True))
    loop.finish(run)
    model = type(base).from_pretrained(tmp_path / "run/model", local_files_only=True)
    before, after = base.unet.state_dict(), model.unet.state_dict()
    assert before.keys() == after.keys() and not all(x.equal(after[n]) for n, x in before.items())
    assert all(x.isfinite().all() for x in after.values())
    model.set_progress_bar_config(disable=True)
    model.scheduler = DDIMScheduler.from_config(model.scheduler.config)
    picture = model("a small red circle", num_inference_steps=2, output_type="pt").images[0]
    assert picture.isfinite().all() and picture.std() > 0
    config = dict(model.scheduler.config)
    assert {name: config[name] for name in NOISE[noise]} == NOISE[noise]
    aligned = load_unet("--model", str(tmp_path / "run/model"), base.unet, scheduler=config)
    assert all(x.equal(after[n]) for n, x in aligned.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fast_unet_knows_the_shape(shape):
    """fused computes what diffusers does."""
    unet = make_unet(shape)
    draw = torch.Generator().manual_seed(0)
    more = {"encoder_hidden_states": torch.randn(2, 16, unet.config.cross_attention_dim, generator=draw)}
    if unet.config.addition_embed_type:
        pooled = torch.randn(2, WIDTH_2, generator=draw)
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 32.0)}
    x, t = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([10, 900])
    with torch.no_grad():
        want = unet(x, t, **more).sample
        make_fast(unet, "fused")
        got = unet(x, t, **more).sample
    torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)
