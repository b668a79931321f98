"""ModernBERT's config.json in both formats: transformers 5's and the one that servers read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def old_keys(config) -> dict[str, float | int]:
    """The keys of ModernBERT's first format that ``config`` can be said in.

    ``global_rope_theta``, ``local_rope_theta``; ``global_attn_every_n_layers`` where the layer
    types follow such a rule.
    """
    keys: dict[str, float | int] = {}
    names = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    for layer_type, name in names.items():
        parameters = (config.rope_parameters or {}).get(layer_type)
        if parameters:
            keys[name] = parameters["rope_theta"]
    is_global = [layer_type == "full_attention" for layer_type in config.layer_types]
    for n in range(1, len(is_global) + 1):
        if is_global == [i % n == 0 for i in range(len(is_global))]:
            keys["global_attn_every_n_layers"] = n
            break
    return keys


@contextmanager
def _carrying(config, keys: dict[str, float | int]) -> Iterator[None]:
    before = dict(config.__dict__)
    config.__dict__.update(keys)
    try:
        yield
    finally:
        for key in keys:
            config.__dict__.pop(key)
        config.__dict__.update({key: before[key] for key in keys if key in before})


class WritesBothFormats:
    """Mixin in front of a transformers ModernBERT model: ``save_pretrained`` writes both."""

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As transformers; config.json also gets the keys of ModernBERT's first format."""
        with _carrying(self.config, old_keys(self.config)):
            super().save_pretrained(save_directory, *args, **kwargs)
