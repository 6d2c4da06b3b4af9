"""Set before anything imports triton: without a CUDA device the kernels run in Triton's interpreter."""

import pytest
import torch

from bench import interpreter

torch.set_num_threads(1)
pytest_pyfunc_call = interpreter.pytest_pyfunc_call


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


@pytest.fixture
def traced(monkeypatch):
    """torch.compile with the tracing and without the C++ compiler, which takes a minute; counts the graphs."""
    from inpo_fast.compiled import graph_of

    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: plain(f, **(_only(how) | {"backend": backend})))
    torch._dynamo.reset()
    graph_of.cache_clear()
    yield graphs
    torch._dynamo.reset()
    graph_of.cache_clear()


def _only(how: dict) -> dict:
    return {name: value for name, value in how.items() if name in ("fullgraph", "dynamic")}
