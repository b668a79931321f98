"""Models with heads: transformers' classes, losses, outputs and weights over packed layers.

A head computes what transformers computes from padded hidden states, with two exceptions: one that
reads the first token gets the first *real* token under any padding, and a masked-language-model
decoder runs on real tokens only. Padding holds zeros; where a loss would read it (answer positions
over all columns, labels in the padding), transformers' own forward runs.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert import modeling_bert as bert
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta
from transformers.models.modernbert import modeling_modernbert as modernbert
from transformers.models.mpnet import modeling_mpnet as mpnet
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta
from transformers.utils import can_return_tuple

from fastenc.models._base import PackedModel
from fastenc.models._loading import StrictLoading
from fastenc.models._old_config import WritesBothFormats
from fastenc.models._takeover import our_class
from fastenc.nn.linear import linear


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


class _Asked(nn.Module):
    """A base model that gets ``hidden_as`` with every call."""

    def __init__(self, base: nn.Module, hidden_as: str) -> None:
        super().__init__()
        self.base, self.hidden_as = base, hidden_as
        self.embeddings = base.embeddings  # which a decoder with tied weights reads

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs, fastenc_hidden_as=self.hidden_as)


def _asking(theirs: type, model, hidden_as: str, *args, **kwargs):
    """``theirs.forward`` of ``model`` with ``hidden_as`` for the base model."""
    if theirs.__module__ not in (deberta.__name__, mpnet.__name__):
        return theirs.forward(model, *args, **kwargs, fastenc_hidden_as=hidden_as)
    view = copy.copy(model)  # these heads hand no keywords on
    asked = _Asked(model.base_model, hidden_as)
    view._modules = {**model._modules, model.base_model_prefix: asked}
    return theirs.forward(view, *args, **kwargs)


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
            if not isinstance(self.base_model, PackedModel):
                return theirs.forward(self, *args, **kwargs)
            hidden_as = choose(self, dict(zip(names, args, strict=False)) | kwargs)
            return _asking(theirs, self, hidden_as, *args, **kwargs)

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

BertForTokenClassification = _packed_head(bert.BertForTokenClassification, _token_labels)
BertForQuestionAnswering = _packed_head(bert.BertForQuestionAnswering, _answer_positions)

RobertaForSequenceClassification = _packed_head(roberta.RobertaForSequenceClassification, _first)
RobertaForTokenClassification = _packed_head(roberta.RobertaForTokenClassification, _token_labels)
RobertaForQuestionAnswering = _packed_head(roberta.RobertaForQuestionAnswering, _answer_positions)

XLMRobertaForSequenceClassification = _packed_head(
    xlm_roberta.XLMRobertaForSequenceClassification, _first
)
XLMRobertaForTokenClassification = _packed_head(
    xlm_roberta.XLMRobertaForTokenClassification, _token_labels
)
XLMRobertaForQuestionAnswering = _packed_head(
    xlm_roberta.XLMRobertaForQuestionAnswering, _answer_positions
)

DebertaV2ForSequenceClassification = _packed_head(
    deberta.DebertaV2ForSequenceClassification, _first
)
DebertaV2ForTokenClassification = _packed_head(
    deberta.DebertaV2ForTokenClassification, _token_labels
)
DebertaV2ForQuestionAnswering = _packed_head(
    deberta.DebertaV2ForQuestionAnswering, _answer_positions
)
DebertaV2ForMultipleChoice = _packed_head(deberta.DebertaV2ForMultipleChoice, _first)

MPNetForSequenceClassification = _packed_head(mpnet.MPNetForSequenceClassification, _first)
MPNetForTokenClassification = _packed_head(mpnet.MPNetForTokenClassification, _token_labels)
MPNetForQuestionAnswering = _packed_head(mpnet.MPNetForQuestionAnswering, _answer_positions)


# ---- masked-language-model heads: the decoder on packed rows -------------------------------------


def _modernbert_scores(model, hidden: Tensor, outputs) -> dict[str, Tensor]:
    return {"logits": linear(model.decoder, model.head(hidden))}


def _bert_scores(model, hidden: Tensor, outputs) -> dict[str, Tensor]:
    return {"logits": model.cls(hidden)}


def _roberta_scores(model, hidden: Tensor, outputs) -> dict[str, Tensor]:
    return {"logits": model.lm_head(hidden)}


def _deberta_scores(model, hidden: Tensor, outputs) -> dict[str, Tensor]:
    if model.legacy:
        return _bert_scores(model, hidden, outputs)
    return {"logits": model.lm_predictions(hidden, model.get_input_embeddings())}


def _pretraining_scores(model, hidden: Tensor, outputs) -> dict[str, Tensor]:
    tokens, sentences = model.cls(hidden, outputs.pooler_output)
    return {"prediction_logits": tokens, "seq_relationship_logits": sentences}


def _modernbert_loss(model, scores: dict[str, Tensor], given: dict[str, Any]) -> Tensor | None:
    rest = {k: x for k, x in given.items() if k not in _INPUTS}
    size = model.config.vocab_size
    return model.loss_function(scores["logits"], given["labels"], vocab_size=size, **rest)


def _bert_loss(model, scores: dict[str, Tensor], given: dict[str, Any]) -> Tensor | None:
    return F.cross_entropy(scores["logits"], given["labels"])


def _pretraining_loss(model, scores: dict[str, Tensor], given: dict[str, Any]) -> Tensor | None:
    sentences = given.get("next_sentence_label")
    if sentences is None:
        return None
    tokens = F.cross_entropy(scores["prediction_logits"], given["labels"])
    return tokens + F.cross_entropy(scores["seq_relationship_logits"], sentences.view(-1))


_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels"})
_NEEDLESS = frozenset({"labels", "next_sentence_label"})  # for the base model


def _masked_lm(theirs: type, output: type, scores_of: Callable, loss_of: Callable) -> type:
    """fastenc's subclass of ``theirs``, its decoder on real tokens, or on labelled ones only."""
    names = [*inspect.signature(theirs.forward).parameters][1:]

    @can_return_tuple
    @functools.wraps(theirs.forward)
    def forward(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        if not isinstance(self.base_model, PackedModel):
            return theirs.forward(self, **given)
        if _token_labels(self, given) != "padded":
            return _asking(theirs, self, "everywhere", **given)
        inputs = {name: x for name, x in given.items() if name not in _NEEDLESS}
        outputs = self.base_model(**inputs, fastenc_hidden_as="packed", return_dict=True)
        batch, hidden = outputs.varlen_batch, outputs.last_hidden_state
        labels = given.get("labels")
        sparse = labels is not None and getattr(self.config, "sparse_prediction", False)
        if labels is not None:
            labels = batch.pack(labels.to(hidden.device))
        if sparse:
            chosen = labels != getattr(self.config, "sparse_pred_ignore_index", -100)
            hidden, labels = hidden[chosen], labels[chosen]
        scores = scores_of(self, hidden, outputs)
        loss = None if labels is None else loss_of(self, scores, given | {"labels": labels})
        if not sparse:
            first = next(iter(scores))
            scores[first] = batch.pad(scores[first])
        return output(
            loss=loss,
            **scores,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    members = {
        "__module__": __name__,
        "__doc__": f"""transformers' {theirs.__name__}, its decoder on real tokens only.

    Logits are zeros in the padding. With ``config.sparse_prediction`` and labels the decoder runs
    where labels are, and the logits are (labels given, vocabulary), as in transformers' ModernBERT.
    """,
        "forward": forward,
    }
    mixins = (WritesBothFormats, PackedHead) if theirs.__module__ == modernbert.__name__ else ()
    return type(theirs.__name__, (*(mixins or (PackedHead,)), theirs), members)


ModernBertForMaskedLM = _masked_lm(
    modernbert.ModernBertForMaskedLM, MaskedLMOutput, _modernbert_scores, _modernbert_loss
)
BertForMaskedLM = _masked_lm(bert.BertForMaskedLM, MaskedLMOutput, _bert_scores, _bert_loss)
BertForPreTraining = _masked_lm(
    bert.BertForPreTraining, bert.BertForPreTrainingOutput, _pretraining_scores, _pretraining_loss
)
RobertaForMaskedLM = _masked_lm(
    roberta.RobertaForMaskedLM, MaskedLMOutput, _roberta_scores, _bert_loss
)
XLMRobertaForMaskedLM = _masked_lm(
    xlm_roberta.XLMRobertaForMaskedLM, MaskedLMOutput, _roberta_scores, _bert_loss
)
DebertaV2ForMaskedLM = _masked_lm(
    deberta.DebertaV2ForMaskedLM, MaskedLMOutput, _deberta_scores, _bert_loss
)
MPNetForMaskedLM = _masked_lm(mpnet.MPNetForMaskedLM, MaskedLMOutput, _roberta_scores, _bert_loss)
