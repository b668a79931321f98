"""cos and sin of a transformers rotary module, as the ops take them: (rows, head_dim // 2).

The values are transformers' own (the rotary module is called, so every rope scaling a config can
name is served): computed in fp32, cast to the activations' dtype. Tables by position are kept until
the module's frequencies, the dtype or the device change.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Kept:
    frequencies: Tensor
    version: int
    cos: Tensor
    sin: Tensor


_kept: weakref.WeakKeyDictionary[nn.Module, dict[tuple, _Kept]] = weakref.WeakKeyDictionary()


def rope_rows(
    rotary: nn.Module, positions: Tensor, layer_type: str, like: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin of each of ``positions`` (rows,), in the dtype of ``like``."""
    cos, sin = rotary(like, positions.unsqueeze(0), layer_type)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def rope_table(
    rotary: nn.Module, max_seqlen: int, columns: int, layer_type: str, like: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin of the positions 0, 1, ... (at least ``max_seqlen`` rows).

    ``columns``: the padded width, by which dynamic rope scalings choose their frequencies.
    """
    if depends_on_length(rotary.rope_type[layer_type]):
        return _computed(rotary, max(columns, max_seqlen), layer_type, like)
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return _computed(rotary, max_seqlen, layer_type, like)
    frequencies = getattr(rotary, f"{layer_type}_inv_freq")
    version = 0 if frequencies.is_inference() else frequencies._version
    tables = _kept.setdefault(rotary, {})
    key = (layer_type, like.dtype, like.device)
    found = tables.get(key)
    if (
        found is None
        or found.frequencies is not frequencies
        or found.version != version
        or found.cos.shape[0] < max_seqlen
    ):
        rows = max(rotary.config.max_position_embeddings, 1 << (max_seqlen - 1).bit_length())
        cos, sin = _computed(rotary, rows, layer_type, like)
        found = tables[key] = _Kept(frequencies, version, cos, sin)
    return found.cos, found.sin


def kept_tables(rotary: nn.Module) -> list[_Kept]:
    """The tables kept for ``rotary`` now; a longer sequence replaces them."""
    return list(_kept.get(rotary, {}).values())


def depends_on_length(rope_type: str) -> bool:
    """Whether frequencies change with the length of the input."""
    return "dynamic" in rope_type or rope_type == "longrope"


def _computed(rotary: nn.Module, rows: int, layer_type: str, like: Tensor) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return rope_rows(rotary, torch.arange(rows, device=like.device), layer_type, like)
    with torch.inference_mode(False), torch.no_grad():  # a kept table may serve training later
        blank = torch.empty(0, dtype=like.dtype, device=like.device)
        return rope_rows(rotary, torch.arange(rows, device=like.device), layer_type, blank)
