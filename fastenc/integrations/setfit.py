"""setfit: a live SetFitModel's body is taken over; its head, labels and files stay its own."""

from __future__ import annotations

from typing import Any

from fastenc.integrations import sentence_transformers


def accelerate(obj: Any, prepack: bool = False) -> Any:
    """Take over ``obj.model_body``: predict, predict_proba, encode and training run packed."""
    sentence_transformers.accelerate(_body(obj), prepack)
    return obj


def restore(obj: Any) -> Any:
    """Undo :func:`accelerate`."""
    sentence_transformers.restore(_body(obj))
    return obj


def _body(obj: Any) -> Any:
    body = getattr(obj, "model_body", None)
    if body is None:
        raise TypeError(
            f"accelerate: expected a setfit.SetFitModel with a body, got "
            f"{type(obj).__module__}.{type(obj).__qualname__}"
        )
    return body
