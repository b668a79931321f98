"""The strongest peer that torch alone can build: ModernBERT packed by hand around torch's own
varlen attention (FlashAttention 2 inside), everything else as transformers computes it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from fastenc.nn import VarlenBatch


def forward(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(rows, columns, hidden) of transformers' ModernBertModel; attention_mask on any device."""
    from torch.nn.attention.varlen import varlen_attn

    batch = VarlenBatch.from_padded(input_ids, attention_mask)
    x = model.embeddings(input_ids=batch.input_ids)
    positions = batch.positions.unsqueeze(0)
    tables = {kind: model.rotary_emb(x, positions, kind) for kind in {*model.config.layer_types}}
    for layer in model.layers:
        attn = layer.attn
        qkv = attn.Wqkv(layer.attn_norm(x)).unflatten(-1, (3, -1, attn.head_dim))
        q, k, v = qkv.transpose(0, 2).unbind(1)  # (heads, tokens, head_dim)
        cos, sin = tables[layer.attention_type]
        q, k = apply_rotary_pos_emb(q.unsqueeze(0), k.unsqueeze(0), cos, sin, unsqueeze_dim=1)
        reach = -1 if attn.sliding_window is None else attn.sliding_window - 1
        edges, longest = batch.cu_seqlens, batch.max_seqlen
        mixed = varlen_attn(
            *(t.transpose(0, 1).contiguous() for t in (q[0], k[0], v)),
            edges, edges, longest, longest, window_size=(reach, reach),
        )  # fmt: skip
        x = x + attn.Wo(mixed.flatten(1))
        x = x + layer.mlp(layer.mlp_norm(x))
    return batch.pad(model.final_norm(x))
