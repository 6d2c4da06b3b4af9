"""Set before anything imports torch or triton: one thread a process, these too that a test starts; no garbage
collection while modules are imported; without a CUDA device the kernels run in Triton's interpreter."""

import gc
import logging
import os

gc.disable()
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from bench import interpreter  # noqa: E402

torch.set_num_threads(1)
logging.getLogger("torch.__trace").propagate = True  # or pytest has a trace of all that is compiled written for itself
pytest_pyfunc_call = interpreter.pytest_pyfunc_call


def pytest_collection_finish():
    """Garbage is not looked for among the modules: with torch and diffusers a tenth of the suite's processor time."""
    interpreter.patch_once()
    gc.freeze()
    gc.set_threshold(200_000, 20, 10)
    gc.enable()


@pytest.fixture(autouse=True)
def signals_as_before():
    """A command that was run in this process as if it were its own still answers the signals when it has ended."""
    yield
    from inpo_fast.runtime import signals

    while (command := signals.CURRENT) is not None:
        command.stays = False
        command.__exit__(None, None, None)


def pytest_report_header():
    return interpreter.BROKEN or None


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Every step is a checkpoint and none is removed, for tests/faults and tests/distributed; files that want another
    world have a fixture of this name."""
    from tiny_runs import save_recipe  # imports triton

    folder = tmp_path_factory.mktemp("world")
    save_recipe(
        folder, train={"micro_batch": 1, "checkpoint_every": 1, "keep_checkpoints": 9}, optim={"average": "last-half"}
    )
    return folder


@pytest.fixture(scope="session")
def items(tmp_path_factory):
    """Five decoded pairs of 32 pixels; files that want others have a fixture of this name."""
    from tiny_world import save_pairs

    from inpo_fast.data.loader import DataConfig, PairLoader
    from inpo_fast.data.sources import open_source

    source = open_source(save_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet"))
    return next(PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 5))


@pytest.fixture
def interpreted(monkeypatch):
    """A fast UNet on the kernels themselves, in Triton's interpreter, where the CPU would take their references."""
    if torch.cuda.is_available():
        pytest.skip("beside a GPU the kernels are compiled and take no CPU tensors; -m gpu runs them on CUDA")
    from inpo_kernels.geglu import _geglu
    from inpo_kernels.group_norm_silu import _group_norm_silu
    from inpo_kernels.layer_norm import _layer_norm
    from inpo_kernels.linear_geglu import _linear_geglu

    from inpo_fast.models.fast import fast_unet

    monkeypatch.setattr(fast_unet, "group_norm_silu", lambda *args: _group_norm_silu(*args)[0])
    monkeypatch.setattr(fast_unet, "geglu", _geglu)
    monkeypatch.setattr(fast_unet, "linear_geglu", _linear_geglu)

    def with_residual(x, weight, bias, eps, residual=None):
        y, u, _, _ = _layer_norm(x, weight, bias, eps, residual)
        return y, x if residual is None else u

    monkeypatch.setattr(fast_unet, "layer_norm", with_residual)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without the C++ compiler; the graphs that the test runs."""
    from traced_graphs import GRAPHS, compile_by_tracing

    from inpo_fast.models.fast.compiled_blocks import graph_of

    compile_by_tracing(monkeypatch)
    graph_of.cache_clear()
    GRAPHS.clear()
    yield GRAPHS
    graph_of.cache_clear()
