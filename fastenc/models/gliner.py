"""GLiNER: named entities of any type, by name (Zaratiana et al. 2023, arXiv:2311.08526).

A text's words and its labels are encoded together, packed with other texts (or apart, in a
bi-encoder), and every short span, or every word, is scored against every label by a folded head
that never writes the spans (ops/span_score.py).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastenc.models._gliner_api import EntityApi
from fastenc.models._gliner_batch import GLiNERBatch, WordTokenizer
from fastenc.models._gliner_config import BACKBONES, GLiNERConfig
from fastenc.models._gliner_encode import encode_labels, word_representations
from fastenc.models._gliner_files import load, save
from fastenc.models._gliner_heads import (
    Hits,
    Scorer,
    SpanRepLayer,
    head_obstacle,
    projected,
    projection,
    span_hits,
    span_logits,
    token_logits,
)
from fastenc.models._gliner_html import to_html
from fastenc.nn import VarlenBatch

__all__ = ["GLiNER", "GLiNERBatch", "GLiNERConfig", "to_html"]


class _Transformer(nn.Module):
    """A backbone under gliner's name."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        name = BACKBONES[config.model_type]
        self.model = getattr(importlib.import_module("fastenc.models"), name)(config)


class _TokenRepLayer(nn.Module):
    """The text encoder, and in a bi-encoder the label encoder, with their projections."""

    def __init__(self, config: GLiNERConfig) -> None:
        super().__init__()
        self.bert_layer = _Transformer(config.encoder_config)
        if config.encoder_config.hidden_size != config.hidden_size:
            self.projection = nn.Linear(config.encoder_config.hidden_size, config.hidden_size)
        if config.bi_encoder:
            labels = config.labels_encoder_config
            self.labels_encoder = _Transformer(labels)
            if labels.hidden_size != config.hidden_size:
                self.labels_projection = nn.Linear(labels.hidden_size, config.hidden_size)


class _LSTM(nn.Module):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(hidden, hidden // 2, layers, bidirectional=True, batch_first=True)


class GLiNER(EntityApi, nn.Module):
    """A GLiNER model with gliner's parameter names, files and methods.

    Args:
        config: with ``encoder_config`` (and ``labels_encoder_config`` for a bi-encoder).
        tokenizer: of transformers, which knows ``config.ent_token`` and ``config.sep_token``.
        labels_tokenizer: of a bi-encoder's label encoder.

    Attributes:
        config: :class:`GLiNERConfig`.
        words: makes a :class:`GLiNERBatch` of words and labels (``model.words.batch``).
    """

    def __init__(
        self, config: GLiNERConfig, tokenizer: Any = None, labels_tokenizer: Any = None
    ) -> None:
        super().__init__()
        if config.encoder_config is None:
            raise ValueError("GLiNER: expected a config with an encoder_config, got none")
        self.config = config
        self.tokenizer, self.labels_tokenizer = tokenizer, labels_tokenizer
        self.token_rep_layer = _TokenRepLayer(config)
        if config.num_rnn_layers > 0:
            self.rnn = _LSTM(config.hidden_size, config.num_rnn_layers)
        if config.token_level:
            self.scorer = Scorer(config.hidden_size, config.dropout)
        else:
            self.span_rep_layer = SpanRepLayer(config.span_mode, config.hidden_size, config.dropout)
            self.prompt_rep_layer = projection(config.hidden_size, config.dropout)
        self.words = WordTokenizer(
            tokenizer, config.ent_token, config.sep_token, config.embed_ent_token
        )

    # ---- files -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, dtype: torch.dtype | None = None, **hub: Any
    ) -> GLiNER:
        """Load gliner's files: gliner_config.json, weights, tokenizer.

        Args:
            path: a folder, or a hub id. ``model.safetensors``, or ``pytorch_model.bin`` by torch's
                weights-only reader.
            dtype: of the weights; None: as stored.
            hub: revision, cache_dir, token, local_files_only of a hub id.

        Raises:
            FileNotFoundError: a file is missing.
            NotImplementedError: a kind of gliner model that fastenc does not serve.
            TypeError, ValueError: the configuration or the weights do not fit.
        """
        return load(cls, path, dtype, hub)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write a folder that gliner and :meth:`from_pretrained` load."""
        save(self, Path(path))

    # ---- scores ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def logits(
        self,
        batch: GLiNERBatch,
        labels_embeds: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Differentiable logits.

        Args:
            batch: on the model's device.
            labels_embeds: (C, D), or (num_seqs, C, D): of a bi-encoder, from
                :meth:`embed_labels`.
            seed: of the dropout inside the folded head, in training; drawn from torch's generator
                if None.

        Returns:
            Span models: (words, max_width, C), -inf past the end of a text. Token models:
            (words, C, 3), starts, ends and insides. Columns of labels that a sequence does not
            have (``batch.label_mask``) hold no meaning.
        """
        words, prompts = self._represent(batch, labels_embeds)
        if self.config.token_level:
            return token_logits(self.scorer, words, prompts, seed)
        prompts = projected(self.prompt_rep_layer, prompts)
        layer = self.span_rep_layer.span_rep_layer
        return span_logits(layer, words, prompts, self.config.max_width, seed)

    forward = logits

    def candidates(
        self,
        batch: GLiNERBatch,
        threshold: float,
        labels_embeds: Tensor | None = None,
        label_mask: Tensor | None = None,
    ) -> Hits:
        """Of a span model, the spans whose probability exceeds ``threshold``; no gradient.

        Args:
            batch, labels_embeds: as :meth:`logits` takes them.
            label_mask: (num_seqs, C) bool, which of a bi-encoder's labels a sequence has.

        Returns:
            word, width, label (int64), score (float32), 1-D each, in that order: the span is the
            packed words ``word`` to ``word + width``.
        """
        words, prompts = self._represent(batch, labels_embeds)
        mask = batch.label_mask if len(set(batch.num_labels)) > 1 else label_mask
        layer = self.span_rep_layer.span_rep_layer
        prompts = projected(self.prompt_rep_layer, prompts)
        return span_hits(layer, words, prompts, self.config.max_width, threshold, mask)

    def embed_labels(self, tokens: VarlenBatch) -> Tensor:
        """(num_seqs, D): a bi-encoder's embedding of each packed label; differentiable."""
        return encode_labels(self.token_rep_layer, tokens)

    def _represent(self, batch: GLiNERBatch, labels_embeds: Tensor | None):
        reason = head_obstacle(self)
        if reason is not None:
            raise NotImplementedError(f"the folded head reads weights only, but {reason}")
        words, prompts = word_representations(self, batch)
        if prompts is None:
            if labels_embeds is None:
                raise ValueError("a bi-encoder's logits need labels_embeds")
            prompts = labels_embeds.to(words.x.dtype)
            prompts = prompts if prompts.dim() == 3 else prompts.unsqueeze(0)
        return words, prompts
