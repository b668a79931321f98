"""setfit 1.2 itself, as the peer of fastenc's trainer: the same arguments, its own everything."""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def counted_fingerprints() -> Iterator[None]:
    """datasets names a table by pickling what made it; dill walks into every package that lies
    outside of site-packages and fails in pyarrow. A counter is as good a name here."""
    from unittest import mock

    import datasets.arrow_dataset as arrow

    number = itertools.count()

    def name(*args: Any, **kwargs: Any) -> str:
        return f"{next(number):016x}"

    with (
        mock.patch.object(arrow, "generate_fingerprint", name),
        mock.patch.object(arrow, "update_fingerprint", name),
    ):
        yield


def quiet() -> None:
    """No warnings of the peer's on stderr."""
    warnings.filterwarnings("ignore")
    for name in ("setfit", "sentence_transformers", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def without_dropout(module: nn.Module) -> nn.Module:
    """Every dropout off in training too."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


@contextlib.contextmanager
def trainer_of(
    text: Sequence[str],
    label: Sequence[Any],
    evaluated: dict[str, list[Any]] | None = None,
    model: Any = None,
    model_init: Callable[[], Any] | None = None,
    **given: Any,
) -> Iterator[Any]:
    """setfit's trainer, silent, writing into a folder that goes with the context.

    Args:
        evaluated: columns "text" and "label" of the evaluation texts.
        given: training arguments.
    """
    import setfit
    from datasets import Dataset

    given = {"report_to": "none", "save_strategy": "no", "show_progress_bar": False, **given}
    with counted_fingerprints(), tempfile.TemporaryDirectory() as folder:
        trainer = setfit.Trainer(
            model=model,
            model_init=model_init,
            args=setfit.TrainingArguments(output_dir=folder, **given),
            train_dataset=Dataset.from_dict({"text": list(text), "label": list(label)}),
            eval_dataset=None if evaluated is None else Dataset.from_dict(evaluated),
        )
        for callback in list(trainer.st_trainer.callback_handler.callbacks):
            if "Progress" in type(callback).__name__ or "Printer" in type(callback).__name__:
                trainer.st_trainer.remove_callback(callback)
        yield trainer


def trained(
    model: Any, texts: Sequence[str], labels: Sequence[Any], **given: Any
) -> tuple[Any, list[float]]:
    """Train a ``setfit.SetFitModel``, with the arguments of :func:`trainer_of`; returns setfit's
    trainer and the losses it logged."""
    with trainer_of(texts, labels, model=model, **given) as trainer:
        trainer.train()
    history = trainer.st_trainer.state.log_history
    return trainer, [row["embedding_loss"] for row in history if "embedding_loss" in row]


def load(folder: str, **given: Any) -> Any:
    """``setfit.SetFitModel.from_pretrained`` on the CPU."""
    import setfit

    return setfit.SetFitModel.from_pretrained(folder, device="cpu", **given)


def weights(body: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of a SentenceTransformer or SentenceBody under transformers' names."""
    found = {}
    for name, value in body.named_parameters():
        for prefix in ("0.auto_model.", "0.model.", "model."):
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        found[name] = value.detach()
    return found
