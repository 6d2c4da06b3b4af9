"""torch.compile with the tracing and without the C++ compiler, which takes a minute; the graphs that ran. What was
traced stays for the tests to come: a test that counts takes a graph that it has not run yet for a new one."""

import torch

GRAPHS = {}  # as an ordered set


def compile_by_tracing(monkeypatch) -> None:
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: plain(f, **(_only(how) | {"backend": _trace})))


def _trace(graph, example):
    def run(*args):
        GRAPHS[graph] = None
        return graph(*args)

    return run


def _only(how: dict) -> dict:
    return {name: value for name, value in how.items() if name in ("fullgraph", "dynamic")}
