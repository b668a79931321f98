"""flash-attn as a candidate: only when asked for, only where it computes the same, never silently.

flash-attn needs a GPU; a stand-in with its signature shows what is passed to it.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

import fastenc
from fastenc.ops import _flash
from fastenc.testing import cu_seqlens_of


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1),
                               softcap=0.0, alibi_slopes=None, deterministic=False):  # fmt: skip
        calls.append((softmax_scale, window_size, deterministic))
        with fastenc.use_backend("reference"):
            return fastenc.varlen_attention(q, k, v, cu_q, max_q, window_size, softmax_scale)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(_flash, "ASKED_FOR", True)
    monkeypatch.setattr(_flash, "DEVICES", ("cpu",))
    return calls


def arguments(dtype=torch.bfloat16, head_dim=16):
    qkv = torch.randn(20, 3, 2, head_dim).to(dtype)
    return *qkv.unbind(1), cu_seqlens_of((13, 7)), 13


def test_it_serves_and_is_recorded(asked):
    with fastenc.record() as ran:
        out = fastenc.varlen_attention(*arguments(), window_size=(4, 4))
    assert ran.calls["varlen_attention"]["flash"] == 1 and ran.fallbacks == []
    assert asked == [(0.25, (4, 4), True)] and out.shape == (20, 2, 16)


def test_what_it_does_not_compute_stays(asked):
    fastenc.varlen_attention(*arguments(torch.float32))
    fastenc.varlen_attention(*arguments(head_dim=12))
    fastenc.varlen_attention(*arguments(head_dim=264))
    fastenc.varlen_attention(*arguments(), dropout_p=0.1, seed=1)
    fastenc.varlen_attention(*arguments(), rel_bias=torch.zeros(2, 8, dtype=torch.bfloat16))
    with fastenc.use_backend("cpu"):
        fastenc.varlen_attention(*arguments())
    _flash.DEVICES = ("cuda",)  # which the fixture sets back
    fastenc.varlen_attention(*arguments())
    assert asked == []


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_who_asks_for_it(value, wanted, monkeypatch):
    monkeypatch.delenv("FASTENC_FLASH", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTENC_FLASH", value)
    spec = importlib.util.spec_from_file_location("read_anew", _flash.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert anew.ASKED_FOR is wanted and anew.DEVICES == ("cuda",)


def test_misuse_is_refused_first(asked):
    q, k, v, cu, longest = arguments()
    with pytest.raises(ValueError, match="max_seqlen"):
        fastenc.varlen_attention(q, k, v, cu, longest - 1)
    assert asked == []


def test_not_asked_for_or_not_there(asked, monkeypatch):
    monkeypatch.setattr(_flash, "ASKED_FOR", False)
    fastenc.varlen_attention(*arguments())
    monkeypatch.setattr(_flash, "ASKED_FOR", True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with fastenc.record() as ran:
        fastenc.varlen_attention(*arguments())
    assert asked == [] and "flash-attn does not import" in ran.fallbacks[0]
