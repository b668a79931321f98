"""``attn_implementation="fastenc"``: transformers' own models with fastenc's packed attention.

transformers calls a mask function once a forward and an attention function in every layer. Ours
build the packing metadata once and unpad, attend and repad in every layer; ``fastenc.accelerate``
unpads once for the whole model and is the faster way. Encoders only: causal attention, caches and
cross-attention are refused.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastenc.models._attention import windowed_with_gaps
from fastenc.models._obstacles import in_onnx_export
from fastenc.nn import VarlenBatch
from fastenc.ops import varlen_attention

NAME = "fastenc"


@dataclass(frozen=True)
class PackedMask:
    """What the mask function hands to every layer.

    ``reach``: the window in columns, on each side, that the mask alone would express; None: none.
    """

    batch: VarlenBatch
    reach: int | None = None


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PackedMask:
    """transformers' mask function. ``attention_mask`` (rows, columns) bool or None."""
    if q_length != kv_length or q_offset or kv_offset:
        raise NotImplementedError(
            f'attn_implementation="fastenc" serves self-attention without a cache, got {q_length} '
            f"queries and {kv_length} keys"
        )
    if use_vmap:
        raise NotImplementedError('attn_implementation="fastenc" takes no custom mask functions')
    batch = VarlenBatch.from_padded(
        None, attention_mask, shape=(batch_size, q_length), device=device
    )
    return PackedMask(batch, local_size)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        query: (rows, heads, columns, head_dim). key, value: the same, or with fewer heads.
        attention_mask: what :func:`packed_mask` made, or None.
        sliding_window: exclusive, as ModernBERT passes it: 65 is 64 columns on each side. Read
            where the mask tells no window: other models pass the mask's own, which is inclusive.

    Returns:
        (rows, columns, heads, head_dim), zeros in the padding, and None for the weights.
    """
    mask = _checked(module, query, key, attention_mask, kwargs)
    batch = _split(mask.batch, kwargs)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    q, k, v = (batch.pack(x.transpose(1, 2)) for x in (query, key, value))
    reach = mask.reach
    if reach is None and sliding_window is not None:
        reach = sliding_window - 1
    if batch.gaps and reach is not None:
        out = windowed_with_gaps(q, k, v, batch, reach, dropout, scaling)
    else:
        window = (-1, -1) if reach is None else (reach, reach)
        out = varlen_attention(
            q, k, v, batch.cu_seqlens, batch.max_seqlen, window, scaling, dropout
        )
    return batch.pad(out), None


def _checked(
    module: nn.Module, query: Tensor, key: Tensor, mask: object, kwargs: dict[str, Any]
) -> PackedMask:
    """The mask, after everything that packed attention does not do was refused."""
    is_causal = kwargs.get("is_causal")
    if is_causal if is_causal is not None else getattr(module, "is_causal", False):
        refused = "causal attention"
    elif query.shape[2] != key.shape[2]:
        refused = "cross-attention or a cache"
    elif kwargs.get("position_bias") is not None:
        refused = "a position bias"
    elif in_onnx_export():
        refused = 'torch.onnx.export, which needs another, such as "sdpa"'
    elif kwargs.get("softcap") is not None:
        refused = "a soft cap of the scores"
    elif mask is None:
        shape = (query.shape[0], query.shape[2])
        return PackedMask(VarlenBatch.from_padded(shape=shape, device=query.device))
    elif isinstance(mask, PackedMask):
        return PackedMask(mask.batch.to(query.device), mask.reach)
    else:
        refused = f"an attention_mask of type {type(mask).__name__} (rows, columns) excepted"
    raise NotImplementedError(f'attn_implementation="fastenc" does not serve {refused}')


# ---- sequences packed into one row ---------------------------------------------------------------

_by_positions = WeakTensorKeyDictionary()


def _split(batch: VarlenBatch, kwargs: dict[str, Any]) -> VarlenBatch:
    """``batch``, its rows split where the model says that several sequences stand in one."""
    if batch.indices is not None:
        return batch
    cu_seqlens, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if cu_seqlens is not None:
        return batch.split(cu_seqlens, kwargs.get("max_length_q"))
    if position_ids is None:
        return batch
    if position_ids.is_inference():  # what is written to it leaves no trace
        return VarlenBatch.from_padded(position_ids=position_ids, shape=batch.padded_shape)
    state = position_ids._version, batch.padded_shape
    found = _by_positions.get(position_ids)
    if found is None or found[0] != state:
        split = VarlenBatch.from_padded(position_ids=position_ids, shape=batch.padded_shape)
        found = _by_positions[position_ids] = (state, split)
    return found[1]


def with_one_mask(forward):
    """ModernBERT's forward, the metadata of both its masks built once, packed sequences apart.

    transformers' ModernBERT asks for a mask per layer type, and keeps ``position_ids`` from its
    mask and attention functions, so that sequences packed into one row would see each other.
    """

    @functools.wraps(forward)
    def run(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kw):
        given = input_ids if input_ids is not None else inputs_embeds
        plain = attention_mask is None or getattr(attention_mask, "ndim", 0) == 2
        if self.config._attn_implementation == NAME and plain and given is not None:
            batch = VarlenBatch.from_padded(
                None,
                attention_mask,
                position_ids=position_ids,
                shape=tuple(given.shape[:2]),
                device=given.device,
            )
            attention_mask = dict.fromkeys(self.config.layer_types, PackedMask(batch))
        return forward(self, input_ids, attention_mask, position_ids, inputs_embeds, **kw)

    return run
