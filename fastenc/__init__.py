"""fastenc: encoder models without padding, on hand-written kernels."""

import importlib as _importlib

from fastenc import nn  # noqa: F401
from fastenc.integrations import accelerate, restore
from fastenc.ops import *  # noqa: F403
from fastenc.ops import __all__ as _ops

__version__ = "0.1.0"

# Imported when first asked for: `import fastenc` brings neither transformers nor tokenizers.
_HOMES = {
    "BertModel": "fastenc.models",
    "DebertaV2Model": "fastenc.models",
    "Encoder": "fastenc.encoder",
    "GLiNER": "fastenc.models",
    "MPNetModel": "fastenc.models",
    "ModernBertForMaskedLM": "fastenc.models",
    "ModernBertForMultipleChoice": "fastenc.models",
    "ModernBertForQuestionAnswering": "fastenc.models",
    "ModernBertForSequenceClassification": "fastenc.models",
    "ModernBertForTokenClassification": "fastenc.models",
    "ModernBertModel": "fastenc.models",
    "RobertaModel": "fastenc.models",
    "SentenceBody": "fastenc.models",
    "SetFitDistillationTrainer": "fastenc.train.setfit",
    "SetFitModel": "fastenc.models",
    "SetFitTrainer": "fastenc.train.setfit",
    "SetFitTrainingArguments": "fastenc.train.setfit",
    "XLMRobertaModel": "fastenc.models",
}
__all__ = [*_ops, *_HOMES, "accelerate", "restore"]


def __getattr__(name: str):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
