"""DeBERTa-v2 and v3, packed: one function over the module tree of transformers' DebertaV2Model.

Post-norm layers as in BERT, with relative positions inside the attention:

    x = LayerNorm(output(disentangled_attention(q(x), k(x), v(x), pos_key, pos_query)) + x)
    x = LayerNorm(output(act(intermediate(x))) + x)

pos_key and pos_query are projections of one table of relative embeddings. transformers makes them
again in every layer of every call; here they are kept while no gradient is wanted and no weight
changes, and else made of the rows that the longest sequence reaches.

He et al. 2020, arXiv:2006.03654; v3: arXiv:2111.09543.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

from fastenc.models._base import Holes, PackedInputs
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
from fastenc.nn._kept import Kept
from fastenc.nn.dropout import dropout
from fastenc.nn.linear import PrepackedLinear, count_fused_steps, linear
from fastenc.ops import disentangled_attention, varlen_attention
from fastenc.ops._disentangled_ref import relative_index
from fastenc.ops._rules import autocast_dtype

Tables = tuple[Tensor | None, Tensor | None]


def deberta_packed(
    module: nn.Module, inputs: PackedInputs, states: list[Tensor] | None = None
) -> Tensor:
    """The last hidden state of packed tokens.

    Args:
        module: transformers' DebertaV2Model, or anything with its submodules.
        inputs: the packed batch.
        states: a list that receives the input of every layer, (T, hidden) each.

    Returns:
        (T, hidden), or (N, hidden) with ``inputs.rows``.
    """
    x = embed(module.embeddings, inputs)
    run = functools.partial(_layer, batch=inputs.batch, relative=_Relative(module.encoder))
    return through(module.encoder.layer, x, states, run, inputs.rows)


def _layer(
    layer: nn.Module,
    x: Tensor,
    batch: VarlenBatch,
    relative: _Relative,
    rows: Tensor | None = None,
) -> Tensor:
    """(T, hidden) -> (T, hidden), or ``rows`` (N,) of it."""
    attn = layer.attention.self
    heads = (attn.num_attention_heads, attn.attention_head_size)
    q, k, v = (
        linear(project, x).unflatten(-1, heads)
        for project in (attn.query_proj, attn.key_proj, attn.value_proj)
    )
    options = {
        "scale": _scale(attn.attention_head_size, 1 + len({"c2p", "p2c"} & {*attn.pos_att_type})),
        "dropout_p": attn.dropout.p if attn.training else 0.0,
    }
    if attn.relative_attention:
        tables = relative.tables(attn, batch.max_seqlen)
        mixed = disentangled_attention(
            q, k, v, *tables, batch.cu_seqlens, batch.max_seqlen, *buckets_of(attn), **options
        )
    else:
        mixed = varlen_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, **options)
    mixed, x = wanted(rows, mixed.flatten(1), x)
    x = add_norm(layer.attention.output, mixed, x)
    return add_norm(layer.output, widen(layer.intermediate, x), x)


@functools.lru_cache(maxsize=64)
def _scale(head_dim: int, terms: int) -> float:
    """transformers takes the square root in float32."""
    return 1.0 / torch.sqrt(torch.tensor(head_dim, dtype=torch.float) * terms).item()


# ---- relative positions --------------------------------------------------------------------------


def buckets_of(attn: nn.Module) -> tuple[int, int]:
    """buckets and max_positions of ``disentangled_attention``, from transformers' attention."""
    if attn.position_buckets > 0:
        return attn.position_buckets, attn.max_relative_positions
    return attn.max_relative_positions, 0


@functools.lru_cache(maxsize=1024)
def _reach(buckets: int, max_positions: int, max_seqlen: int) -> tuple[int, int]:
    """The first table row that a sequence of this length reads, and the one past the last."""
    rows = relative_index(buckets, max_positions, torch.device("cpu"))
    radius = len(rows) // 2
    far = min(max(max_seqlen - 1, 0), radius)
    return int(rows[radius - far]), int(rows[radius + far]) + 1


_kept: weakref.WeakKeyDictionary[nn.Module, Kept[Tables]] = weakref.WeakKeyDictionary()


_LINEAR = (nn.Linear, PrepackedLinear)


