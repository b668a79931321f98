"""Triton kernels on CPU tensors: run as ``TRITON_INTERPRET=1 pytest tests/interpreter``.

Triton decides at import whether kernels are interpreted, so these tests are a process of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fastenc

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    if INTERPRETED:
        return
    reason = "needs its own process: TRITON_INTERPRET=1 pytest tests/interpreter"
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def patch_once() -> None:
    """At every call of a device function the interpreter patches triton.language anew, a quarter of
    these tests' time: inside of a kernel all of it is patched."""
    from triton.runtime import interpreter

    tl, patch = interpreter.tl, interpreter._patch_lang

    def patched(lang) -> bool:
        return not tl.core.is_builtin(lang.arange)

    def patch_lang(fn):
        langs = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        if langs and all(map(patched, langs)):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = patch_lang


if INTERPRETED:
    patch_once()


def poisoned(shape, dtype, device):
    """What a kernel must overwrite: NaN, and in integers a number that no index can be."""
    x = torch.empty(shape, dtype=dtype, device=device)
    return x.fill_(float("nan") if dtype.is_floating_point else -(1 << 30))


@pytest.fixture(autouse=True)
def triton_on_poison(monkeypatch):
    """Every op runs on Triton, on outputs and workspaces full of NaN, with one torch thread."""
    if not INTERPRETED:
        yield
        return
    from fastenc.triton_kernels import _common

    monkeypatch.setattr(_common, "empty", poisoned)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastenc.use_backend("triton"):
        yield
    torch.set_num_threads(before)


@pytest.fixture
def chip(monkeypatch):
    """``chip("sm_90")``: kernels run with that chip's tiles."""
    from fastenc.triton_kernels import _common

    def choose(name: str) -> None:
        monkeypatch.setattr(_common, "chip_of", lambda device: _common.CHIPS[name])

    return choose


@pytest.fixture
def rows_alike(monkeypatch):
    """The interpreter's products add in one order in every row.

    numpy's, OpenBLAS with AVX2, rounds a row by its place in the tile, as no matrix instruction
    does: the same sequence six rows further down would differ in its last bit.
    """

    def product(a, b, dtype):
        return np.multiply(a[..., None], b[..., None, :, :], dtype=dtype).sum(-2)

    monkeypatch.setattr(np, "matmul", product)
