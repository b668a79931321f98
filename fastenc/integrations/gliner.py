"""gliner: a live model's forward, its decoder and its collation are replaced, and given back.

- forward: uni-encoder span and token models and bi-encoder span models run packed, with folded
  heads; logits, losses and fields are gliner's.
- decoder: candidates are chosen in C++, and only what was chosen becomes an object.
- processor: labels of dummy spans are made at once, not span by span.

Objects change their class to a subclass of it, as transformers models do: parameters, names and
state stay as they are. What the packed forward does not do runs in gliner's own, with one reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gliner.data_processing.processor import BiEncoderSpanProcessor, UniEncoderSpanProcessor
from gliner.decoding.decoder import Span, SpanDecoder, TokenDecoder
from gliner.modeling.base import BiEncoderSpanModel, UniEncoderSpanModel, UniEncoderTokenModel
from gliner.modeling.outputs import GLiNERBaseOutput
from gliner.modeling.span_rep import SpanRepLayer
from torch import Tensor, nn

from fastenc import _C
from fastenc.integrations import transformers
from fastenc.integrations._gliner_padded import Padded
from fastenc.models._gliner_config import SPAN_MODES
from fastenc.models._gliner_encode import encode_labels, word_representations
from fastenc.models._gliner_heads import (
    head_obstacle,
    projected,
    span_logits,
    token_logits,
)
from fastenc.models._obstacles import traced
from fastenc.nn import VarlenBatch, linear, packed_forward_of
from fastenc.ops._registry import note_fallback
from fastenc.ops._rules import wide

_MARK = "_fastenc_was"


def accelerate(obj: Any, prepack: bool = False) -> Any:
    """Take over a gliner model, or the module inside of one."""
    model = getattr(obj, "model", obj)
    transformers.accelerate(model)
    if not _take(model):
        kinds = ", ".join(cls.__name__ for cls in _TAKEN if issubclass(cls, nn.Module))
        note_fallback(
            f"{type(model).__name__}: only its encoder was accelerated; fully served are {kinds}"
        )
    elif obj is not model:
        _take(obj.decoder)
        _take(obj.data_processor)
    if prepack:
        linear.prepack(model)
    return obj


def restore(obj: Any) -> Any:
    """Undo :func:`accelerate`."""
    model = getattr(obj, "model", obj)
    for part in (model, getattr(obj, "decoder", None), getattr(obj, "data_processor", None)):
        was = getattr(part, "__dict__", {}).pop(_MARK, None)
        if was is not None:
            part.__class__ = was
    transformers.restore(model)
    return obj


def _take(part: Any) -> bool:
    """Change the class of a part of a gliner model; whether it is taken over now."""
    if _MARK in part.__dict__:
        return True
    cls = _TAKEN.get(type(part))
    if cls is None:
        return False
    part.__dict__[_MARK] = type(part)
    part.__class__ = cls
    return True


# ---- forward -------------------------------------------------------------------------------------


def _forward(self, *args: Any, **kwargs: Any) -> GLiNERBaseOutput:
    """gliner's forward. No mixin holds it: an object only changes to a class of its layout."""
    base = type(self).__mro__[1]
    reason = _obstacle(self, args, kwargs)
    if reason is not None:
        note_fallback(f"{base.__name__}: {reason}")
        return base.forward(self, *args, **kwargs)
    return self._packed(**kwargs)


