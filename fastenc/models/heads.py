"""Models with heads: transformers' classes, losses, outputs and weights over packed layers.

A head computes what transformers computes from padded hidden states, with two exceptions: one that
reads the first token gets the first *real* token under any padding, and ModernBERT's
masked-language-model decoder runs on real tokens only. Padding holds zeros; where a loss would
read it (answer positions over all columns, labels in the padding), transformers' own forward runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert import modeling_bert as bert
from transformers.models.modernbert import modeling_modernbert as modernbert
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta
from transformers.utils import can_return_tuple

from fastenc.models._base import PackedModel
from fastenc.models._loading import StrictLoading
from fastenc.models._old_config import WritesBothFormats
from fastenc.models._takeover import our_class


class PackedHead(StrictLoading):
    """Mixin in front of a transformers model with a head: its base model becomes fastenc's."""

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self.base_model.__class__ = our_class(type(self.base_model))


# ---- what a head needs of the last hidden state (CallOptions.hidden_as) --------------------------


def _first(model, given: dict[str, Any]) -> str:
    return "first"


def _first_if_cls(model, given: dict[str, Any]) -> str:
    return "first" if model.config.classifier_pooling == "cls" else "padded"


def _token_labels(model, given: dict[str, Any]) -> str:
    labels, mask = given.get("labels"), given.get("attention_mask")
    counted = _countable(labels, mask) and bool(((labels != -100) & (mask == 0)).any())
    return "everywhere" if counted else "padded"


def _countable(labels: object, mask: object) -> bool:
    return isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.shape == mask.shape


def _answer_positions(model, given: dict[str, Any]) -> str:
    trained = given.get("start_positions") is not None and given.get("end_positions") is not None
    return "everywhere" if trained else "padded"


def _packed_head(theirs: type, choose: Callable[[Any, dict[str, Any]], str] | None) -> type:
    """fastenc's subclass of ``theirs``, which asks the base model for what ``choose`` says."""
    members: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"transformers' {theirs.__name__} over packed layers.",
    }
    if choose is not None:
        names = [*inspect.signature(theirs.forward).parameters][1:]

        @functools.wraps(theirs.forward)
        def forward(self, *args, **kwargs):
            if isinstance(self.base_model, PackedModel):
                given = dict(zip(names, args, strict=False)) | kwargs
                kwargs["fastenc_hidden_as"] = choose(self, given)
            return theirs.forward(self, *args, **kwargs)

        members["forward"] = forward
    mixins = (
        (WritesBothFormats, PackedHead)
        if theirs.__module__ == modernbert.__name__
        else (PackedHead,)
    )
    return type(theirs.__name__, (*mixins, theirs), members)


ModernBertForSequenceClassification = _packed_head(
    modernbert.ModernBertForSequenceClassification, _first_if_cls
)
ModernBertForTokenClassification = _packed_head(
    modernbert.ModernBertForTokenClassification, _token_labels
)
ModernBertForQuestionAnswering = _packed_head(
    modernbert.ModernBertForQuestionAnswering, _answer_positions
)
ModernBertForMultipleChoice = _packed_head(modernbert.ModernBertForMultipleChoice, None)

BertForPreTraining = _packed_head(bert.BertForPreTraining, _token_labels)
BertForMaskedLM = _packed_head(bert.BertForMaskedLM, _token_labels)
BertForTokenClassification = _packed_head(bert.BertForTokenClassification, _token_labels)
BertForQuestionAnswering = _packed_head(bert.BertForQuestionAnswering, _answer_positions)

RobertaForMaskedLM = _packed_head(roberta.RobertaForMaskedLM, _token_labels)
RobertaForSequenceClassification = _packed_head(roberta.RobertaForSequenceClassification, _first)
RobertaForTokenClassification = _packed_head(roberta.RobertaForTokenClassification, _token_labels)
RobertaForQuestionAnswering = _packed_head(roberta.RobertaForQuestionAnswering, _answer_positions)

XLMRobertaForMaskedLM = _packed_head(xlm_roberta.XLMRobertaForMaskedLM, _token_labels)
XLMRobertaForSequenceClassification = _packed_head(
    xlm_roberta.XLMRobertaForSequenceClassification, _first
)
XLMRobertaForTokenClassification = _packed_head(
    xlm_roberta.XLMRobertaForTokenClassification, _token_labels
)
XLMRobertaForQuestionAnswering = _packed_head(
    xlm_roberta.XLMRobertaForQuestionAnswering, _answer_positions
)


class ModernBertForMaskedLM(WritesBothFormats, PackedHead, modernbert.ModernBertForMaskedLM):
    """transformers' ModernBertForMaskedLM, its decoder on real tokens only.

    Logits are zeros in the padding. With ``config.sparse_prediction`` and labels the decoder runs
    where labels are, and ``logits`` are (labels given, vocabulary), as in transformers.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ):
        """As transformers' forward; ``labels`` (rows, columns), -100 where none is."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        if not isinstance(self.model, PackedModel):
            return super().forward(**inputs, labels=labels, **kwargs)
        if _token_labels(self, {"labels": labels, "attention_mask": attention_mask}) != "padded":
            return super().forward(
                **inputs, labels=labels, fastenc_hidden_as="everywhere", **kwargs
            )
        outputs = self.model(**inputs, **kwargs, fastenc_hidden_as="packed", return_dict=True)
        batch, hidden = outputs.varlen_batch, outputs.last_hidden_state
        labels = None if labels is None else batch.pack(labels)
        sparse = self.sparse_prediction and labels is not None
        if sparse:
            given = labels != self.sparse_pred_ignore_index
            hidden, labels = hidden[given], labels[given]
        logits = self.decoder(self.head(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss,
            logits=logits if sparse else batch.pad(logits),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
