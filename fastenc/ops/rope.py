"""Rotary position embedding, rotate-half form: ``(a, b) -> (a cos - b sin, b cos + a sin)``.

x (total_tokens, heads, head_dim) or (total_tokens, n, heads, head_dim), with a the first and b the
second half of head_dim; cos, sin (max_pos, head_dim // 2); positions (total_tokens,). Arithmetic in
fp32 and one rounding, as transformers does; the backward is the inverse rotation. RoFormer: Su et
al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import at_most_float32, lower_precision, wide


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """The specification, in plain differentiable PyTorch at the promoted dtype of x and cos."""
    spread = (x.shape[0], *(1,) * (x.dim() - 2), cos.shape[1])
    c, s = cos[positions].view(spread), sin[positions].view(spread)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)


def _forward_ref(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    c, s = cos.to(wide(x).dtype), sin.to(wide(x).dtype)
    return rope_ref(wide(x), c, s, positions).to(x.dtype)


def _backward_ref(grad: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    return _forward_ref(grad, cos, -sin, positions)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx, bwd, grad):
    return (None if grad is None else bwd(grad, *ctx.saved_tensors)), None, None, None


define(
    OpSpec(
        name="rope",
        forward="(Tensor x, Tensor cos, Tensor sin, Tensor positions) -> Tensor",
        backward="(Tensor grad, Tensor cos, Tensor sin, Tensor positions) -> Tensor",
        forward_fake=_fake,
        backward_fake=_fake,
        forward_ref=_forward_ref,
        backward_ref=_backward_ref,
        save=_save,
        differentiate=_differentiate,
        autocast=lower_precision(1),
    )
)


def check_tables(cos: Tensor, sin: Tensor, head_dim: int, like: Tensor) -> None:
    """``cos`` and ``sin``: (max_pos, head_dim // 2), one shape and dtype, no gradient."""
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.floating(name, table, 2)
        _checks.same_device(name, table, "x", like)
        if table.shape[1] * 2 != head_dim:
            raise ValueError(
                f"{name}: expected (max_pos, {head_dim // 2}) for head_dim {head_dim}, "
                f"got {tuple(table.shape)}"
            )
        if table.requires_grad:
            raise ValueError(f"{name}: has requires_grad=True, but the tables get no gradient")
    if cos.shape != sin.shape:
        raise ValueError(f"sin: expected the shape of cos {tuple(cos.shape)}, got {sin.shape}")
    _checks.same_dtype("sin", sin, "cos", cos, cast=False)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``x`` by its positions.

    Args:
        x: (total_tokens, heads, head_dim) or (total_tokens, n, heads, head_dim), any strides.
        cos, sin: (max_pos, head_dim // 2), any floating-point dtype.
        positions: (total_tokens,) int32 or int64, each in [0, max_pos).

    Returns:
        A new contiguous tensor of the shape and dtype of ``x``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; on CPU tensors (on a GPU under
            ``debug_checks``) also a position outside the tables.
    """
    _checks.floating("x", x, (3, 4))
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even head_dim, got {x.shape[-1]}")
    check_tables(cos, sin, x.shape[-1], x)
    _checks.tensor("positions", positions, 1)
    _checks.same_device("positions", positions, "x", x)
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions: expected int32 or int64, got {positions.dtype}")
    if positions.shape[0] != x.shape[0]:
        raise ValueError(
            f"positions: expected total_tokens = {x.shape[0]} entries, got {positions.shape[0]}"
        )
    if positions.numel() and _checks.readable(positions):
        low, high = (int(p) for p in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"positions: expected 0 to {cos.shape[0] - 1} (rows of cos), got {low} to {high}"
            )
    cos, sin = at_most_float32(cos, x), at_most_float32(sin, x)
    return select("rope", x)(x, cos, sin, positions)
