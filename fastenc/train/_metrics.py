"""Metrics by name, computed here: ``evaluate``'s names and result keys without its network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _accuracy(predicted: np.ndarray, true: np.ndarray, **given: Any) -> float:
    """Share of texts predicted exactly (with several labels a text: all of them)."""
    normalize = given.pop("normalize", True)
    weight = given.pop("sample_weight", None)
    if given:
        raise TypeError(f"accuracy: unknown arguments {sorted(given)}")
    right = predicted == true
    right = right.all(1) if right.ndim == 2 else right
    if not normalize:
        return float(right.sum() if weight is None else np.dot(right, weight))
    return float(np.average(right, weights=weight))


def _of_sklearn(function: str) -> Callable[..., Any]:
    def metric(predicted: np.ndarray, true: np.ndarray, **given: Any) -> Any:
        import sklearn.metrics

        value = getattr(sklearn.metrics, function)(true, predicted, **given)
        return value if np.ndim(value) else float(value)

    return metric


METRICS: dict[str, Callable[..., Any]] = {
    "accuracy": _accuracy,
    "f1": _of_sklearn("f1_score"),
    "precision": _of_sklearn("precision_score"),
    "recall": _of_sklearn("recall_score"),
    "matthews_correlation": _of_sklearn("matthews_corrcoef"),
    "mse": _of_sklearn("mean_squared_error"),
    "mae": _of_sklearn("mean_absolute_error"),
}


def compute(
    metric: str | Callable, predicted: Any, true: Any, given: dict[str, Any]
) -> dict[str, Any]:
    """{name: value}.

    Args:
        metric: a name in ``METRICS``, or a callable (predicted, true, **given) -> value or dict.
        predicted, true: (n,) or (n, outputs).
        given: keyword arguments of the metric, such as ``average``.

    Raises:
        ValueError: an unknown name.
    """
    if callable(metric):
        found = metric(predicted, true, **given)
        return found if isinstance(found, dict) else {"metric": found}
    if metric not in METRICS:
        raise ValueError(
            f"metric: expected a callable or one of {', '.join(METRICS)}, got {metric!r}"
        )
    value = METRICS[metric](np.asarray(predicted), np.asarray(true), **given)
    return {metric: value}
