"""Packed batches and what runs on them.

``VarlenBatch`` holds packed tokens. Every fastenc model, and every transformers model that
``fastenc.accelerate`` took over, has ``forward_packed(batch) -> (total_tokens, hidden)``;
``packed_forward_of(module)`` finds it, also inside a model with a head, and is None where there is
none. ``pool`` makes one vector a sequence of its tokens'. ``prepack(module)`` keeps linear layers'
weights in the layout of the CPU's matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastenc.nn.linear import PrepackedLinear, prepack, unpack
from fastenc.nn.pooling import POOLING_MODES, pool
from fastenc.nn.varlen_batch import VarlenBatch

__all__ = [
    "POOLING_MODES",
    "PrepackedLinear",
    "VarlenBatch",
    "packed_forward_of",
    "pool",
    "prepack",
    "unpack",
]


def packed_forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """``forward_packed`` of ``module`` or of the base model that it wraps, or None.

    The callable takes a :class:`VarlenBatch` with ``input_ids`` (BERT also ``token_type_ids=``,
    (total_tokens,)) and returns the last hidden states, (total_tokens, hidden), or the ``rows=`` of
    them that are wanted.
    """
    for owner in (module, getattr(module, "base_model", None)):
        packed = getattr(owner, "forward_packed", None)
        if packed is not None:
            return packed
    return None
