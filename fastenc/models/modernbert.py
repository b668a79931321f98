"""ModernBERT, packed: one function over the module tree of transformers' ModernBertModel.

Pre-norm layers; the residual sum and the next norm are one op:

    normed, x = add_layer_norm(branch, x)      branch: the previous block's output
    branch    = Wo(rope_varlen_attention(Wqkv(normed)))
    normed, x = add_layer_norm(branch, x)
    branch    = Wo(geglu(Wi(normed)))           one kernel without gradients on a CPU

Warner et al. 2024, arXiv:2412.13663. Ettin, mmBERT, gte-modernbert and Granite embedding R2 are
configurations of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.modernbert import modeling_modernbert as hf

from fastenc.models import _modernbert_inference as inference
from fastenc.models._attention import windowed_with_gaps
from fastenc.models._base import PackedInputs, PackedModel, checkpointed, forward_like
from fastenc.models._old_config import WritesBothFormats
from fastenc.models._rotary import depends_on_length, kept_tables, rope_rows, rope_table
from fastenc.nn import VarlenBatch
from fastenc.nn.linear import gated, linear
from fastenc.ops import (
    _checks,
    add_layer_norm,
    rope,
    rope_varlen_attention,
    varlen_attention,
)
from fastenc.ops._registry import note_fallback
from fastenc.ops._rules import autocast_dtype
from fastenc.ops.add_layer_norm import add_layer_norm_inplace


def modernbert_packed(
    module: nn.Module, inputs: PackedInputs, states: list[Tensor] | None = None
) -> Tensor:
    """The last hidden state of packed tokens, after the final norm.

    Args:
        module: transformers' ModernBertModel, or anything with its submodules.
        inputs: the packed batch.
        states: a list that receives the input of every layer, (T, hidden) each.

    Returns:
        (T, hidden).
    """
    batch = inputs.batch
    x = module.embeddings(input_ids=batch.input_ids, inputs_embeds=inputs.inputs_embeds)
    rotate = _Rotations(module.rotary_emb, inputs, x)
    branch: Tensor | None = None
    ours = x.device.type == "cpu" and states is None and inference.nobody_keeps(module)
    plans = inference.plan(module, x, rotate.of) if ours else None
    if plans:
        return inference.run(plans, module, x, batch)
    for layer in module.layers:
        turn = rotate.of(layer.attention_type)
        if states is not None:
            x, branch = _sum(x, branch), None
            states.append(x)
        if checkpointed(layer):
            run = _whole_layer(layer, batch, turn)
            x, branch = layer._gradient_checkpointing_func(run, _sum(x, branch)), None
        else:
            x, branch = _layer(layer, x, branch, batch, turn, ours)
    return _norm(module.final_norm, x, branch, ours)[0]


def _layer(
    layer: nn.Module,
    x: Tensor,
    branch: Tensor | None,
    batch: VarlenBatch,
    turn: _Turn,
    ours: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer on the residual stream ``x`` and what is still to be added to it.

    ``ours``: nobody else holds ``x`` or a branch.
    """
    normed, x = _norm(layer.attn_norm, x, branch, ours)
    branch = _attention(layer.attn, normed, batch, turn)
    del normed
    normed, x = _norm(layer.mlp_norm, x, branch, ours)
    return x, _mlp(layer.mlp, normed)


def _attention(attn: nn.Module, x: Tensor, batch: VarlenBatch, turn: _Turn) -> Tensor:
    qkv = linear(attn.Wqkv, x).unflatten(-1, (3, -1, attn.head_dim))
    mixed = _attend(attn, qkv, batch, turn).flatten(1)
    del qkv  # three times the hidden states, of no use to the next product
    return attn.out_drop(linear(attn.Wo, mixed))


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return linear(mlp.Wo, mlp.drop(_gate(mlp, x)))


def _whole_layer(layer: nn.Module, batch: VarlenBatch, turn: _Turn):
    """``_layer`` from residual stream to residual stream: one saved tensor under checkpointing."""

    def run(x: Tensor) -> Tensor:
        x, branch = _layer(layer, x, None, batch, turn)
        return x + branch

    return run


def _sum(x: Tensor, branch: Tensor | None) -> Tensor:
    return x if branch is None else x + branch


def _norm(
    norm: nn.Module, x: Tensor, branch: Tensor | None, ours: bool = False
) -> tuple[Tensor, Tensor]:
    """``x + branch`` normed, and the sum itself; layer 0 has no attention norm.

    ``ours``: nobody else holds ``x`` and ``branch``, whose memory may be taken.
    """
    if branch is not None:
        add_norm = add_layer_norm_inplace if ours else add_layer_norm
        return add_norm(branch, x, norm.weight, norm.bias, norm.eps)
    if isinstance(norm, nn.Identity):
        return x, x
    return add_layer_norm(x, None, norm.weight, norm.bias, norm.eps)


