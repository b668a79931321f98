"""``SetFitModel``: a sentence body and a classification head.

    texts -> SentenceBody -> embeddings (normalised or not) -> head -> classes

setfit's method names and files; the head is written as safetensors + JSON, and a pickled head is
read only when it is trusted. Tunstall et al. 2022, arXiv:2209.11055.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastenc.models import _setfit_files as files
from fastenc.models._setfit_checks import check_embeddings, check_labels
from fastenc.models._setfit_heads import DifferentiableHead, LinearHead, check_width, scalar
from fastenc.models.sentence import SentenceBody, check_texts

Head = LinearHead | DifferentiableHead


class SetFitModel:
    """Classifies texts by a linear head over a sentence body's embeddings.

    Args:
        body: embeds the texts.
        head: a :class:`LinearHead` (logistic regression) or :class:`DifferentiableHead`.
        labels: names of the classes 0, 1, ...; None: what the head was fitted on.
        multi_target_strategy: None, or "one-vs-rest", "multi-output", "classifier-chain": each text
            has a row of 0 and 1.
        normalize_embeddings: scale embeddings to length 1 before the head.

    Raises:
        ValueError: the head's width is not the body's, or it has another number of classes than
            there are labels.
    """

    def __init__(
        self,
        body: SentenceBody,
        head: Head,
        labels: Sequence[Any] | None = None,
        multi_target_strategy: str | None = None,
        normalize_embeddings: bool = False,
    ):
        self.body, self.head = body, head
        self.labels = None if labels is None else [scalar(x) for x in labels]
        self.multi_target_strategy = multi_target_strategy
        self.normalize_embeddings = normalize_embeddings
        check_width(body.dimension, head.in_features)
        self._check_label_count()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        labels: Sequence[Any] | None = None,
        multi_target_strategy: str | None = None,
        use_differentiable_head: bool = False,
        head_params: dict[str, Any] | None = None,
        normalize_embeddings: bool | None = None,
        trust_pickle: bool = False,
        device: torch.device | str | None = None,
    ) -> SetFitModel:
        """Read a folder or hub id: fastenc's, setfit's, or a sentence-transformers body alone.

        Args:
            path: where there is no head in it, an unfitted one is made.
            labels, multi_target_strategy, normalize_embeddings: in place of what the files say.
            use_differentiable_head, head_params: of the head that is made: arguments of
                :class:`DifferentiableHead` or of scikit-learn's LogisticRegression.
            trust_pickle: read setfit's model_head.pkl, **which runs code of the file**. It is not
                needed where the folder has fastenc's head.
            device: to move the body and the head to.

        Raises:
            ValueError: the head is a pickle and not trusted, or it does not fit the body.
            OSError: files are missing.
        """
        source = os.fspath(path)
        body = SentenceBody.from_folder(source)
        config = files.read_config(source)
        head = files.read_head(source, trust_pickle)
        if head is None:
            head = files.new_head(
                body.dimension, multi_target_strategy, use_differentiable_head, head_params, labels
            )
        strategy = config.get("multi_target_strategy") or files.strategy_of(head)
        if normalize_embeddings is None:
            normalize_embeddings = bool(config.get("normalize_embeddings", False))
        model = cls(
            body,
            head,
            config.get("labels") if labels is None else labels,
            strategy if multi_target_strategy is None else multi_target_strategy,
            normalize_embeddings,
        )
        return model if device is None else model.to(device)

    # ---- what it is --------------------------------------------------------------------------

    @property
    def model_body(self) -> SentenceBody:
        """setfit's name of ``body``."""
        return self.body

    @property
    def model_head(self) -> Head:
        """setfit's name of ``head``."""
        return self.head

    @property
    def has_differentiable_head(self) -> bool:
        return isinstance(self.head, nn.Module)

    @property
    def device(self) -> torch.device:
        return self.body.device

    @property
    def id2label(self) -> dict[int, Any]:
        return dict(enumerate(self.labels or ()))

    @property
    def label2id(self) -> dict[Any, int]:
        return {label: i for i, label in self.id2label.items()}

    def to(self, device: torch.device | str) -> SetFitModel:
        """Move body and head; returns self."""
        self.body.to(device)
        if self.has_differentiable_head:
            self.head.to(device)
        return self

    def freeze(self, component: str | None = None) -> None:
        """Take gradients from the "body", the "head", or both (None)."""
        self._require_grad(component, False)

    def unfreeze(self, component: str | None = None) -> None:
        """Undo :meth:`freeze`."""
        self._require_grad(component, True)

    def _require_grad(self, component: str | None, flag: bool) -> None:
        if component not in (None, "body", "head"):
            raise ValueError(f"component: expected 'body', 'head' or None, got {component!r}")
        if component != "head":
            self.body.requires_grad_(flag)
        if component != "body" and self.has_differentiable_head:
            self.head.requires_grad_(flag)

    # ---- training the head -------------------------------------------------------------------

    def fit_head(self, embeddings: np.ndarray | Tensor, labels: Any) -> None:
        """Fit a :class:`LinearHead` with scikit-learn.

        Args:
            embeddings: (n, dimension), as :meth:`encode` gives them.
            labels: (n,) strings or integers; with a strategy (n, outputs) of 0 and 1. String labels
                become ``labels`` where the model has none.

        Raises:
            TypeError: the head is differentiable: fastenc.SetFitTrainer trains it.
            ValueError: see :mod:`fastenc.models._setfit_checks`.
        """
        if self.has_differentiable_head:
            raise TypeError("a differentiable head is trained by gradients: use SetFitTrainer")
        y = check_labels(labels, self.head.strategy)
        x = check_embeddings(embeddings, len(y))
        check_width(self.body.dimension, x.shape[1])
        self.head.fit(x, y)
        if self.labels is None and y.dtype.kind == "U" and self.head.strategy is None:
            self.labels = self.head.classes.tolist()
        self._check_label_count()

    def _check_label_count(self) -> None:
        """Integer classes index ``labels``: every one needs a name."""
        if self.labels is None or not getattr(self.head, "fitted", True):
            return
        if self.has_differentiable_head:
            highest = self.head.out_features - 1
        elif self.head.multilabel:
            highest = len(self.head.parts) - 1
        elif self.head.classes.dtype.kind in "iu":
            highest = int(self.head.classes.max())
        else:
            return
        if highest >= len(self.labels):
            raise ValueError(
                f"labels: expected {highest + 1} names for the classes of the head, "
                f"got {len(self.labels)}"
            )

    # ---- prediction --------------------------------------------------------------------------

    def encode(
        self,
        inputs: str | Iterable[str],
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | Tensor:
        """Embed texts: (n, dimension) float32, NumPy, or a tensor under a differentiable head.

        ``batch_size`` is setfit's and without effect: texts are packed to a budget of tokens.
        """
        rows = self.body.encode(inputs, show_progress_bar, normalize=self.normalize_embeddings)
        if self.has_differentiable_head:
            return torch.from_numpy(rows).to(self.head.linear.weight.device)
        return rows

    @torch.no_grad()
    def predict_proba(
        self,
        inputs: str | Iterable[str],
        batch_size: int | None = None,
        as_numpy: bool = False,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | Tensor:
        """Probabilities: (n, classes) or (n, outputs); multi-output: (n, outputs, classes).

        A tensor, or NumPy with ``as_numpy``; without its first dimension for a single string.

        Raises:
            TypeError: something is not a string. ValueError: the head is not fitted.
        """
        p = self._on_head("predict_proba", inputs, show_progress_bar)
        if isinstance(p, list):
            p = np.stack(p, axis=1)
        p = self._converted(p, as_numpy)
        return p[0] if isinstance(inputs, str) else p

    @torch.no_grad()
    def predict(
        self,
        inputs: str | Iterable[str],
        batch_size: int | None = None,
        as_numpy: bool = False,
        use_labels: bool = True,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """The class of each text, or (n, outputs) of 0 and 1.

        A list of names where the model has ``labels`` and one class a text (unless ``use_labels``
        is False), else a tensor, or NumPy with ``as_numpy`` and for string classes; one element for
        a single string.

        Raises:
            TypeError: something is not a string. ValueError: the head is not fitted.
        """
        found = self._on_head("predict", inputs, show_progress_bar)
        numbers = self.has_differentiable_head or found.dtype.kind != "U"
        if use_labels and self.labels and found.ndim == 1 and numbers:
            out = [self.labels[int(i)] for i in found]
        else:
            out = self._converted(found, as_numpy)
        return out[0] if isinstance(inputs, str) else out

    __call__ = predict

    def _on_head(self, method: str, inputs: Any, show: bool | None) -> Any:
        texts = [inputs] if isinstance(inputs, str) else check_texts(inputs)
        if not getattr(self.head, "fitted", True):
            raise ValueError("the classification head is not fitted: train the model first")
        return getattr(self.head, method)(self.encode(texts, show_progress_bar=show))

    def _converted(self, x: np.ndarray | Tensor, as_numpy: bool) -> np.ndarray | Tensor:
        if isinstance(x, Tensor):
            return x.cpu().numpy() if as_numpy else x
        return x if as_numpy or x.dtype.kind == "U" else torch.from_numpy(x)

    # ---- files -------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write the body, config_setfit.json and the head (head.safetensors, head.json).

        No pickle is written; setfit itself needs :meth:`export_setfit`.

        Raises:
            ValueError: ``path`` has a model_head.pkl, which would belong to another model.
        """
        files.save(self, path, pickled=False)

    def export_setfit(self, path: str | os.PathLike) -> None:
        """As :meth:`save_pretrained`, with model_head.pkl beside: setfit loads it and predicts the
        same. A differentiable head needs setfit to be installed, others scikit-learn."""
        files.save(self, path, pickled=True)

    def __repr__(self) -> str:
        return (
            f"SetFitModel({self.body.model.__class__.__name__}, {type(self.head).__name__},"
            f" labels={self.labels}, multi_target_strategy={self.multi_target_strategy!r})"
        )


__all__ = ["DifferentiableHead", "LinearHead", "SetFitModel"]
