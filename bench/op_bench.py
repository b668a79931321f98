"""What the bench files of the ops share: the bytes and FLOPs of a case, and one benchmark of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import fastenc
from bench import measure
from fastenc import testing

_ceilings: dict[str, float] = {}


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes/s) and matrix rate (FLOP/s), measured once in this process."""
    if not _ceilings:
        _ceilings.update(copy=measure.copy_bandwidth(), sgemm=measure.sgemm_rate())
    return _ceilings


def work(case: testing.Case, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """(bytes, FLOPs) that the case cannot do without: each input read once, each output written."""
    s, size = case.settings, dtype.itemsize
    if case.op == "geglu":
        elements = math.prod(s["shape"])
        return size * elements * (5 if backward else 3) // 2, 0
    if case.op == "rope":
        total, n, heads, head_dim, _ = s["shape"]
        return 2 * size * total * n * heads * head_dim, 0
    if case.op == "add_layer_norm":
        elements = math.prod(s["shape"])
        passes = 2 + 2 * s["residual"] if not backward else 3 + s["residual"]
        return size * elements * passes, 0
    if case.op == "segment_pool":
        return size * (sum(s["lengths"]) + len(s["lengths"])) * s["hidden"], 0
    if case.op in ("span_pool", "span_score", "token_score"):
        return _head_work(case, size, backward)
    window = s.get("window", (-1, -1))
    pairs = testing.useful_pairs(s["lengths"], window)
    elements = sum(s["lengths"]) * s["heads"] * s["head_dim"]
    products = 2 + len(s.get("terms", ()))
    flops = 2 * products * pairs * s["heads"] * s["head_dim"]
    return (10 if backward else 4) * size * elements, flops * 5 // 2 if backward else flops


def _head_work(case: testing.Case, size: int, backward: bool) -> tuple[int, int]:
    """GLiNER's heads: their inputs and scores move; a backward makes the rows again and multiplies
    twice, for rows and for weights."""
    s = case.settings
    words, r = sum(s["lengths"]), s["size"]
    if case.op == "span_pool":
        return size * words * r * (2 + s["max_width"]), 0
    labels, seqs = s["labels"], len(s["lengths"])
    if case.op == "span_score":
        scores = words * s["max_width"] * labels
        return size * (2 * words * r + seqs * labels * r + scores), (6 if backward else 2) * (
            scores * r
        )
    pairs = words * labels
    moved = size * ((words + seqs * labels) * (r + s["factors"]) + 3 * pairs)
    return moved, (3 if backward else 1) * 2 * pairs * r * (s["factors"] + 3)


def bench(benchmark, case: testing.Case, dtype: torch.dtype, backward: bool, fn: Callable) -> None:
    """Time ``fn`` on ``case``; bytes, FLOPs and floor / measured go to ``extra_info``."""
    args, kwargs = case.make(dtype)
    if backward:
        leaves = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor)
                  and a.is_floating_point() and "rope" not in case.op]  # fmt: skip
        if not leaves:
            leaves = [args[0].requires_grad_()]
        out = fn(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        grad = torch.randn_like(out)
        target = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
    else:
        target = lambda: fn(*args, **kwargs)  # noqa: E731
    moved, flops = work(case, dtype, backward)
    with torch.inference_mode(not backward):
        benchmark(target)
    spent = benchmark.stats.stats.median
    floor = max(moved / ceilings()["copy"], flops / ceilings()["sgemm"])
    benchmark.extra_info.update(
        bytes=moved, flops=flops, floor_us=floor * 1e6, fraction_of_floor=floor / spent
    )


def implementations(op: str) -> dict[str, Callable]:
    return {"fastenc": getattr(fastenc, op), "pytorch": testing.reference_of(op)}
