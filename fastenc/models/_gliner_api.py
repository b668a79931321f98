"""gliner's methods: names, arguments, fields and order are the gliner package's (0.2.29)."""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastenc.models import _gliner_plan as plan
from fastenc.models._gliner_predict import CPU_TOKENS_PER_THREAD, Options, predict
from fastenc.nn import VarlenBatch
from fastenc.nn._kept import Kept
from fastenc.nn._modules import evaluating

Labels = str | Sequence[str] | Mapping[str, str] | Sequence[Sequence[str]] | Sequence[Mapping]
Entities = list[dict[str, Any]]

COUNT_FROM_PADDING = ("roberta", "xlm-roberta")
"""Backbones whose first token has position pad_token_id + 1."""

_label_embeddings: weakref.WeakKeyDictionary[nn.Module, Kept[dict[str, Tensor]]] = (
    weakref.WeakKeyDictionary()
)


class EntityApi:
    """Mixin of :class:`fastenc.GLiNER`: texts and labels in, entities out."""

    @torch.inference_mode()
    def inference(
        self,
        texts: str | Sequence[str],
        labels: Labels,
        flat_ner: bool = True,
        threshold: float = 0.5,
        multi_label: bool = False,
        batch_size: int | None = None,
        packing_config: Any = None,
        input_spans: Sequence[Sequence[Mapping[str, int]]] | None = None,
        return_class_probs: bool = False,
        *,
        truncate: bool = False,
        return_cut: bool = False,
        token_budget: int = 16384,
        labels_per_pass: int = plan.LABELS_PER_PASS,
        show_progress: bool | None = None,
        labels_embeds: Tensor | None = None,
    ) -> list[Entities] | tuple[list[Entities], list[int]]:
        """The entities of texts.

        Texts longer than ``config.max_len`` words are read in overlapping windows, and entities are
        chosen in the whole text at once.

        Args:
            texts: a string, or strings. Blank ones have no entities.
            labels: strings, or {name: description}, for all texts, or one of these for each text.
            flat_ner: no two entities overlap; else entities may lie within others.
            threshold: of the probability, in [0, 1].
            multi_label: a span may have several labels.
            batch_size, packing_config: gliner's; taken and not needed: batches are packed and cut
                by ``token_budget``.
            input_spans: for each text, {"start", "end"} characters of the only spans to classify.
            return_class_probs: also "class_probs", the five most probable labels of the span; not
                of token-level models, as in gliner.
            truncate: cut texts after ``config.max_len`` words, as gliner does.
            return_cut: also return how many words ``truncate`` cut off each text.
            token_budget: most tokens in a batch, labels included; at most 2048 a thread on a CPU.
            labels_per_pass: labels read beside a text at once; more are read in further passes and
                compete for the text's spans in the end.
            show_progress: a bar on stderr; None: once it has run for two seconds.
            labels_embeds: (labels, D) of a bi-encoder, from :meth:`encode_labels`.

        Returns:
            For each text its entities by start: {"start", "end": characters, "text", "label",
            "score"}. With ``return_cut``, also the numbers of words that were cut off.

        Raises:
            TypeError, ValueError: the arguments do not fit; texts and labels are named by index.
        """
        texts = plan.check_texts(texts)
        sets = plan.check_labels(labels, len(texts), self.config.max_len)
        options = Options(
            threshold=_probability(threshold),
            flat_ner=bool(flat_ner),
            multi_label=bool(multi_label),
            truncate=bool(truncate),
            class_probs=bool(return_class_probs),
            token_budget=self._budget(token_budget),
            labels_per_pass=_positive("labels_per_pass", labels_per_pass),
            show_progress=show_progress,
        )
        if input_spans is not None and len(input_spans) != len(texts):
            raise ValueError(f"input_spans: expected {len(texts)} lists, got {len(input_spans)}")
        with evaluating(self):
            embeds = self._embeds(sets, labels_embeds)
            entities, cut = predict(self, texts, sets, input_spans, options, embeds)
        return (entities, cut) if return_cut else entities

    def predict_entities(
        self,
        text: str,
        labels: Labels,
        flat_ner: bool = True,
        threshold: float = 0.5,
        multi_label: bool = False,
        return_class_probs: bool = False,
        **options: Any,
    ) -> Entities:
        """The entities of one text; further options are :meth:`inference`'s."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected a string, got {type(text).__name__}")
        options["return_class_probs"] = return_class_probs
        found = self.inference(
            [text], labels, flat_ner, threshold, multi_label, **{"show_progress": False, **options}
        )
        return (found[0][0], found[1][0]) if options.get("return_cut") else found[0]

    def batch_predict_entities(
        self,
        texts: Sequence[str],
        labels: Labels,
        flat_ner: bool = True,
        threshold: float = 0.5,
        multi_label: bool = False,
        **options: Any,
    ) -> list[Entities]:
        """:meth:`inference` under gliner's older name."""
        return self.inference(texts, labels, flat_ner, threshold, multi_label, **options)

    # ---- bi-encoders ---------------------------------------------------------------------------

    def encode_labels(self, labels: Sequence[str], batch_size: int | None = None) -> Tensor:
        """(labels, D): a bi-encoder's embeddings, to be used with ``batch_predict_with_embeds``.

        ``batch_size`` is gliner's; batches are packed.

        Raises:
            NotImplementedError: the model has no label encoder.
        """
        if not self.config.bi_encoder:
            raise NotImplementedError("encode_labels: only bi-encoders embed labels alone")
        labels = plan.check_texts(labels)
        if not labels:
            raise ValueError("labels: expected at least one, got none")
        with torch.no_grad(), evaluating(self):
            return self._label_rows(labels)

    def batch_predict_with_embeds(
        self,
        texts: Sequence[str],
        labels_embeddings: Tensor,
        labels: Sequence[str],
        flat_ner: bool = True,
        threshold: float = 0.5,
        multi_label: bool = False,
        batch_size: int | None = None,
        packing_config: Any = None,
        input_spans: Sequence[Sequence[Mapping[str, int]]] | None = None,
        return_class_probs: bool = False,
        **options: Any,
    ) -> list[Entities]:
        """:meth:`inference` with labels that :meth:`encode_labels` has embedded, (labels, D)."""
        return self.inference(
            texts, labels, flat_ner, threshold, multi_label, batch_size, packing_config,
            input_spans, return_class_probs, labels_embeds=labels_embeddings, **options,
        )  # fmt: skip

    def predict_with_embeds(
        self,
        text: str,
        labels_embeddings: Tensor,
        labels: Sequence[str],
        flat_ner: bool = True,
        threshold: float = 0.5,
        multi_label: bool = False,
        return_class_probs: bool = False,
        **options: Any,
    ) -> Entities:
        """:meth:`predict_entities` with labels that :meth:`encode_labels` has embedded."""
        return self.predict_entities(
            text, labels, flat_ner, threshold, multi_label, return_class_probs,
            labels_embeds=labels_embeddings, **options,
        )  # fmt: skip

    # ---- inside --------------------------------------------------------------------------------

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of a sequence, special ones included; None where there is no limit."""
        return _max_tokens(self.tokenizer, self.config.encoder_config)

    def _budget(self, asked: int) -> int:
        asked = _positive("token_budget", asked)
        if self.device.type != "cpu":
            return asked
        return min(asked, CPU_TOKENS_PER_THREAD * torch.get_num_threads())

    def _embeds(self, sets: list[plan.LabelSet], given: Tensor | None) -> dict[int, Tensor] | None:
        """Label embeddings by ``id`` of the label set."""
        if not self.config.bi_encoder:
            if given is not None:
                raise NotImplementedError("labels_embeds: only a bi-encoder takes them")
            return None
        distinct = {id(one): one for one in sets}
        if given is None:
            return {i: self._label_rows(one.prompts) for i, one in distinct.items() if one.prompts}
        if len(distinct) > 1:
            raise ValueError("labels_embeds: expected one set of labels for all texts")
        for i, one in distinct.items():
            shape = (len(one.prompts), self.config.hidden_size)
            if not isinstance(given, Tensor) or tuple(given.shape) != shape:
                raise ValueError(
                    f"labels_embeds: expected a tensor {shape}, a row for each distinct label, got "
                    f"{tuple(getattr(given, 'shape', ()))}"
                )
            return {i: given.to(self.device)}
        return {}

    def _label_rows(self, labels: Sequence[str]) -> Tensor:
        """Embeddings of labels, each made once until a weight changes."""
        weights = list(_label_weights(self))
        kept = _label_embeddings.get(self)
        if kept is None or not kept.is_of(weights):
            kept = _label_embeddings[self] = Kept({}, weights)
        rows = kept.value
        new = [label for label in dict.fromkeys(labels) if label not in rows]
        if new:
            limit = _max_tokens(self.labels_tokenizer, self.config.labels_encoder_config)
            cut = {} if limit is None else {"truncation": True, "max_length": limit}
            ids = self.labels_tokenizer(new, **cut)["input_ids"]
            budget = self._budget(16384)
            first = 0
            while first < len(new):
                stop, taken = first + 1, len(ids[first])
                while stop < len(new) and taken + len(ids[stop]) <= budget:
                    taken += len(ids[stop])
                    stop += 1
                made = self.embed_labels(VarlenBatch.from_lists(ids[first:stop], self.device))
                rows.update(zip(new[first:stop], made.unbind(0), strict=True))
                first = stop
        return torch.stack([rows[label] for label in labels])


def _label_weights(model: Any) -> Iterator[Tensor]:
    layer = model.token_rep_layer
    yield from layer.labels_encoder.parameters()
    if hasattr(layer, "labels_projection"):
        yield from layer.labels_projection.parameters()


def _max_tokens(tokenizer: Any, config: Any) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if config.model_type == "deberta-v2" and not getattr(config, "position_biased_input", True):
        positions = None
    elif config.model_type in COUNT_FROM_PADDING and positions is not None:
        positions -= config.pad_token_id + 1
    limits = (getattr(tokenizer, "model_max_length", None), positions)
    return min((limit for limit in limits if limit and 0 < limit < 10**9), default=None)


def _probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"threshold: expected a float, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"threshold: expected a probability in [0, 1], got {value}")
    return float(value)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)
