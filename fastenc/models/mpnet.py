"""MPNet, packed: one function over the module tree of transformers' MPNetModel.

BERT's post-norm layers; one table of relative positions, shared by all layers, is added to the
scores inside the attention and never becomes a (heads, L, L) tensor:

    x = LayerNorm(o(varlen_attention(q(x), k(x), v(x), rel_bias)) + x)
    x = LayerNorm(output(act(intermediate(x))) + x)

Song et al. 2020, arXiv:2004.09297; buckets of relative positions: arXiv:1910.10683. Absolute
positions are counted from token ids, as in RoBERTa.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mpnet import modeling_mpnet as hf

from fastenc.models._base import Holes, PackedInputs
from fastenc.models._post_norm import add_norm, embed, post_norm_forward, through, widen
from fastenc.models.bert import PackedBert, default_positions
from fastenc.nn import VarlenBatch
from fastenc.nn.dropout import dropout
from fastenc.nn.linear import linear
from fastenc.ops import add_layer_norm, varlen_attention

BUCKETS = 32
"""transformers' encoder always computes this many, whatever the config says."""


def mpnet_packed(
    module: nn.Module, inputs: PackedInputs, states: list[Tensor] | None = None
) -> Tensor:
    """The last hidden state of packed tokens.

    Args:
        module: transformers' MPNetModel, or anything with its submodules.
        inputs: the packed batch, without holes.
        states: a list that receives the input of every layer, (T, hidden) each.

    Returns:
        (T, hidden).
    """
    x = embed(module.embeddings, inputs, default_positions)
    rel_bias = module.encoder.relative_attention_bias.weight.t()
    run = functools.partial(_layer, rel_bias=rel_bias, batch=inputs.batch)
    return through(module.encoder.layer, x, states, run)


def _layer(layer: nn.Module, x: Tensor, rel_bias: Tensor, batch: VarlenBatch) -> Tensor:
    """(T, hidden) -> (T, hidden); rel_bias (heads, buckets)."""
    outer, attn = layer.attention, layer.attention.attn
    heads = (attn.num_attention_heads, attn.attention_head_size)
    q, k, v = (linear(project, x).unflatten(-1, heads) for project in (attn.q, attn.k, attn.v))
    dropout_p = attn.dropout.p if attn.training else 0.0
    mixed = varlen_attention(
        q, k, v, batch.cu_seqlens, batch.max_seqlen, dropout_p=dropout_p, rel_bias=rel_bias
    )
    branch = dropout(outer.dropout, linear(attn.o, mixed.flatten(1)))
    norm = outer.LayerNorm
    x = add_layer_norm(branch, x, norm.weight, norm.bias, norm.eps)[0]
    return add_norm(layer.output, widen(layer.intermediate, x), x)


class MPNetModel(PackedBert, hf.MPNetModel):
    """transformers' MPNetModel: its config, parameters and outputs, padding-free inside.

    Positions of padding in ``last_hidden_state`` and ``hidden_states`` are zeros. Token types are
    ignored, as transformers ignores them.
    """

    _slots = {
        "[]": (hf.MPNetLayer,),
        "embeddings": (hf.MPNetEmbeddings,),
        "encoder": (hf.MPNetEncoder,),
        "relative_attention_bias": (nn.Embedding,),
        "attention": (hf.MPNetAttention,),
        "attn": (hf.MPNetSelfAttention,),
        "output": (hf.MPNetOutput,),
        "intermediate": (hf.MPNetIntermediate,),
        "LayerNorm": (nn.LayerNorm,),
    }
    forward = post_norm_forward(hf.MPNetModel)

    def _encode(self, inputs: PackedInputs, states: list[Tensor] | None) -> Tensor:
        if inputs.batch.gaps:
            raise Holes("relative positions count the padding between a sequence's tokens")
        return mpnet_packed(self, inputs, states)

    def _implied_positions(self, input_ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """Counted over the padded rows, as transformers does, so that masks of any kind agree."""
        padding_idx = self.embeddings.padding_idx
        if input_ids is None:
            return self.embeddings.position_ids[:, : shape[1]] + padding_idx + 1
        return hf.create_position_ids_from_input_ids(input_ids, padding_idx)

    def _output(self, batch: VarlenBatch, hidden: Tensor):
        pooled = None if self.pooler is None else self.pooler(batch.first(hidden).unsqueeze(1))
        return BaseModelOutputWithPooling(last_hidden_state=batch.pad(hidden), pooler_output=pooled)

    def _as_tuple(self, output) -> tuple:
        """With the pooler's place, also where there is none: MPNet's heads count on it."""
        hidden, *others = output.to_tuple()
        return (hidden, *others) if self.pooler is not None else (hidden, None, *others)

    def _config_obstacle(self) -> str | None:
        buckets = self.encoder.relative_attention_bias.num_embeddings
        return None if buckets == BUCKETS else f"relative_attention_num_buckets = {buckets}"
