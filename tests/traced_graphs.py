"""torch.compile with the tracing and without the C++ compiler, which takes a minute; the graphs that it made."""

import torch

from inpo_fast.models.fast.compiled_blocks import graph_of

GRAPHS = []


def compile_by_tracing(monkeypatch) -> None:
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: plain(f, **(_only(how) | {"backend": _trace})))


def forget_graphs() -> None:
    torch._dynamo.reset()
    graph_of.cache_clear()
    GRAPHS.clear()


def _trace(graph, example):
    GRAPHS.append(graph)
    return graph


def _only(how: dict) -> dict:
    return {name: value for name, value in how.items() if name in ("fullgraph", "dynamic")}
