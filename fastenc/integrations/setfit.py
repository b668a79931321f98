"""setfit: the bodies of live models are taken over; heads, labels and files stay their own."""

from __future__ import annotations

from typing import Any

from fastenc.integrations import sentence_transformers


def accelerate(obj: Any, prepack: bool = False) -> Any:
    """Take over every ``model_body``: predict, predict_proba, encode and training run packed."""
    for body in _bodies(obj):
        sentence_transformers.accelerate(body, prepack)
    return obj


def restore(obj: Any) -> Any:
    """Undo :func:`accelerate`."""
    for body in _bodies(obj):
        sentence_transformers.restore(body)
    return obj


def _bodies(obj: Any) -> list[Any]:
    """A SetFitModel's body; of an AbsaModel, those of its two models."""
    models = [obj.aspect_model, obj.polarity_model] if hasattr(obj, "aspect_model") else [obj]
    bodies = [getattr(model, "model_body", None) for model in models]
    if None in bodies:
        raise TypeError(
            f"accelerate: expected a setfit.SetFitModel with a body, got "
            f"{type(obj).__module__}.{type(obj).__qualname__}"
        )
    return bodies
