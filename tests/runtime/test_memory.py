"""How much is computed at once: counted bytes against torch's own profiler, the sizes that follow, and a full GPU."""

import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from tiny_world import tiny_pipeline, tiny_xl
from transformers import CLIPTextConfig, CLIPTextModel

from inpo_fast.caches.encode import encode_views
from inpo_fast.comparison.drawing import draw
from inpo_fast.cost.plan import text_bytes
from inpo_fast.data.images import View
from inpo_fast.models import models
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.models import Models
from inpo_fast.models.peak_memory import decoding_bytes, encoding_bytes, peak_bytes
from inpo_fast.models.unet import UNet
from inpo_fast.runtime import memory
from inpo_fast.runtime.errors import UserError, run_command
from inpo_fast.runtime.memory import GIB, TooLarge, fits, largest_batch, with_less

NARROW = ("bf16", "fp32")


def full(*args, **how):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.\nMore of it.")


def published_vae(name: str, precision: str) -> AutoencoderKL:
    with torch.device("meta"):
        return torch.nn.Module.to(UNet.make_vae(name), models.DTYPES[precision])


def middling_vae(dtype: torch.dtype) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(block_out_channels=(32, 64, 64), layers_per_block=2, norm_num_groups=8, **blocks)
    return vae.eval().to(dtype)


