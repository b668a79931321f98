"""Training: what the libraries' trainers do, with every text encoded once a batch and no padding.

``fastenc.train.setfit``: few-shot classifiers (Tunstall et al. 2022, arXiv:2209.11055).
``fastenc.train.gliner``: named-entity models on transformers' Trainer (:class:`GLiNERTrainer`).
"""

import importlib as _importlib

_HOMES = {
    "GLiNERTrainer": "fastenc.train.gliner",
    "GLiNERTrainingArguments": "fastenc.train.gliner",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_importlib.import_module(home), name)
    return value
