"""Cases and the parity rule, shared by tests and benchmarks.

The rule, for every kernel, output and gradient: the error against a float64 reference is at most
twice the error of the same formula in plain PyTorch at the same dtype, plus a rounding floor: one
unit in the last place of the dtype at the reference's largest magnitude and, for gradients, eight
fp32 units at the largest magnitude among the call's outputs and gradients (a gradient that cancels
to zero, as that of a one-key softmax, carries the rounding of what was cancelled).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (
    (1,), (2,), (63, 64, 65), (127, 128, 129), (255, 256, 257), (1000,), (0, 5, 0, 1, 0), (1,) * 7,
    (3, 70, 1, 130, 0, 33),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of an op: ``make(dtype, device, seed)`` builds its arguments."""

    op: str
    name: str
    make: Callable[..., tuple[tuple, dict]] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{self.op}[{self.name}]"


def cu_seqlens_of(lengths: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    """(num_seqs + 1,) int32 from sequence lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def rope_tables(max_pos: int, head_dim: int, theta: float = 1e4) -> tuple[Tensor, Tensor]:
    """cos and sin, (max_pos, head_dim // 2), fp32."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(max_pos, dtype=torch.float64), inverse)
    return angles.cos().float(), angles.sin().float()


def _random(shape, dtype, device, generator):
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _geglu(shape, activation):
    def make(dtype, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        return (_random(shape, dtype, device, g) * 2,), {"activation": activation}

    return make


def _rope(total, n, heads, head_dim, max_pos, strided):
    def make(dtype, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        x = _random((total, 3 if strided else n, heads, head_dim), dtype, device, g)
        x = x[:, :n] if n > 1 else x[:, 0]
        cos, sin = (t.to(device=device, dtype=dtype) for t in rope_tables(max_pos, head_dim))
        positions = torch.randint(0, max_pos, (total,), generator=g).to(device)
        return (x, cos, sin, positions), {}

    return make


def _add_layer_norm(shape, residual, bias):
    def make(dtype, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        x = _random(shape, dtype, device, g)
        r = _random(shape, dtype, device, g) if residual else None
        w = _random(shape[-1:], dtype, device, g) * 0.2 + 1
        b = _random(shape[-1:], dtype, device, g) if bias else None
        return (x, r, w, b), {"eps": 1e-5}

    return make


def _segment_pool(lengths, hidden, mode):
    def make(dtype, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        x = _random((sum(lengths), hidden), dtype, device, g)
        return (x, cu_seqlens_of(lengths, device)), {"mode": mode}

    return make


def _attention(lengths, heads, head_dim, window, packed, rel_bias):
    def make(dtype, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        qkv = _random((sum(lengths), 3, heads, head_dim), dtype, device, g)
        q, k, v = qkv.unbind(1) if packed else (x.contiguous() for x in qkv.unbind(1))
        options: dict[str, Any] = {"window_size": window}
        if rel_bias:
            options["rel_bias"] = _random((heads, 32), dtype, device, g)
        return (q, k, v, cu_seqlens_of(lengths, device), max([*lengths, 1])), options

    return make


def _rope_attention(lengths, heads, head_dim, window):
    def make(dtype, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        qkv = _random((sum(lengths), 3, heads, head_dim), dtype, device, g)
        longest = max([*lengths, 1])
        cos, sin = (t.to(device=device, dtype=dtype) for t in rope_tables(longest, head_dim))
        return (qkv, cos, sin, cu_seqlens_of(lengths, device), longest), {"window_size": window}

    return make


WINDOWS = ((-1, -1), (0, 0), (1, 1), (64, 64), (128, 128), (64, 0), (-1, 0), (5, 17))


def cases(op: str, size: str = "test") -> Iterator[Case]:
    """The cases of ``op``: "test" bites at edges, "small" suits an interpreter, "bench" is real."""
    from fastenc import _gliner_cases as gliner

    yield from {
        "geglu": _geglu_cases,
        "rope": _rope_cases,
        "add_layer_norm": _add_layer_norm_cases,
        "segment_pool": _segment_pool_cases,
        "varlen_attention": _attention_cases,
        "rope_varlen_attention": _rope_attention_cases,
        "disentangled_attention": gliner.disentangled_cases,
        "span_pool": gliner.pool_cases,
        "span_score": gliner.score_cases,
        "token_score": gliner.token_cases,
    }[op](size)


def _geglu_cases(size):
    shapes = {
        "test": [(1, 2), (3, 34), (7, 74), (2, 5, 128), (33, 2304), (0, 8), (5, 6000)],
        "small": [(1, 2), (3, 34), (5, 130)],
        "bench": [(512, 2304), (2048, 2304), (8192, 2304), (8192, 5248)],
    }[size]
    for shape in shapes:
        for activation in ("gelu", "gelu_tanh", "silu") if size != "bench" else ("gelu",):
            name = "x".join(map(str, shape)) + f"-{activation}"
            yield Case("geglu", name, _geglu(shape, activation), {"shape": shape})


def _rope_cases(size):
    shapes = {
        "test": [(1, 1, 1, 8, 4), (9, 2, 3, 32, 40), (130, 2, 12, 64, 512), (65, 1, 2, 96, 99),
                 (33, 2, 2, 128, 64), (7, 2, 3, 6, 9), (0, 2, 3, 8, 9), (257, 3, 1, 2, 300)],
        "small": [(1, 1, 1, 8, 4), (9, 2, 3, 32, 40), (33, 2, 2, 64, 64)],
        "bench": [(2048, 2, 12, 64, 512), (8192, 2, 12, 64, 8192)],
    }[size]  # fmt: skip
    for shape in shapes:
        for strided in (False, True):
            name = "x".join(map(str, shape)) + ("-packed" if strided else "")
            yield Case("rope", name, _rope(*shape, strided), {"shape": shape})


def _add_layer_norm_cases(size):
    shapes = {
        "test": [(1, 1), (3, 17), (2, 5, 64), (129, 768), (7, 1024), (0, 8), (2, 5001)],
        "small": [(1, 1), (3, 17), (5, 128)],
        "bench": [(512, 768), (2048, 768), (8192, 768), (8192, 1024)],
    }[size]
    for shape in shapes:
        for residual, bias in ((True, False), (False, False), (True, True), (False, True)):
            name = "x".join(map(str, shape)) + "-residual" * residual + "-bias" * bias
            make = _add_layer_norm(shape, residual, bias)
            yield Case("add_layer_norm", name, make, {"shape": shape, "residual": residual})


def _segment_pool_cases(size):
    batches = {
        "test": [(*LENGTHS,), 40],
        "small": [((1,), (3, 70, 1, 0, 33)), 20],
        "bench": [((323, 17, 200, 40) * 8, (512,) * 16), 768],
    }[size]
    for lengths in batches[0]:
        for mode in ("mean", "cls", "max", "last"):
            name = f"{_short(lengths)}-{mode}"
            make = _segment_pool(lengths, batches[1], mode)
            yield Case("segment_pool", name, make, {"lengths": lengths, "hidden": batches[1]})


def _short(lengths: Sequence[int]) -> str:
    text = ".".join(map(str, lengths))
    return text if len(text) <= 24 else f"{len(lengths)}seqs-{sum(lengths)}tokens"


BENCH_BATCHES = ((512,) * 4, (8192,), (16, 323, 45, 500, 130, 60, 210, 90, 25, 300, 75, 180))
BENCH_WINDOWS = ((64, 64), (-1, -1))


def _attention_grid(size: str) -> Iterator[tuple[tuple[int, ...], int, int, tuple[int, int]]]:
    if size == "bench":
        for lengths, window in itertools.product(BENCH_BATCHES, BENCH_WINDOWS):
            yield lengths, 12, 64, window
        return
    if size == "small":
        for lengths, head_dim in (((1,), 8), ((0, 5, 33, 1), 32), ((17, 66), 64), ((65,), 24)):
            for window in ((-1, -1), (3, 3), (16, 0), (64, 64)):
                yield lengths, 2, head_dim, window
        return
    for lengths in LENGTHS:
        for window in ((-1, -1), (64, 64)):
            yield lengths, 2, 64, window
    for window in WINDOWS:
        yield (130, 3, 200), 2, 32, window
    for head_dim in (1, 8, 33, 80, 96, 128):
        yield (65, 0, 129), 2, head_dim, (16, 16)
        yield (65, 0, 129), 2, head_dim, (-1, -1)
    yield tuple(1 + i % 5 for i in range(500)), 1, 8, (2, 2)


def _attention_cases(size):
    for i, (lengths, heads, head_dim, window) in enumerate(_attention_grid(size)):
        rel_bias = size != "bench" and i % 3 == 2
        name = f"{_short(lengths)}-d{head_dim}-w{window[0]}.{window[1]}" + "-bias" * rel_bias
        make = _attention(lengths, heads, head_dim, window, i % 2 == 0, rel_bias)
        yield Case(
            "varlen_attention", name, make, _attention_settings(lengths, heads, head_dim, window)
        )


def _rope_attention_cases(size):
    for lengths, heads, head_dim, window in _attention_grid(size):
        if head_dim % 2:
            continue
        name = f"{_short(lengths)}-d{head_dim}-w{window[0]}.{window[1]}"
        make = _rope_attention(lengths, heads, head_dim, window)
        settings = _attention_settings(lengths, heads, head_dim, window)
        yield Case("rope_varlen_attention", name, make, settings)


def _attention_settings(lengths, heads, head_dim, window):
    return {"lengths": lengths, "heads": heads, "head_dim": head_dim, "window": window}


def useful_pairs(lengths: Sequence[int], window: tuple[int, int]) -> int:
    """Query-key pairs inside the window, edges counted exactly."""
    total = 0
    for n in lengths:
        left, right = (n if w < 0 else min(w, n) for w in window)
        before = min(left, n - 1) if n else 0
        after = min(right, n - 1) if n else 0
        total += n + sum(min(i, before) + min(i, after) for i in range(n))
    return total


def max_error(x: Tensor, exact: Tensor) -> float:
    """max |x - exact|, NaN and inf counted as infinite where they differ."""
    x, exact = x.detach().double().cpu(), exact.detach().double().cpu()
    same = (x == exact) | (x.isnan() & exact.isnan())
    difference = torch.where(same, torch.zeros_like(x), (x - exact).abs())
    difference = torch.where(difference.isnan(), torch.full_like(difference, torch.inf), difference)
    return difference.max().item() if difference.numel() else 0.0


def _largest(x: Tensor) -> float:
    magnitude = x.detach().abs()
    magnitude = magnitude[magnitude.isfinite()]
    return magnitude.max().item() if magnitude.numel() else 0.0


def assert_parity(
    name: str, actual: Tensor | None, plain: Tensor, exact: Tensor, cancelled: float = 0.0
) -> None:
    """The parity rule for one tensor.

    Args:
        name: what it is, for the message ("out", "grad of weight").
        actual: the kernel's. plain: the formula in plain PyTorch at the same dtype.
        exact: the formula in float64.
        cancelled: for a gradient, the largest magnitude of what may have cancelled in it.
    """
    assert actual is not None, f"{name}: missing"
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    floor = torch.finfo(actual.dtype).eps * _largest(exact)
    floor += 8 * torch.finfo(torch.float32).eps * cancelled
    error, allowed = max_error(actual, exact), 2 * max_error(plain, exact) + floor
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def run_with_gradients(
    fn: Callable, args: tuple, kwargs: dict, seed: int = 1
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs of ``fn`` and the gradient of each floating-point argument under random cotangents.

    cos and sin tables (second and third argument of the rope ops) get no gradient.
    """
    fixed = {1, 2} if "rope" in getattr(fn, "__name__", "") else set()
    leaves: dict[str, Tensor] = {}

    def leaf(key, x, differentiable=True):
        if not isinstance(x, Tensor) or not x.is_floating_point() or not differentiable:
            return x
        leaves[key] = x.detach().requires_grad_()
        return leaves[key]

    args = tuple(leaf(f"argument {i}", x, i not in fixed) for i, x in enumerate(args))
    kwargs = {key: leaf(key, x) for key, x in kwargs.items()}
    result = fn(*args, **kwargs)
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
    g = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=g).to(x.device, x.dtype) for x in outputs]
    differentiable = [(x, c) for x, c in zip(outputs, cotangents, strict=True) if x.requires_grad]
    if differentiable:
        torch.autograd.backward(*map(list, zip(*differentiable, strict=True)))
    return outputs, {key: x.grad for key, x in leaves.items()}


def to_double(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same call in float64."""

    def double(x):
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(map(double, args)), {key: double(x) for key, x in kwargs.items()}


def check_case(fn: Callable, ref: Callable, case: Case, dtype: torch.dtype, device="cpu") -> None:
    """Parity of ``fn`` with ``ref`` on one case: every output and every gradient."""
    args, kwargs = case.make(dtype, device)
    outputs, grads = run_with_gradients(fn, args, kwargs)
    plain_outputs, plain_grads = run_with_gradients(ref, args, kwargs)
    exact_outputs, exact_grads = run_with_gradients(ref, *to_double(args, kwargs))
    assert len(outputs) == len(plain_outputs)
    for i, triple in enumerate(zip(outputs, plain_outputs, exact_outputs, strict=True)):
        assert_parity(f"{case} {dtype} output {i}", *triple)
    cancelled = max(_largest(x) for x in (*exact_outputs, *exact_grads.values()) if x is not None)
    for key, exact in exact_grads.items():
        if exact is not None:
            name = f"{case} {dtype} gradient of {key}"
            assert_parity(name, grads[key], plain_grads[key], exact, cancelled)


def reference_of(op: str) -> Callable:
    """The plain differentiable PyTorch form of a public op, with the public op's arguments."""
    from fastenc.ops import _attention_ref as attention
    from fastenc.ops import _disentangled_ref as disentangled
    from fastenc.ops import _span_ref as span
    from fastenc.ops import _token_ref as token
    from fastenc.ops.add_layer_norm import add_layer_norm_ref
    from fastenc.ops.geglu import geglu_ref
    from fastenc.ops.rope import rope_ref
    from fastenc.ops.segment_pool import segment_pool_ref
    from fastenc.ops.varlen_attention import relative_buckets

    def varlen_attention(q, k, v, cu_seqlens, max_seqlen, window_size=(-1, -1), scale=None,
                         dropout_p=0.0, seed=None, rel_bias=None):  # fmt: skip
        table = None
        if rel_bias is not None:
            table = rel_bias[:, relative_buckets(rel_bias.shape[1], rel_bias.device)]
        return attention.varlen_attention_ref(
            q, k, v, cu_seqlens, window_size, scale, dropout_p, seed, table
        )[0]

    def rope_varlen_attention(qkv, cos, sin, cu_seqlens, max_seqlen, *args, **kwargs):
        return attention.rope_varlen_attention_ref(qkv, cos, sin, cu_seqlens, *args, **kwargs)[0]

    def disentangled_attention(q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, buckets=256,
                               max_positions=512, scale=None, dropout_p=0.0,
                               seed=None):  # fmt: skip
        terms = 1 + (pos_key is not None) + (pos_query is not None)
        return disentangled.disentangled_attention_ref(
            q, k, v, pos_key, pos_query,
            disentangled.relative_index(buckets, max_positions, q.device), cu_seqlens,
            (terms * q.shape[2]) ** -0.5 if scale is None else scale, dropout_p, seed,
        )[0]  # fmt: skip

    return {
        "disentangled_attention": disentangled_attention,
        "geglu": geglu_ref,
        "rope": rope_ref,
        "add_layer_norm": add_layer_norm_ref,
        "segment_pool": segment_pool_ref,
        "varlen_attention": varlen_attention,
        "rope_varlen_attention": rope_varlen_attention,
        "span_pool": span.span_pool_ref,
        "span_score": span.span_score_ref,
        "token_score": token.token_score_ref,
    }[op]
