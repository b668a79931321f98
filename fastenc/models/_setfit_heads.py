"""Classification heads: logistic regression in NumPy, and the differentiable one.

``LinearHead`` holds what scikit-learn's LogisticRegression learned, alone or inside
OneVsRestClassifier, MultiOutputClassifier or ClassifierChain, and predicts what they predict, with
NumPy alone. scikit-learn is imported only to fit.

    one logistic regression:  z = x @ coef.T + intercept,  p = sigmoid(z) (2 classes), softmax(z)

``DifferentiableHead`` is setfit's SetFitHead: softmax or sigmoid of ``(W x + b) / (temperature +
eps)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

STRATEGIES = ("one-vs-rest", "multi-output", "classifier-chain")


@dataclass(frozen=True)
class Logistic:
    """coef (1 or classes, features), intercept (1 or classes,), classes (>= 2,)."""

    coef: np.ndarray
    intercept: np.ndarray
    classes: np.ndarray

    def decision(self, x: np.ndarray) -> np.ndarray:
        """(n,) for two classes, else (n, classes)."""
        z = x @ self.coef.T + self.intercept
        return z[:, 0] if z.shape[1] == 1 else z

    def predict(self, x: np.ndarray) -> np.ndarray:
        z = self.decision(x)
        return self.classes[(z > 0).astype(int) if z.ndim == 1 else z.argmax(1)]

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """(n, classes)."""
        z = self.decision(x)
        if z.ndim == 1:
            p = _sigmoid(z)
            return np.stack([1 - p, p], axis=1)
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


class LinearHead:
    """Logistic regression, one or several.

    Args:
        strategy: None: each text has one class. "one-vs-rest", "multi-output" and
            "classifier-chain": labels (n, outputs) of 0 and 1, as scikit-learn's classes of these
            names.
        **params: of scikit-learn's LogisticRegression, used by :meth:`fit`.

    Attributes:
        parts: a :class:`Logistic` for each output (or class, one against the rest); () before
            fitting.
        classes: of the labels: (classes,), or (outputs,) numbers.
        multilabel: whether predictions are (n, outputs).
    """

    def __init__(self, strategy: str | None = None, **params: Any):
        if strategy is not None and strategy not in STRATEGIES:
            raise ValueError(
                f"multi_target_strategy: expected None or one of {', '.join(STRATEGIES)}, "
                f"got {strategy!r}"
            )
        self.strategy, self.params = strategy, params
        self.parts: tuple[Logistic, ...] = ()
        self.classes = np.empty(0)
        self.multilabel = strategy in STRATEGIES[1:]

    @property
    def fitted(self) -> bool:
        return bool(self.parts)

    @property
    def in_features(self) -> int | None:
        """Width of the embeddings; None before fitting."""
        return self.parts[0].coef.shape[1] if self.parts else None

    def fit(self, x: np.ndarray, y: np.ndarray) -> LinearHead:
        """Fit with scikit-learn: x (n, features) floating, y (n,) or (n, outputs)."""
        from fastenc.models._setfit_sklearn import fitted

        self.adopt(fitted(self.strategy, self.params, x, y))
        return self

    def adopt(self, estimator: Any) -> None:
        """Take over what a fitted estimator of scikit-learn learned.

        Raises:
            TypeError: it is not made of LogisticRegression.
        """
        from fastenc.models._setfit_sklearn import parts_of

        self.strategy, self.parts, self.classes, self.multilabel = parts_of(estimator)

    # ---- prediction --------------------------------------------------------------------------

    def predict(self, x: np.ndarray) -> np.ndarray:
        """x (n, features) -> (n,) classes, or (n, outputs)."""
        self._check(x)
        if self.strategy is None:
            return self.parts[0].predict(x)
        if self.strategy == "multi-output":
            return np.stack([part.predict(x) for part in self.parts], axis=1)
        if self.strategy == "classifier-chain":
            return self._along_chain(x)[0]
        z = np.stack([part.decision(x) for part in self.parts], axis=1)
        if self.multilabel:
            return (z > 0).astype(int)
        if z.shape[1] == 1:
            return self.classes[(z[:, 0] > 0).astype(int)]
        return self.classes[z.argmax(1)]

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """(n, classes) or (n, outputs); multi-output: a list of (n, classes), one an output."""
        self._check(x)
        if self.strategy is None:
            return self.parts[0].predict_proba(x)
        if self.strategy == "multi-output":
            return [part.predict_proba(x) for part in self.parts]
        if self.strategy == "classifier-chain":
            return self._along_chain(x)[1]
        p = np.stack([_sigmoid(part.decision(x)) for part in self.parts], axis=1)
        if p.shape[1] == 1:
            p = np.concatenate([1 - p, p], axis=1)
        if not self.multilabel:
            total = p.sum(1, keepdims=True)
            p = np.divide(p, total, out=p, where=total != 0)
        return p

    def _along_chain(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every output sees the outputs predicted before it. Both (n, outputs)."""
        hard = np.zeros((len(x), len(self.parts)))
        soft = np.zeros_like(hard)
        for i, part in enumerate(self.parts):
            seen = np.hstack([x, hard[:, :i]])
            hard[:, i] = part.predict(seen)
            soft[:, i] = part.predict_proba(seen)[:, 1]
        return hard, soft

    def _check(self, x: np.ndarray) -> None:
        if not self.parts:
            raise ValueError("the classification head is not fitted: train the model first")
        check_width(x.shape[1], self.in_features)

    # ---- files -------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, settings), enough for :meth:`from_state`."""
        arrays, classes = {}, []
        for i, part in enumerate(self.parts):
            arrays |= {f"{i}.coef": part.coef, f"{i}.intercept": part.intercept}
            classes.append(part.classes.tolist())
        settings = {
            "strategy": self.strategy,
            "multilabel": self.multilabel,
            "classes": self.classes.tolist(),
            "part_classes": classes,
            "params": _plain(self.params),
        }
        return arrays, settings

    @classmethod
    def from_state(cls, arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> LinearHead:
        """Raises KeyError or ValueError where the two do not fit together."""
        head = cls(settings["strategy"], **_given(settings.get("params", {})))
        head.multilabel = bool(settings["multilabel"])
        head.classes = np.asarray(settings["classes"])
        head.parts = tuple(
            Logistic(arrays[f"{i}.coef"], arrays[f"{i}.intercept"], np.asarray(classes))
            for i, classes in enumerate(settings["part_classes"])
        )
        for part in head.parts:
            rows = 1 if len(part.classes) == 2 else len(part.classes)
            if part.coef.ndim != 2 or part.coef.shape[0] != rows or part.intercept.shape != (rows,):
                raise ValueError(
                    f"expected coefficients of {rows} rows for {len(part.classes)} classes, got "
                    f"{part.coef.shape} and intercepts {part.intercept.shape}"
                )
        return head


def _plain(params: dict[str, Any]) -> dict[str, Any]:
    """What JSON can say of ``params``: class weights by integer class as a list of pairs."""
    plain = {}
    for name, value in params.items():
        if name == "class_weight" and isinstance(value, dict):
            value = [[scalar(x) for x in pair] for pair in value.items()]
        value = scalar(value)
        if value is None or isinstance(value, (bool, int, float, str, list)):
            plain[name] = value
    return plain


def _given(plain: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`_plain`."""
    weights = plain.get("class_weight")
    return plain | {"class_weight": dict(weights)} if isinstance(weights, list) else plain


def scalar(value: Any) -> Any:
    """A NumPy number as Python's, for JSON."""
    return value.item() if isinstance(value, np.generic) else value


class DifferentiableHead(nn.Module):
    """setfit's SetFitHead: one linear layer, trained by gradients.

    Args:
        in_features: width of the embeddings. out_features: classes, or outputs; 1 becomes 2.
        temperature, eps: logits are divided by their sum.
        bias: of the linear layer.
        multitarget: each output is a probability of its own (sigmoid).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 2,
        temperature: float = 1.0,
        eps: float = 1e-5,
        bias: bool = True,
        multitarget: bool = False,
    ):
        super().__init__()
        out_features = 2 if out_features == 1 else out_features
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.temperature, self.eps, self.multitarget = temperature, eps, multitarget
        nn.init.xavier_uniform_(self.linear.weight)
        if bias:
            nn.init.constant_(self.linear.bias, 1e-2)

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def forward(self, x: Tensor, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        """x (n, in_features) -> logits, probabilities, both (n, out_features)."""
        check_width(x.shape[-1], self.in_features)
        logits = self.linear(x) / ((temperature or self.temperature) + self.eps)
        return logits, logits.sigmoid() if self.multitarget else logits.softmax(-1)

    def predict_proba(self, x: Tensor) -> Tensor:
        """(n, out_features)."""
        return self(x)[1]

    def predict(self, x: Tensor) -> Tensor:
        """(n,) int64 classes, or (n, out_features) of 0 and 1."""
        p = self.predict_proba(x)
        return (p >= 0.5).long() if self.multitarget else p.argmax(-1)

    def get_loss_fn(self) -> nn.Module:
        """The loss on logits that setfit trains with."""
        return nn.BCEWithLogitsLoss() if self.multitarget else nn.CrossEntropyLoss()

    def settings(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "temperature": self.temperature,
            "eps": self.eps,
            "bias": self.linear.bias is not None,
            "multitarget": self.multitarget,
        }


def check_width(width: int, expected: int | None) -> None:
    """Raises ValueError where embeddings do not fit a head."""
    if expected is not None and width != expected:
        raise ValueError(
            f"the head was made for embeddings of {expected} numbers, the body gives {width}"
        )
