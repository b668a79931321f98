"""Models composed of the ops; transformers is imported when one of them is first asked for."""

from __future__ import annotations

import importlib

_HOMES = {
    "BertModel": "bert",
    "DebertaV2Model": "deberta",
    "GLiNER": "gliner",
    "MPNetModel": "mpnet",
    "ModernBertForMaskedLM": "heads",
    "ModernBertForMultipleChoice": "heads",
    "ModernBertForQuestionAnswering": "heads",
    "ModernBertForSequenceClassification": "heads",
    "ModernBertForTokenClassification": "heads",
    "ModernBertModel": "modernbert",
    "RobertaModel": "roberta",
    "SentenceBody": "sentence",
    "SetFitModel": "setfit",
    "XLMRobertaModel": "roberta",
}

__all__ = [*_HOMES]


def __getattr__(name: str):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
