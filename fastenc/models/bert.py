"""BERT, packed: one function over the module tree of transformers' BertModel and RobertaModel.

Post-norm layers; the residual sum and its norm are one op:

    x = LayerNorm(output(varlen_attention(query(x), key(x), value(x))) + x)
    x = LayerNorm(output(act(intermediate(x))) + x)

Devlin et al. 2018, arXiv:1810.04805; RoBERTa: arXiv:1907.11692; XLM-R: arXiv:1911.02116. Absolute
positions are transformers': the column of the padded input (BERT), counted from token ids
(RoBERTa), or from 0 in each sequence of a batch that never was padded.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import modeling_bert as hf

from fastenc.models._base import PackedInputs
from fastenc.models._post_norm import (
    PackedPostNorm,
    add_norm,
    embed,
    post_norm_forward,
    through,
    wanted,
    widen,
)
from fastenc.nn import VarlenBatch
from fastenc.nn.linear import linear
from fastenc.ops import varlen_attention


def bert_packed(
    module: nn.Module, inputs: PackedInputs, states: list[Tensor] | None = None
) -> Tensor:
    """The last hidden state of packed tokens.

    Args:
        module: transformers' BertModel, RobertaModel, XLMRobertaModel, or anything with their
            submodules.
        inputs: the packed batch.
        states: a list that receives the input of every layer, (T, hidden) each.

    Returns:
        (T, hidden), or (N, hidden) with ``inputs.rows``.
    """
    x = embed(module.embeddings, inputs, default_positions)
    run = functools.partial(_layer, batch=inputs.batch)
    return through(module.encoder.layer, x, states, run, inputs.rows)


def _layer(layer: nn.Module, x: Tensor, batch: VarlenBatch, rows: Tensor | None = None) -> Tensor:
    """(T, hidden) -> (T, hidden), or ``rows`` (N,) of it."""
    attn = layer.attention.self
    heads = (attn.num_attention_heads, attn.attention_head_size)
    projections = (attn.query, attn.key, attn.value)
    q, k, v = (linear(project, x).unflatten(-1, heads) for project in projections)
    dropout_p = attn.dropout.p if attn.training else 0.0
    mixed = varlen_attention(
        q, k, v, batch.cu_seqlens, batch.max_seqlen, scale=attn.scaling, dropout_p=dropout_p
    )
    mixed, x = wanted(rows, mixed.flatten(1), x)
    x = add_norm(layer.attention.output, mixed, x)
    return add_norm(layer.output, widen(layer.intermediate, x), x)


# ---- embeddings ----------------------------------------------------------------------------------


def default_positions(embeddings: nn.Module, batch: VarlenBatch) -> Tensor:
    """(T,) int64. RoBERTa counts from padding_idx + 1 and leaves padding tokens out."""
    padding_idx = getattr(embeddings, "padding_idx", None)
    if padding_idx is None:
        return batch.columns
    if batch.input_ids is None:
        return batch.positions + padding_idx + 1
    counted = (batch.input_ids != padding_idx).long()
    before = counted.cumsum(0) - counted
    starts = before.new_zeros(batch.num_seqs)
    if batch.total_tokens > 0:
        starts = before[batch.cu_seqlens[:-1].clamp(max=batch.total_tokens - 1)]
    starts = starts.repeat_interleave(batch.lengths, output_size=batch.total_tokens)
    return (before + 1 - starts) * counted + padding_idx


# ---- the model -----------------------------------------------------------------------------------


def bert_slots(modeling, name: str) -> dict[str, tuple[type, ...]]:
    """The layers that ``bert_packed`` replaces, in a ``modeling`` file of transformers."""

    def classes(*suffixes: str) -> tuple[type, ...]:
        return tuple(getattr(modeling, name + suffix) for suffix in suffixes)

    return {
        "[]": classes("Layer"),
        "embeddings": classes("Embeddings"),
        "encoder": classes("Encoder"),
        "attention": classes("Attention"),
        "self": classes("SelfAttention"),
        "output": classes("SelfOutput", "Output"),
        "intermediate": classes("Intermediate"),
        "LayerNorm": (nn.LayerNorm,),
    }


class PackedBert(PackedPostNorm):
    """``bert_packed`` in front of a transformers base model of the BERT family.

    The pooler reads the first real token of each row, also under left padding, where transformers
    reads a padding row.
    """

    _skips_rows = True

    def _encode(self, inputs: PackedInputs, states: list[Tensor] | None) -> Tensor:
        return bert_packed(self, inputs, states)

    def _graph_columns(self, inputs: PackedInputs) -> Tensor | None:
        from_ids = getattr(self.embeddings, "padding_idx", None) is not None
        return None if from_ids else inputs.batch.columns

    def _output(self, batch: VarlenBatch, hidden: Tensor):
        pooled = None if self.pooler is None else self.pooler(batch.first(hidden).unsqueeze(1))
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=batch.pad(hidden), pooler_output=pooled
        )

    def _see_first(self, output, first: Tensor) -> None:
        if self.pooler is not None:
            output.pooler_output = self.pooler(first)

    def _config_obstacle(self) -> str | None:
        if self.config.is_decoder or self.config.add_cross_attention:
            return "a decoder configuration"
        return super()._config_obstacle()


class BertModel(PackedBert, hf.BertModel):
    """transformers' BertModel: its config, parameters and outputs, padding-free inside.

    Positions of padding in ``last_hidden_state`` and ``hidden_states`` are zeros.
    """

    _slots = bert_slots(hf, "Bert")
    forward = post_norm_forward(hf.BertModel)
