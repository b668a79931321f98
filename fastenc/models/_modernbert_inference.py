"""ModernBERT's layers without gradients, fp32 on a CPU: the kernels, and nothing else between them.

Between two large kernels Python runs out of cold caches, seven times slower than when it is timed
alone: 37 ms of a forward of 8 x 128 tokens, which takes 1290. So what can be known before the first
layer is asked there, once. The layers write to the same memory: tensors made anew cost page faults,
a twentieth of a product's time, and wander through malloc's heap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastenc.nn import VarlenBatch
from fastenc.nn._modules import is_unhooked
from fastenc.nn.linear import FEW_ROWS, PrepackedLinear, is_served
from fastenc.ops._checks import CPU_HEAD_DIM

GEGLU = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
    "SiLU": "silu",
}
_KEEP_NOTHING = frozenset({nn.Linear, PrepackedLinear, nn.Dropout, nn.Identity})


def nobody_keeps(module: nn.Module) -> bool:
    """Whether no hook or adapter can keep what the embeddings return and the layers' modules are
    given and return; asked for where that memory could be taken."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    embeddings = module.embeddings
    ends = (embeddings, embeddings.norm, embeddings.drop)
    if type(embeddings.norm) is not nn.LayerNorm or not all(map(is_unhooked, ends)):
        return False  # else the norm has made a new tensor, and nobody has seen it
    return all(
        type(part) in _KEEP_NOTHING and is_unhooked(part)
        for layer in module.layers
        for part in (
            layer.attn.Wqkv, layer.attn.Wo, layer.attn.out_drop,
            layer.mlp.Wi, layer.mlp.drop, layer.mlp.Wo,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What one layer's kernels take. ``tables``: cos and sin; ``norm``s: weight, bias, eps."""

    attn_norm: tuple[Tensor, Tensor | None, float] | None
    qkv: tuple[Tensor, Tensor | None]
    tables: tuple[Tensor, Tensor]
    reach: int
    out: tuple[Tensor, Tensor | None]
    mlp_norm: tuple[Tensor, Tensor | None, float]
    wide: tuple[Tensor, Tensor | None]
    activation: str
    narrow: tuple[Tensor, Tensor | None]


def plan(module: nn.Module, x: Tensor, turn_of: Callable[[str], object]) -> list[Plan] | None:
    """The layers' plans; None where other code than the kernels below has to run.

    Args:
        module: as for ``modernbert_packed``, of which :func:`nobody_keeps` holds.
        x: (T, hidden).
        turn_of: the rotation of a layer type; has ``cos``, ``sin`` and ``rows``.
    """
    plans = []
    for layer in module.layers:
        attn, mlp = layer.attn, layer.mlp
        turn = turn_of(layer.attention_type)
        activation = GEGLU.get(type(mlp.act).__name__)
        drops = (attn.out_drop, mlp.drop)
        if (
            turn.rows is not None
            or attn.head_dim > CPU_HEAD_DIM
            or activation is None
            or any(getattr(drop, "p", 0.0) and drop.training for drop in drops)
            or (attn.training and attn.attention_dropout)
        ):
            return None
        norm = layer.attn_norm
        first = None if isinstance(norm, nn.Identity) else _norm(norm)
        reach = -1 if attn.sliding_window is None else attn.sliding_window - 1
        plans.append(
            Plan(
                first, _product(attn.Wqkv), (turn.cos, turn.sin), reach, _product(attn.Wo),
                _norm(layer.mlp_norm), _product(mlp.Wi), activation, _product(mlp.Wo),
            )
        )  # fmt: skip
    tensors = [
        t
        for p in plans
        for t in (*p.qkv, *p.out, *p.mlp_norm[:2], *p.wide, *p.narrow, *(p.attn_norm or ())[:2])
    ]
    shapes = {(p.qkv[0].shape, p.out[0].shape, p.wide[0].shape, p.narrow[0].shape) for p in plans}
    return plans if len(shapes) == 1 and is_served(x, *tensors) else None


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor | None, float]:
    return norm.weight, norm.bias, norm.eps


def _product(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return layer.weight, layer.bias


def run(plans: list[Plan], module: nn.Module, x: Tensor, batch: VarlenBatch) -> Tensor:
    """The last hidden state, (T, hidden). ``x``, (T, hidden), is overwritten.

    The branch, the norm that takes its place, and the next branch are one buffer; qkv and the
    gated rows another.
    """
    ops = torch.ops.fastenc
    linear, gated = ops.linear_fwd.default, ops.linear_geglu_fwd.default
    add_norm, attend = (
        ops.add_layer_norm_inplace_fwd.default,
        ops.rope_varlen_attention_into_fwd.default,
    )
    rows, head_dim = len(x), module.layers[0].attn.head_dim
    inner, hidden = plans[0].wide[0].shape[0] // 2, plans[0].out[0].shape[0]
    heads = plans[0].out[0].shape[1] // head_dim
    room = x.new_empty(rows * max(3 * heads * head_dim, 2 * inner if rows < FEW_ROWS else inner))

    def front(columns: int) -> Tensor:
        return room[: rows * columns].view(rows, columns)

    qkv = front(3 * heads * head_dim)
    turned = qkv.view(rows, 3, heads, head_dim)
    gate = front(inner)
    mixed, branch = x.new_empty(rows, heads * head_dim), x.new_empty(rows, hidden)
    heads_mixed = mixed.view(rows, heads, head_dim)
    packed = batch.cu_seqlens, batch.max_seqlen
    scale = head_dim**-0.5
    normed = x
    for at, layer in enumerate(plans):
        if at > 0:
            add_norm(branch, x, *layer.attn_norm)
            normed = branch
        elif layer.attn_norm is not None:
            normed = ops.add_layer_norm_fwd(x, None, *layer.attn_norm)[0]
        linear(normed, *layer.qkv, qkv)
        attend(turned, *layer.tables, *packed, layer.reach, layer.reach, scale, heads_mixed)
        linear(mixed, *layer.out, branch)
        add_norm(branch, x, *layer.mlp_norm)
        if rows < FEW_ROWS:
            both = front(2 * inner)
            linear(branch, *layer.wide, both)
            linear(ops.geglu_fwd(both, layer.activation), *layer.narrow, branch)
        else:
            gated(branch, *layer.wide, layer.activation, gate)
            linear(gate, *layer.narrow, branch)
    add_norm(branch, x, *_norm(module.final_norm))
    return branch
