"""Triton's interpreter runs the kernels where there is no GPU: switches it on, and says where it cannot run them.

To be imported before anything imports triton.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
SYMPTOM = "only 0-dimensional arrays can be converted to Python scalars"  # findings/triton-3.6-numpy-2.4.sh


def broken(triton: str, numpy: str) -> str:
    """Why kernels with a loop cannot run in this version's interpreter, or nothing."""
    of_triton, of_numpy = (tuple(int(part) for part in text.split(".")[:2]) for text in (triton, numpy))
    if of_triton >= (3, 7) or of_numpy < (2, 4):
        return ""
    return (
        f"Triton {triton}'s interpreter needs numpy < 2.4 and this is {numpy}: kernels with a loop do not run in it, "
        "so without a GPU; pip install 'numpy<2.4', or triton>=3.7 where torch allows it"
    )


try:
    BROKEN = "" if CUDA else broken(version("triton"), version("numpy"))
except PackageNotFoundError:  # a torch of its own brings it under another name
    BROKEN = ""


def patch_once():
    """A launch in the interpreter, and each call of a function in it, patches triton.language anew: a quarter of the
    time. Nothing is compiled beside it, so the first of them patches for all. To be called after triton's import."""
    triton = sys.modules.get("triton.runtime.interpreter")
    if not all(hasattr(triton, name) for name in ("_patch_lang", "_LangPatchScope", "tl")):
        return  # no interpreter, or another one: it is slower, and right
    patch, patched = triton._patch_lang, set()

    def once(function):
        seen = frozenset(id(x) for x in function.__globals__.values() if x is triton.tl or x is triton.tl.core)
        if seen not in patched:
            patched.add(seen)
            patch(function)
        return triton._LangPatchScope()  # nothing to restore

    triton._patch_lang = once
    if hasattr(triton, "_get_np_dtype"):
        triton._get_np_dtype = _remembered(triton._get_np_dtype, triton.tl)


def _remembered(np_dtype, tl):
    """It builds a table at each of its calls, of which every operation makes some."""
    known = {}

    def remembered(dtype):
        scalar = dtype.scalar
        if type(scalar) is not tl.dtype:  # a pointer
            return np_dtype(dtype)
        if scalar.name not in known:
            known[scalar.name] = np_dtype(scalar)
        return known[scalar.name]

    return remembered


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """A test that fails for just this is skipped, and says why; every other one runs."""
    try:
        return (yield)
    except Exception as problem:
        if BROKEN and SYMPTOM in str(problem):
            pytest.skip(BROKEN)
        raise