def _gate(mlp: nn.Module, x: Tensor) -> Tensor:
    activation = inference.GEGLU.get(type(mlp.act).__name__)
    if activation is not None:
        return gated(mlp.Wi, x, activation)
    note_fallback(f"ModernBERT: no gated kernel for {type(mlp.act).__name__}, plain PyTorch runs")
    a, gate = linear(mlp.Wi, x).chunk(2, dim=-1)
    return mlp.act(a) * gate


# ---- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Turn:
    """How one layer type rotates: by position, or (``rows`` given) by a row for each token."""

    cos: Tensor
    sin: Tensor
    rows: Tensor | None


class _Rotations:
    """The rotations of a forward, made once for each layer type."""

    def __init__(self, rotary: nn.Module, inputs: PackedInputs, like: Tensor) -> None:
        self.rotary, self.batch, self.like = rotary, inputs.batch, like.detach()
        self.positions = _rope_positions(inputs)
        self.made: dict[str, _Turn] = {}

    def of(self, layer_type: str) -> _Turn:
        if layer_type not in self.made:
            self.made[layer_type] = self._make(layer_type)
        return self.made[layer_type]

    def _make(self, layer_type: str) -> _Turn:
        batch = self.batch
        if self.positions is None:
            columns = batch.padded_shape[1] if batch.padded_shape else batch.max_seqlen
            table = rope_table(self.rotary, batch.max_seqlen, columns, layer_type, self.like)
            if not torch.compiler.is_compiling():  # once a forward, not once a layer
                lower = autocast_dtype(batch.device.type)
                table = [x if lower is None else x.to(lower) for x in table]
            return _Turn(*table, None)
        table = rope_rows(self.rotary, self.positions, layer_type, self.like)
        return _Turn(*table, torch.arange(batch.total_tokens, device=batch.device))


def _rope_positions(inputs: PackedInputs) -> Tensor | None:
    """(T,) positions to rotate by, or None where they count from 0 in each sequence."""
    if inputs.position_ids is None:
        return inputs.batch.columns if inputs.batch.gaps else None
    if _checks.readable(inputs.position_ids) and torch.equal(
        inputs.position_ids, inputs.batch.positions
    ):
        return None
    return inputs.position_ids


def _attend(attn: nn.Module, qkv: Tensor, batch: VarlenBatch, turn: _Turn) -> Tensor:
    """qkv (T, 3, heads, head_dim) -> (T, heads, head_dim)."""
    reach = -1 if attn.sliding_window is None else attn.sliding_window - 1
    dropout_p = attn.attention_dropout if attn.training else 0.0
    packed = (batch.cu_seqlens, batch.max_seqlen)
    if turn.rows is None:
        return rope_varlen_attention(
            qkv, turn.cos, turn.sin, *packed, (reach, reach), dropout_p=dropout_p
        )
    q, k = rope(qkv[:, :2], turn.cos, turn.sin, turn.rows).unbind(1)
    if batch.gaps and reach >= 0:
        return windowed_with_gaps(q, k, qkv[:, 2], batch, reach, dropout_p)
    return varlen_attention(q, k, qkv[:, 2], *packed, (reach, reach), dropout_p=dropout_p)


# ---- the model -----------------------------------------------------------------------------------


class ModernBertModel(WritesBothFormats, PackedModel, hf.ModernBertModel):
    """transformers' ModernBertModel: its config, parameters and outputs, padding-free inside.

    Positions of padding in ``last_hidden_state`` and ``hidden_states`` are zeros.
    """

    _slots = {
        "[]": (hf.ModernBertEncoderLayer,),
        "embeddings": (hf.ModernBertEmbeddings,),
        "attn": (hf.ModernBertAttention,),
        "mlp": (hf.ModernBertMLP,),
        "attn_norm": (nn.LayerNorm, nn.Identity),
        "mlp_norm": (nn.LayerNorm,),
        "final_norm": (nn.LayerNorm,),
    }
    forward = forward_like(
        hf.ModernBertModel, "input_ids", "attention_mask", "position_ids", "inputs_embeds"
    )

    def _encode(self, inputs: PackedInputs, states: list[Tensor] | None) -> Tensor:
        return modernbert_packed(self, inputs, states)

    def _graph_rows(self, inputs: PackedInputs) -> dict[str, Tensor | None] | None:
        by_length = any(map(depends_on_length, self.rotary_emb.rope_type.values()))
        return None if by_length else super()._graph_rows(inputs)

    def _kept_tables(self) -> list[Any]:
        return kept_tables(self.rotary_emb)
