"""From scikit-learn's estimators to :class:`LinearHead` and back; imported to fit and to export."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastenc.models._setfit_heads import LinearHead, Logistic

Parts = tuple[str | None, tuple[Logistic, ...], np.ndarray, bool]


def unfitted(strategy: str | None, params: dict[str, Any]) -> Any:
    """The estimator that setfit uses for ``strategy``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.multioutput import ClassifierChain, MultiOutputClassifier

    one = LogisticRegression(**params)
    if strategy is None:
        return one
    kinds = {
        "one-vs-rest": OneVsRestClassifier,
        "multi-output": MultiOutputClassifier,
        "classifier-chain": ClassifierChain,
    }
    return kinds[strategy](one)


def fitted(strategy: str | None, params: dict[str, Any], x: np.ndarray, y: np.ndarray) -> Any:
    """An estimator fitted in fp64, what it learned in ``x``'s dtype.

    In fp32 the solver's line search ends where rounding stops it, up to 1e-4 from the optimum in
    the probabilities.
    """
    estimator = unfitted(strategy, params).fit(x.astype(np.float64), y)
    for part in getattr(estimator, "estimators_", (estimator,)):
        if hasattr(part, "coef_"):
            part.coef_ = part.coef_.astype(x.dtype)
            part.intercept_ = part.intercept_.astype(x.dtype)
    return estimator


# ---- reading -------------------------------------------------------------------------------------


def parts_of(estimator: Any) -> Parts:
    """(strategy, parts, classes, multilabel) of a fitted estimator.

    Raises:
        TypeError: it is not made of LogisticRegression.
        ValueError: a chain in another order than that of its outputs, or one that hands on
            probabilities.
    """
    kind = type(estimator).__name__
    if kind == "LogisticRegression":
        part = _part(estimator)
        return None, (part,), part.classes, False
    if kind == "OneVsRestClassifier":
        width = max((_width(e) for e in estimator.estimators_), default=0)
        parts = tuple(_part(e, width) for e in estimator.estimators_)
        return "one-vs-rest", parts, np.asarray(estimator.classes_), bool(estimator.multilabel_)
    if kind == "MultiOutputClassifier":
        parts = tuple(map(_part, estimator.estimators_))
        return "multi-output", parts, np.arange(len(parts)), True
    if kind == "ClassifierChain":
        parts = tuple(map(_part, estimator.estimators_))
        if list(estimator.order_) != list(range(len(parts))):
            raise ValueError(f"a classifier chain in the order {list(estimator.order_)}")
        if getattr(estimator, "chain_method_", "predict") != "predict":
            raise ValueError(f"a classifier chain that hands on {estimator.chain_method_}")
        return "classifier-chain", parts, np.arange(len(parts)), True
    raise TypeError(f"expected a head made of LogisticRegression, got {kind}")


def _width(estimator: Any) -> int:
    return int(getattr(estimator, "n_features_in_", 0))


def _part(estimator: Any, width: int = 0) -> Logistic:
    kind = type(estimator).__name__
    if kind == "_ConstantPredictor":  # one-vs-rest: a label that every or no text has
        always = float(np.ravel(estimator.y_)[0]) > 0
        intercept = np.array([np.inf if always else -np.inf])
        return Logistic(np.zeros((1, width)), intercept, np.array([0, 1]))
    if kind != "LogisticRegression":
        raise TypeError(f"expected a head made of LogisticRegression, got {kind}")
    return Logistic(
        np.ascontiguousarray(estimator.coef_),
        np.ascontiguousarray(estimator.intercept_),
        np.asarray(estimator.classes_),
    )


# ---- writing -------------------------------------------------------------------------------------


def estimator_of(head: LinearHead) -> Any:
    """A fitted estimator of scikit-learn that predicts what ``head`` predicts."""
    estimator = unfitted(head.strategy, head.params)
    parts = [_logistic(head, part) for part in head.parts]
    if head.strategy is None:
        return parts[0]
    estimator.estimators_ = parts
    estimator.n_features_in_ = head.in_features
    if head.strategy == "one-vs-rest":
        from sklearn.preprocessing import LabelBinarizer

        outputs = len(parts)
        labels = np.ones((2, outputs), int) if head.multilabel else head.classes
        estimator.label_binarizer_ = LabelBinarizer(sparse_output=True).fit(labels)
        estimator.classes_ = estimator.label_binarizer_.classes_
    elif head.strategy == "multi-output":
        estimator.classes_ = [part.classes for part in head.parts]
    else:
        estimator.classes_ = [part.classes for part in head.parts]
        estimator.order_ = list(range(len(parts)))
        estimator.chain_method_ = "predict"
    return estimator


def _logistic(head: LinearHead, part: Logistic) -> Any:
    one = unfitted(None, head.params)
    one.coef_, one.intercept_, one.classes_ = part.coef, part.intercept, part.classes
    one.n_features_in_, one.n_iter_ = part.coef.shape[1], np.array([0])
    return one
