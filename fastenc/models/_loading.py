"""``from_pretrained`` that does not shrug: a checkpoint that does not fit is an error."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 8
# transformers loads a base model from a checkpoint with a head, and a head onto a base checkpoint
_HEADS = frozenset(
    {"head", "decoder", "classifier", "score", "cls", "lm_head", "qa_outputs", "pooler", "drop"}
)


class StrictLoading:
    """Mixin in front of a transformers model: missing, extra, misshaped keys raise ValueError."""

    @classmethod
    def from_pretrained(cls, path, *args, strict: bool = True, **kwargs):
        """transformers' ``from_pretrained``, strict about the base model's weights.

        Args:
            path: folder or hub name, as transformers takes it; safetensors, sharded or not, with or
                without the base model's prefix. A pickled checkpoint is read only by torch's
                weights-only reader.
            strict: False leaves missing and extra keys to transformers, which warns and
                initialises; ``ignore_mismatched_sizes=True`` does so for misshaped ones. Keys of
                heads, and extra keys outside the base model's own parts, are always handled as
                transformers does.

        Raises:
            ValueError: naming the missing, extra or misshaped keys.
        """
        if kwargs.get("weights_only") is False:
            raise ValueError("weights_only=False would run code of the checkpoint: refused")
        wants_info = kwargs.pop("output_loading_info", False)
        reshape = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        prefix = f"{model.base_model_prefix}."
        complaints = []
        if strict:
            complaints += _named("missing", _of_base(info["missing_keys"], prefix))
            own = {name.split(".")[0] for name in model.base_model.state_dict()} - _HEADS
            extra = (key for key in info["unexpected_keys"] if _top(key, prefix) in own)
            complaints += _named("unexpected", extra)
        if not reshape:
            misshaped = (
                f"{key} ({tuple(found)} in the checkpoint, {tuple(expected)} in the model)"
                for key, found, expected in info["mismatched_keys"]
            )
            complaints += _named("misshaped", misshaped)
        if complaints:
            raise ValueError(f"{path} does not fit {cls.__name__}: {'; '.join(complaints)}")
        return (model, info) if wants_info else model


def _of_base(keys: Iterable[str], prefix: str) -> list[str]:
    return [key for key in keys if _top(key, prefix) not in _HEADS]


def _top(key: str, prefix: str) -> str:
    return key.removeprefix(prefix).split(".")[0]


def _named(what: str, keys: Iterable[str]) -> list[str]:
    keys = sorted(keys)
    if not keys:
        return []
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return [f"{what} keys: {', '.join(keys[:_SHOWN])}{more}"]