def _obstacle(self, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why this call runs in gliner's own forward, or None."""
    tracer = traced()
    if tracer is not None:
        return tracer
    if args:
        return "positional arguments"
    if kwargs.get("return_embeddings"):
        return "return_vectors asks for span representations"
    if kwargs.get("pair_attention_mask") is not None:
        return "pair_attention_mask"
    config = self.config
    if getattr(config, "precomputed_prompts_mode", False):
        return "precomputed prompts"
    if getattr(config, "fuse_layers", False):
        return "fuse_layers"
    if getattr(config, "represent_spans", False):
        return "represent_spans"
    if hasattr(self, "cross_fuser") and isinstance(self, BiEncoderSpanModel):
        return "post_fusion_schema"
    layer = getattr(self, "span_rep_layer", None)
    if isinstance(layer, SpanRepLayer):
        if type(layer.context_encoder).__name__ != "IdentityContextEncoder":
            return "a context encoder before the span head"
        if type(layer.span_rep_layer).__name__ not in _HEADS:
            return f"span_mode {config.span_mode!r}; served are {', '.join(SPAN_MODES)}"
    encoders = [self.token_rep_layer.bert_layer]
    encoders += [getattr(self.token_rep_layer, "labels_encoder", None)]
    for encoder in filter(None, encoders):
        if packed_forward_of(encoder.model) is None:
            return f"{type(encoder.model).__name__} has no packed form"
    return head_obstacle(self)


def _finish(
    self,
    padded: Padded,
    logits: Tensor,
    words: Tensor,
    prompts: Tensor,
    prompts_mask: Tensor,
    labels: Tensor | None,
    label_axis: int,
    loss_mask: Tensor,
    kwargs: dict[str, Any],
) -> GLiNERBaseOutput:
    """gliner's output object; ``labels`` make a loss of its own."""
    loss = None
    if labels is not None:
        missing = max(0, labels.shape[label_axis] - prompts_mask.shape[1])
        if missing:
            raise ValueError(
                f"labels: expected at most {prompts_mask.shape[1]} classes, "
                f"got {labels.shape[label_axis]}"
            )
        loss = self.loss(logits, labels, prompts_mask, loss_mask, **kwargs)
    return GLiNERBaseOutput(
        logits=logits,
        loss=loss,
        prompts_embedding=prompts,
        prompts_embedding_mask=prompts_mask,
        words_embedding=padded.pad(words),
        mask=padded.mask,
    )


_HEADS = ("SpanMarker", "SpanMarkerV0", "SpanMarkerV1", "SpanMarkerV2")


class PackedUniEncoderSpanModel(UniEncoderSpanModel):
    """gliner's UniEncoderSpanModel on packed words."""

    forward = _forward

    def _packed(
        self, input_ids, attention_mask, words_mask, text_lengths, span_idx, span_mask,
        labels=None, word_lengths=None, **kwargs,
    ):  # fmt: skip
        width = self.config.max_width
        padded = Padded.read(
            self.config, input_ids, attention_mask, words_mask, text_lengths, word_lengths,
            span_idx.shape[1] // width,
        )  # fmt: skip
        words, prompts = word_representations(self, padded.batch)
        prompts = projected(self.prompt_rep_layer, prompts)
        logits = span_logits(self.span_rep_layer.span_rep_layer, words, prompts, width)
        return _finish(
            self, padded, padded.pad_spans(logits), words.x, prompts, padded.label_mask, labels, -1,
            span_mask, kwargs,
        )  # fmt: skip


class PackedUniEncoderTokenModel(UniEncoderTokenModel):
    """gliner's UniEncoderTokenModel on packed words."""

    forward = _forward

    def _packed(
        self, input_ids, attention_mask, words_mask, text_lengths, labels=None, word_lengths=None,
        threshold=0.5, span_idx=None, span_mask=None, span_labels=None, **kwargs,
    ):  # fmt: skip
        columns = None if labels is None else labels.shape[1]
        padded = Padded.read(
            self.config, input_ids, attention_mask, words_mask, text_lengths, word_lengths, columns
        )
        words, prompts = word_representations(self, padded.batch)
        logits = padded.pad(token_logits(self.scorer, words, prompts))
        return _finish(
            self,
            padded,
            logits,
            words.x,
            prompts,
            padded.label_mask,
            labels,
            -2,
            padded.mask,
            kwargs,
        )


class PackedBiEncoderSpanModel(BiEncoderSpanModel):
    """gliner's BiEncoderSpanModel on packed words and labels."""

    forward = _forward

    def _packed(
        self, input_ids, attention_mask, words_mask, text_lengths, span_idx, span_mask,
        labels_embeds=None, labels_input_ids=None, labels_attention_mask=None, labels=None,
        labels_gather_indices=None, prompts_embedding_mask=None, word_lengths=None, **kwargs,
    ):  # fmt: skip
        width = self.config.max_width
        padded = Padded.read(
            self.config, input_ids, attention_mask, words_mask, text_lengths, word_lengths,
            span_idx.shape[1] // width, markers=False,
        )  # fmt: skip
        words, _ = word_representations(self, padded.batch)
        if labels_embeds is None:
            tokens = VarlenBatch.from_padded(labels_input_ids, labels_attention_mask)
            labels_embeds = encode_labels(self.token_rep_layer, tokens)
        labels_embeds = labels_embeds.to(words.x.dtype)
        if labels_gather_indices is not None:
            labels_embeds = labels_embeds[labels_gather_indices.to(labels_embeds.device)]
        if labels_embeds.dim() == 2:
            labels_embeds = labels_embeds.unsqueeze(0)
        rows = padded.batch.num_seqs
        mask = prompts_embedding_mask
        if mask is None:
            mask = torch.ones(
                rows, labels_embeds.shape[1], dtype=attention_mask.dtype, device=words.x.device
            )
        else:
            mask = mask.to(words.x.device, attention_mask.dtype)
            labels_embeds = labels_embeds * mask.unsqueeze(-1).to(labels_embeds.dtype)
        prompts = projected(self.prompt_rep_layer, labels_embeds)
        logits = span_logits(self.span_rep_layer.span_rep_layer, words, prompts, width)
        return _finish(
            self, padded, padded.pad_spans(logits), words.x, prompts.expand(rows, -1, -1), mask,
            labels, -1, span_mask, kwargs,
        )  # fmt: skip


# ---- decoder -------------------------------------------------------------------------------------


def _each(value: Any, count: int, name: str) -> list:
    """One value a text: gliner takes a list of them too."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must have length {count}, got {len(value)}")
    return list(value)


def _greedy_search(self, spans, flat_ner=True, multi_label=False):
    """gliner's greedy search in O(n log n)."""
    columns = [[getattr(s, name) for s in spans] for name in ("start", "end", "score")]
    edges = np.array([0, len(spans)])
    chosen, _ = _C.select_spans(*map(np.array, columns), edges, flat_ner, multi_label)
    return [spans[i] for i in chosen]


def _chosen(count, text, start, end, label, score, slot, names, flat_ner, multi_label):
    """Span objects of what greedy search keeps, text by text; arrays are sorted by text."""
    edges = np.searchsorted(text, np.arange(count + 1))
    flat, multi = _each(flat_ner, count, "flat_ner"), _each(multi_label, count, "multi_label")
    found = []
    for i in range(count):
        rows = slice(edges[i], edges[i + 1])
        own = [x[rows] for x in (start, end, label, score)]
        kept, _ = _C.select_spans(
            own[0], own[1], own[3], np.array([0, len(own[0])]), flat[i], multi[i]
        )
        columns = [x[kept].tolist() for x in own]
        slots = [None] * len(kept) if slot is None else slot[rows][kept].tolist()
        found.append(
            [
                Span(s, e, names[i][c + 1], p, class_index=c, span_index=k)
                for s, e, c, p, k in zip(*columns, slots, strict=True)
            ]
        )
    return found


class FastSpanDecoder(SpanDecoder):
    """gliner's SpanDecoder; only chosen spans become objects."""

    greedy_search = _greedy_search

    def _decode_batch(
        self, probs, tokens, id_to_classes, K, threshold, flat_ner, multi_label, span_label_maps,
        return_class_probs=False, input_spans=None,
    ):  # fmt: skip
        if return_class_probs or input_spans is not None:
            return super()._decode_batch(
                probs, tokens, id_to_classes, K, threshold, flat_ner, multi_label, span_label_maps,
                return_class_probs, input_spans,
            )  # fmt: skip
        count, labels = probs.shape[0], probs.shape[-1]
        names = [self._get_id_to_class_for_sample(id_to_classes, i) for i in range(count)]
        limits = _each(threshold, count, "threshold")
        hit = probs > torch.tensor(limits, dtype=probs.dtype, device=probs.device).view(-1, 1, 1, 1)
        if any(len(one) < labels for one in names):
            known = [[c + 1 in one for c in range(labels)] for one in names]
            hit &= torch.tensor(known, device=probs.device).view(count, 1, 1, labels)
        text, start, width, label = hit.nonzero(as_tuple=True)
        score = wide(probs[text, start, width, label])
        rows = [x.cpu().numpy() for x in (text, start, width, label, score)]
        sizes = np.array([len(one) for one in tokens])
        inside = rows[1] + rows[2] < sizes[rows[0]]
        text, start, width, label, score = (x[inside] for x in rows)
        return _chosen(
            count, text, start, start + width, label, score, start * K + width, names, flat_ner,
            multi_label,
        )  # fmt: skip


class FastTokenDecoder(TokenDecoder):
    """gliner's TokenDecoder; starts and ends are matched in C++."""

    greedy_search = _greedy_search

    def decode(
        self, tokens, id_to_classes, model_output=None, flat_ner=False, threshold=0.5,
        multi_label=False, span_logits=None, span_idx=None, span_mask=None,
        return_class_probs=False, input_spans=None, **kwargs,
    ):  # fmt: skip
        if model_output is None or span_logits is not None or input_spans is not None:
            return super().decode(
                tokens, id_to_classes, model_output, flat_ner, threshold, multi_label, span_logits,
                span_idx, span_mask, return_class_probs, input_spans, **kwargs,
            )  # fmt: skip
        count = len(tokens)
        names = [self._get_id_to_class_for_sample(id_to_classes, i) for i in range(count)]
        scores = torch.sigmoid(model_output).float().cpu().numpy()
        columns = []
        for i, limit in enumerate(_each(threshold, count, "threshold")):
            own = scores[i, : len(tokens[i])]
            edges, known = np.array([0, len(own)]), np.array([len(names[i])])
            found = _C.token_spans(own, edges, known, limit)[:4]
            columns.append((np.full(len(found[0]), i), *found))
        merged = [np.concatenate(x) for x in zip(*columns, strict=True)]
        return _chosen(count, *merged, None, names, flat_ner, multi_label)


# ---- collation -----------------------------------------------------------------------------------


def _span_labels(self, ner, classes_to_id, num_tokens, spans_idx):
    """Labels of all spans, without a Python loop over the spans."""
    width = len(spans_idx) // num_tokens if num_tokens else 0
    labels = torch.zeros(len(spans_idx), dtype=torch.long)
    known = self.get_dict(ner, classes_to_id) if ner else {}
    for (start, end), label in known.items():
        if 0 <= start < num_tokens and 0 <= end - start < width:
            labels[start * width + end - start] = label
    return labels.masked_fill(spans_idx[:, 1] > num_tokens - 1, -1), spans_idx


class FastUniEncoderSpanProcessor(UniEncoderSpanProcessor):
    """gliner's UniEncoderSpanProcessor with quick span labels."""

    prepare_span_labels = _span_labels


class FastBiEncoderSpanProcessor(BiEncoderSpanProcessor):
    """gliner's BiEncoderSpanProcessor with quick span labels."""

    prepare_span_labels = _span_labels


_TAKEN: dict[type, type] = {
    UniEncoderSpanModel: PackedUniEncoderSpanModel,
    UniEncoderTokenModel: PackedUniEncoderTokenModel,
    BiEncoderSpanModel: PackedBiEncoderSpanModel,
    SpanDecoder: FastSpanDecoder,
    TokenDecoder: FastTokenDecoder,
    UniEncoderSpanProcessor: FastUniEncoderSpanProcessor,
    BiEncoderSpanProcessor: FastBiEncoderSpanProcessor,
}
