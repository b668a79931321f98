"""The parity rule over a strict grid of CPU attention, forward and backward, on every ISA."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.ops import _attention_ref as reference

pytestmark = pytest.mark.usefixtures("two_threads")

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257,
           320, 321, 511, 513, 1000)  # fmt: skip
HEADS, NUMBERS = 2, 64


def batches(head_dim: int):
    """Each length as often as gives the log-sum-exp ``NUMBERS`` numbers to be judged by."""
    for length in LENGTHS:
        if length <= 300 or head_dim == 64:
            yield (length,) * max(1, NUMBERS // HEADS // length)


def check(lengths, window, head_dim: int) -> None:
    """out, lse and the gradients of q, k and v; the same with RoPE where head_dim is even."""
    cu_seqlens, longest = testing.cu_seqlens_of(lengths), max(lengths)

    def attention(q, k, v):
        return fastenc.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window,
            return_attn_probs=True,
        )[:2]  # fmt: skip

    def attention_ref(q, k, v):
        return reference.varlen_attention_ref(q, k, v, cu_seqlens, window)

    def rope(qkv, cos, sin):
        return fastenc.rope_varlen_attention(qkv, cos, sin, cu_seqlens, longest, window)

    def rope_ref(qkv, cos, sin):
        return reference.rope_varlen_attention_ref(qkv, cos, sin, cu_seqlens, window)[0]

    def case(name, *args):
        return testing.Case(name, f"{lengths[0]}-d{head_dim}-w{window}", lambda *_: (args, {}))

    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(sum(lengths), 3, HEADS, head_dim, generator=generator)
    testing.check_case(attention, attention_ref, case("attention", *qkv.unbind(1)), torch.float32)
    if head_dim % 2 == 0:
        tables = testing.rope_tables(longest, head_dim)
        testing.check_case(rope, rope_ref, case("rope", qkv, *tables), torch.float32)


def check_all() -> None:
    torch.set_num_threads(1)
    for head_dim in (8, 33, 64, 96):
        for lengths, window in itertools.product(batches(head_dim), testing.WINDOWS):
            check(lengths, window, head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_grid(isa):
    program = "import test_attention_grid as grid; grid.check_all()"
    environment = {**os.environ, "FASTENC_CPU_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    if "is not possible on this machine" in done.stderr:
        pytest.skip(f"no {isa} on this machine")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("lengths", "window"), [((130, 3), (5, 17)), ((600,), (1, 1))])
def test_two_of_the_grid(lengths, window):
    """What nothing else in make test asks for: the log-sum-exp and the gradient through it."""
    check(lengths, window, 64)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale):
    """The scale is applied after the maximum is found, but not where it is not above 0."""
    lengths = (70, 1, 9)
    qkv = torch.randn(sum(lengths), 3, 2, 32)
    cu_seqlens = testing.cu_seqlens_of(lengths)

    def ours(q, k, v):
        return fastenc.varlen_attention(q, k, v, cu_seqlens, 70, (16, 16), scale=scale)

    def plain(q, k, v):
        return reference.varlen_attention_ref(q, k, v, cu_seqlens, (16, 16), scale)[0]

    case = testing.Case("attention", f"scale {scale}", lambda *_: (tuple(qkv.unbind(1)), {}))
    testing.check_case(ours, plain, case, torch.float32)