def on_meta(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    with torch.device("meta"):
        fresh = type(module).from_config(module.config) if hasattr(module, "from_config") else None
        return torch.nn.Module.to(fresh or type(module)(module.config), dtype)


def profiled(run) -> int:
    """The most bytes that torch's CPU allocator had given out at once, as its profiler tells it."""
    run()
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
        run()
    left, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while left:
        event = left.pop()
        left += event.children
        found += [event] if event.name == "[memory]" else []
    now = most = 0
    for event in sorted(found, key=lambda event: event.start_time_ns):
        now += event.extra_fields.alloc_size
        most = max(most, now)
    return most


@pytest.mark.parametrize("precision", NARROW)
def test_counted_peaks_are_what_the_allocator_sees(precision):
    """On the CPU, which reorders some weights for itself: a few KiB."""
    dtype, images, edge = models.DTYPES[precision], 2, 128
    vae = middling_vae(dtype)
    shape, side = on_meta(vae, dtype), edge // 4

    def encode():
        pixels = torch.zeros(images, 3, edge, edge)
        vae.encode(pixels.to(dtype))

    assert encoding_bytes(shape, edge, images) == pytest.approx(profiled(encode), rel=3e-3)
    latents = torch.zeros(images, 4, side, side, dtype=dtype)
    counted = peak_bytes(lambda: shape.decode(latents.to("meta")), [shape])
    assert counted == pytest.approx(profiled(lambda: vae.decode(latents.clone())), rel=3e-3)
    # one by one: beside the last picture's decoder the latents, and the pictures before it
    one, picture, latent = decoding_bytes(shape, side), 3 * edge**2 * dtype.itemsize, 4 * side**2 * dtype.itemsize
    assert one == counted / images and decoding_bytes(shape, side, 5) == one + 4 * (picture + latent)


def test_counted_text_is_what_the_allocator_sees():
    configs = [CLIPTextConfig(vocab_size=99, hidden_size=64 * k, intermediate_size=256 * k) for k in (1, 2)]
    real = [CLIPTextModel(config).eval() for config in configs]
    ids = torch.zeros(models.TEXT_BATCH["cuda"], 77, dtype=torch.int64)
    want = profiled(lambda: UNet.encode_tokens(real, [ids, ids], [None, None]))
    encoders = [on_meta(encoder, torch.float32) for encoder in real]
    assert text_bytes(UNet({}), encoders, 77) == pytest.approx(want, rel=0.02)
    # of two alike: 13 layers' answers of the second and what a layer takes, but only one answer of the first
    twins, answer = [on_meta(real[0], torch.float32)] * 2, 4 * ids.numel() * 64
    assert 14 * answer < text_bytes(UNet({}), twins, 77) < 33 * answer


@pytest.mark.parametrize(
    ("name", "edge", "precision", "batch", "old"),
    [
        ("sd15", 512, "bf16", 8, 10.1),
        ("sd15", 512, "fp32", 4, 20.1),
        ("sdxl", 1024, "bf16", 2, 40.6),
        ("sdxl", 1024, "fp32", 1, 80.4),
    ],
)
def test_published_vaes(name, edge, precision, batch, old):
    """Five tensors of the largest size (128 channels, by hand from diffusers' encoder), and the pixels; old: GiB that
    32 images at once took."""
    width = models.DTYPES[precision].itemsize
    each = encoding_bytes(published_vae(name, precision), edge)
    assert each == edge**2 * (5 * 128 * width + 3 * 4 + (3 * 2 if precision == "bf16" else 0))
    assert 32 * each / GIB == pytest.approx(old, abs=0.05)
    assert largest_batch(each, "cuda") == batch and largest_batch(each, "cpu") == batch


def test_the_size():
    assert [largest_batch(memory.LIMIT // k, "cuda") for k in (1, 2, 3, 4, 31, 32, 999)] == [1, 2, 2, 4, 16, 32, 32]
    assert (
        largest_batch(5 * memory.LIMIT, "cuda") == 1 and largest_batch(1, "cpu") == 8 and largest_batch(1, "xpu") == 32
    )


@pytest.fixture(scope="module")
def small() -> Models:
    return Models(tiny_pipeline(), torch.device("cpu"), ModelsConfig(base="x"))


def test_a_model_takes_the_size_of_its_vae(small, monkeypatch):
    """From the counted bytes of this VAE at this resolution; other resolutions have their own."""
    each = encoding_bytes(on_meta(small.vae, torch.float32), 32)
    monkeypatch.setattr(memory, "LIMIT", 4.8 * each)
    fresh = Models(tiny_pipeline(), torch.device("cpu"), ModelsConfig(base="x"))
    assert (fresh.vae_batch(32), fresh.vae_batch(64), fresh.vae_batch(32)) == (4, 1, 4)
    narrow = Models(tiny_pipeline(), torch.device("cpu"), ModelsConfig(base="x", precision="bf16"))
    assert narrow.vae_batch(32) == 8
    monkeypatch.undo()
    assert small.vae_batch(32) == 8


def views(count: int) -> tuple[list[View], list]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return [View(p, (32, 32), (0, 0)) for p in pixels], [(0, i, 0) for i in range(count)]


@pytest.mark.parametrize("batch", [None, 1, 3, 16])
def test_an_image_does_not_depend_on_how_many_come_with_it(small, monkeypatch, batch):
    """Bit for bit, because the VAE sees one size only; its bits depend on that size."""
    seen, encode = set(), Models.encode_images
    monkeypatch.setattr(Models, "encode_images", lambda self, x, n: (seen.add(len(x)), encode(self, x, n))[1])
    pictures, keys = views(11)
    together = torch.cat(encode_views(pictures, keys, small, True, batch))
    assert together.shape[0] == 11 and encode_views([], [], small, True, batch) == []
    for count in (1, 2, 5, 8, 9):
        assert torch.equal(
            torch.cat(encode_views(pictures[:count], keys[:count], small, True, batch)), together[:count]
        )
    assert seen == {batch or 8}


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
def test_prompts_are_encoded_in_batches_of_one_size(pipeline, monkeypatch):
    one = Models(pipeline(), torch.device("cpu"), ModelsConfig(base="x"))
    prompts, seen, encode = [f"a circle, number {i}" for i in range(11)], [], UNet.encode
    monkeypatch.setattr(
        UNet, "encode", lambda self, pipe, some, device: (seen.append(len(some)), encode(self, pipe, some, device))[1]
    )
    got = one.encode_prompts(prompts)
    assert seen == [8, 8]
    want = [encode(one.denoiser, one.pipeline, [prompt], one.device) for prompt in prompts]
    torch.testing.assert_close(got.hidden, torch.cat([text.hidden for text in want]))
    assert (got.pooled is None) == (pipeline is tiny_pipeline)
    if got.pooled is not None:
        torch.testing.assert_close(got.pooled, torch.cat([text.pooled for text in want]))


def test_what_did_not_fit_is_given_back_before_less_is_tried():
    """An exception that is being handled keeps the tensors of the frames it went through."""

    class Tensor:
        pass

    held, sizes = [], [8]

    def work() -> int:
        activations = Tensor()
        held.append(weakref.ref(activations))
        with fits("train.micro_batch", sizes[-1]):
            return sizes[-1] if sizes[-1] <= 2 else full()

    def lower(key: str, size: int) -> None:
        assert key == "train.micro_batch" and held[-1]() is None
        sizes.append(size)

    assert with_less(work, lower) == 2 and sizes == [8, 4, 2]


def test_less_that_nobody_asks_for_is_no_endless_loop():
    def work():
        with fits("train.micro_batch", 4):
            full()

    told = []
    with pytest.raises(TooLarge):
        with_less(work, lambda key, size: told.append(size))
    assert told == [2]


def test_not_even_one():
    def work():
        with fits("data.vae_batch", 1):
            full()

    with pytest.raises(
        UserError, match=r"^out of memory at data\.vae_batch=1; take models\.gradient_checkpointing=true"
    ):
        with_less(work, lambda key, size: pytest.fail("tried again"))
    with pytest.raises(TooLarge) as told, fits("data.vae_batch", 6):
        full()
    assert str(told.value).startswith("out of memory at data.vae_batch=6; take data.vae_batch=3, models.")


def test_a_full_gpu_elsewhere_is_one_line(capsys):
    with pytest.raises(SystemExit):
        run_command("here", full)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("here: CUDA out of memory. Tried to allocate 2.00 GiB; take ")
    with pytest.raises(SystemExit) as told:  # another error is no full GPU
        run_command("here", lambda: (_ for _ in ()).throw(RuntimeError("other")))
    assert told.value.code == 70


KEYS = [("here", i) for i in range(5)]
HOW = {"steps": 2, "guidance": 2.0}


def test_drawing_with_less(monkeypatch, caplog):
    """A UNet that refuses more than 4 latents (2 pictures, guided): the same pictures, and tried only once."""
    pipeline, prompts = tiny_pipeline(), [f"a circle {i}" for i in range(5)]
    want = draw(pipeline, prompts, KEYS, batch=2, **HOW)
    forward, asked = pipeline.unet.forward, []

    def crowded(x, *args, **how):
        asked.append(len(x))
        return forward(x, *args, **how) if len(x) <= 4 else full()

    monkeypatch.setattr(pipeline.unet, "forward", crowded)
    told = []
    got = draw(pipeline, prompts, KEYS, batch=5, advance=told.append, **HOW)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)) and told == [2, 2, 1]
    assert [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()] == [
        "out of memory; pictures to draw now come in batches of 2 on this process"
    ]
    asked.clear()
    draw(pipeline, prompts, KEYS, batch=5, **HOW)
    assert max(asked) == 4
    monkeypatch.setattr(pipeline.unet, "forward", full)
    with pytest.raises(UserError, match="out of memory with 1 of the pictures to draw; take bf16"):
        draw(pipeline, prompts, KEYS, **HOW)


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
def test_pictures_are_decoded_one_by_one(pipeline, monkeypatch):
    pipeline, seen = pipeline(), []
    hook = pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    draw(pipeline, ["a circle"] * 5, KEYS, batch=4, **HOW)
    assert seen == [1] * 5 and not pipeline.vae.use_slicing
    hook.remove()


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
def test_an_fp16_model_draws_with_its_fp32_vae(pipeline):
    """models.precision=fp16 without models.vae: observe, online and evaluate draw with such a pipeline."""
    half = Models(pipeline(), torch.device("cpu"), ModelsConfig(base="x", precision="fp16"))
    wide = Models(pipeline(), torch.device("cpu"), ModelsConfig(base="x"))
    got, want = (draw(m.pipeline, ["a circle"], KEYS[:1], **HOW)[0].astype(float) for m in (half, wide))
    assert np.abs(got - want).mean() < 2 and half.vae.dtype == torch.float32


def test_a_failed_decode_leaves_the_vae_as_it_was(monkeypatch):
    pipeline = tiny_xl()
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.to(torch.float16)
    monkeypatch.setattr(pipeline.vae.decoder, "forward", full)
    with pytest.raises(UserError, match="out of memory"):
        draw(pipeline, ["a circle"] * 2, KEYS[:2], **HOW)
    assert pipeline.vae.dtype == torch.float16 and not pipeline.vae.use_slicing
