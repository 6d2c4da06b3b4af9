"""Every kernel test runs with empty() filled with NaN: an element that no program writes fails each comparison."""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it on a GPU


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def as_if_on_cuda(monkeypatch):
    """Public functions take their CUDA branch, its checks included; without a GPU the interpreter runs the kernel."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
