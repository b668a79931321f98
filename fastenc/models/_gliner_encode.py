"""Packed tokens to packed words and label prompts: the part of GLiNER below its heads.

The functions take a module with gliner's submodules: a model of gliner's, or fastenc's GLiNER.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastenc.models._gliner_batch import GLiNERBatch
from fastenc.models._gliner_heads import Words
from fastenc.nn import VarlenBatch, packed_forward_of
from fastenc.nn.linear import linear
from fastenc.ops import segment_pool


def encode_tokens(
    token_rep_layer: nn.Module, tokens: VarlenBatch, rows: Tensor | None = None
) -> Tensor:
    """(total_tokens, D): the text encoder and its projection, where it has one.

    (N, D) where only ``rows`` (N,) int64 of it are wanted.
    """
    hidden = packed_forward_of(token_rep_layer.bert_layer.model)(tokens, rows=rows)
    projection = getattr(token_rep_layer, "projection", None)
    return hidden if projection is None else linear(projection, hidden)


def encode_labels(token_rep_layer: nn.Module, tokens: VarlenBatch) -> Tensor:
    """(num_seqs, D): the label encoder of a bi-encoder, projected and averaged over tokens."""
    hidden = packed_forward_of(token_rep_layer.labels_encoder.model)(tokens)
    projection = getattr(token_rep_layer, "labels_projection", None)
    if projection is not None:
        hidden = linear(projection, hidden)
    return segment_pool(hidden, tokens.cu_seqlens, "mean")


def words_and_prompts(
    token_rep_layer: nn.Module, batch: GLiNERBatch, mode: str
) -> tuple[Tensor, Tensor]:
    """Each word's first, last, mean or largest subtoken, and the labels' tokens.

    Returns:
        (words, D), zeros for a word without tokens; (num_seqs * C, D), anything where a label does
        not exist.
    """
    labels = batch.label_rows.flatten().clamp(min=0)
    if mode not in ("first", "last"):
        hidden = encode_tokens(token_rep_layer, batch.tokens)
        return pool_words(hidden, batch, mode), hidden.index_select(0, labels)
    rows = batch.word_rows if mode == "first" else batch.word_ends
    rows = rows.clamp(0, max(batch.tokens.total_tokens - 1, 0)) if batch.dropped else rows
    hidden = encode_tokens(token_rep_layer, batch.tokens, torch.cat([rows, labels]))
    words, prompts = hidden.split([rows.shape[0], labels.shape[0]])
    if batch.dropped:
        words = words.masked_fill((batch.word_ends < batch.word_rows).unsqueeze(1), 0.0)
    return words, prompts


def pool_words(hidden: Tensor, batch: GLiNERBatch, mode: str) -> Tensor:
    """(total_tokens, D) -> (words, D): each word's mean or largest subtoken.

    Zeros for a word without tokens.
    """
    # Segments: what lies before a word, the word, and so on; the last is behind the last word.
    edges = torch.stack([batch.word_rows, batch.word_ends + 1], 1).flatten()
    edges = torch.nn.functional.pad(edges, (1, 0))
    edges = torch.nn.functional.pad(edges, (0, 1), value=hidden.shape[0])
    return segment_pool(hidden, edges.int(), mode)[1::2]


def recur(rnn: nn.Module, words: Words) -> Words:
    """gliner's BiLSTM over packed words; no padding on the way."""
    if words.x.shape[0] == 0:
        return words
    order, sizes = _time_major(words.lengths)
    order = order.to(words.x.device, non_blocking=True)
    packed = PackedSequence(words.x.index_select(0, order), sizes)
    out = rnn.lstm(packed)[0].data
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    return Words(out.index_select(0, inverse), words.cu_words, words.lengths)


@torch.compiler.disable  # numpy on lengths: traced, they would be symbols
def _time_major(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Packed rows in the order of a PackedSequence, and how many sequences reach each step."""
    counts = np.asarray(lengths, np.int64)
    starts = np.cumsum(counts) - counts
    longest_first = np.argsort(-counts, kind="stable")
    step = np.arange(int(counts.max()))[:, None]
    reached = step < counts[longest_first]
    rows = (starts[longest_first] + step)[reached]
    return torch.from_numpy(rows), torch.from_numpy(reached.sum(1))


def word_representations(model: nn.Module, batch: GLiNERBatch) -> tuple[Words, Tensor | None]:
    """The words of a batch, and the label prompts that were read before them.

    Returns:
        Words of (words, D), and (num_seqs, C, D), zeros where a sequence has no such label; None
        for a bi-encoder, whose prompts are embeddings of labels.
    """
    config = model.config
    mode = getattr(config, "subtoken_pooling", "first")
    x, prompts = words_and_prompts(model.token_rep_layer, batch, mode)
    words = Words(x, batch.cu_words, batch.word_lengths)
    if getattr(model.token_rep_layer, "labels_encoder", None) is not None:
        # gliner's bi-encoders carry an LSTM that nothing calls: trained weights expect that
        return words, None
    rnn = getattr(model, "rnn", None)
    if rnn is not None:
        words = recur(rnn, words)
    prompts = prompts.unflatten(0, tuple(batch.label_rows.shape))
    if len(set(batch.num_labels)) > 1:
        prompts = prompts.masked_fill(~batch.label_mask.unsqueeze(-1), 0.0)
    return words, prompts