class _Relative:
    """The position tables of the layers of ``encoder``.

    Kept between calls while gradients are off, in evaluation, for plain linear projections, until a
    weight that they were made of is another one or was changed: only writing through
    ``parameter.data`` in evaluation goes unseen.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder

    def tables(self, attn: nn.Module, max_seqlen: int) -> Tables:
        """pos_key and pos_query, (heads, 2 * buckets, head_dim) each, or None."""
        sources = self._sources(attn)
        if sources is None:
            rows = (0, 2 * buckets_of(attn)[0])
            if not torch.compiler.is_compiling():
                rows = _reach(*buckets_of(attn), max_seqlen)
            return self._project(attn, *rows)
        kept, lower = _kept.get(attn), autocast_dtype(sources[0].device.type)
        if kept is None or not kept.is_of(sources, lower):
            count_fused_steps()
            tables = self._project(attn, 0, 2 * buckets_of(attn)[0])
            kept = _kept[attn] = Kept(tables, sources, lower)
        return kept.value

    def _project(self, attn: nn.Module, first: int, last: int) -> Tables:
        """Both tables, made of rows [first, last) and zeros that nothing reads.

        The normed embedding is made in every layer, so that a checkpointed layer stands alone.
        """
        rows = dropout(attn.pos_dropout, self.encoder.get_rel_embedding()[first:last])
        after = 2 * buckets_of(attn)[0] - last

        def table(projection: nn.Module | None) -> Tensor | None:
            if projection is None:
                return None
            heads = (attn.num_attention_heads, attn.attention_head_size)
            x = F.pad(linear(projection, rows), (0, 0, first, after))
            return x.unflatten(-1, heads).transpose(0, 1)

        key, query = _projections(attn)
        return table(key), table(query)

    def _sources(self, attn: nn.Module) -> list[Tensor] | None:
        """The weights that the tables of ``attn`` are made of, or None where they are not kept."""
        projections = [p for p in _projections(attn) if p is not None]
        if (
            torch.is_grad_enabled()
            or attn.training
            or torch.compiler.is_compiling()
            or not all(type(p) in _LINEAR and not p._forward_hooks for p in projections)
        ):
            return None
        norm = getattr(self.encoder, "LayerNorm", None)
        sources = [self.encoder.rel_embeddings.weight]
        for module in (*projections, *([] if norm is None else [norm])):
            sources += module._parameters.values()
        sources = [x for x in sources if x is not None]
        if any(type(x) is not nn.Parameter or x.is_inference() for x in sources):
            return None
        return sources


def _projections(attn: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """What makes pos_key and pos_query of relative embeddings."""
    key = attn.key_proj if attn.share_att_key else getattr(attn, "pos_key_proj", None)
    query = attn.query_proj if attn.share_att_key else getattr(attn, "pos_query_proj", None)
    return (
        key if "c2p" in attn.pos_att_type else None,
        query if "p2c" in attn.pos_att_type else None,
    )


# ---- the model -----------------------------------------------------------------------------------


class DebertaV2Model(PackedPostNorm, hf.DebertaV2Model):
    """transformers' DebertaV2Model: its config, parameters and outputs, padding-free inside.

    Positions of padding in ``last_hidden_state`` and ``hidden_states`` are zeros. Checkpoints with
    a convolution after the first layer (v2-xlarge) run in transformers' own forward.
    """

    _skips_rows = True

    _slots = {
        "[]": (hf.DebertaV2Layer,),
        "embeddings": (hf.DebertaV2Embeddings,),
        "encoder": (hf.DebertaV2Encoder,),
        "attention": (hf.DebertaV2Attention,),
        "self": (hf.DisentangledSelfAttention,),
        "output": (hf.DebertaV2SelfOutput, hf.DebertaV2Output),
        "intermediate": (hf.DebertaV2Intermediate,),
        "LayerNorm": (nn.LayerNorm,),
    }
    forward = post_norm_forward(hf.DebertaV2Model)

    def _encode(self, inputs: PackedInputs, states: list[Tensor] | None) -> Tensor:
        if inputs.batch.gaps and getattr(self.config, "relative_attention", False):
            raise Holes("relative positions count the padding between a sequence's tokens")
        return deberta_packed(self, inputs, states)

    def _graph_columns(self, inputs: PackedInputs) -> Tensor | None:
        return None if self.embeddings.position_embeddings is None else inputs.batch.columns

    def _kept_tables(self) -> list[Any]:
        """What a packed forward reads beside the parameters, and keeps as long as they are."""
        return [_kept[attn] for attn in self.modules() if attn in _kept]

    def _config_obstacle(self) -> str | None:
        if self.encoder.conv is not None:
            return "a convolution after the first layer"
        attn = self.encoder.layer[0].attention.self if len(self.encoder.layer) else None
        if attn is not None and attn.relative_attention and attn.position_buckets > 0:
            buckets, far = buckets_of(attn)
            if buckets < 4 or buckets % 2 or far - 1 <= buckets // 2:
                return f"position_buckets = {buckets} with {far} relative positions"
        return super()._config_obstacle()
