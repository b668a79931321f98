"""``gliner_config.json``, typed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto import CONFIG_MAPPING

log = logging.getLogger("fastenc")

SPAN_MODES = ("markerV0", "markerV1", "markerV2", "marker")
TOKEN_MODE = "token_level"
SUBTOKEN_POOLING = ("first", "last", "mean", "max")
BACKBONES = {
    "deberta-v2": "DebertaV2Model",
    "modernbert": "ModernBertModel",
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
}
_NOT_SERVED = {
    "labels_decoder": "label generation by a decoder",
    "relations_layer": "relation extraction",
    "post_fusion_schema": "cross-attention between text and labels",
    "fuse_layers": "fusion of the encoder's layers",
    "represent_spans": "token-level models with span representations",
    "span_encoder_config": "a context encoder before the span head",
    "precomputed_prompts_mode": "prompts compressed into the checkpoint",
}
# what transformers writes into every config file
_TRANSFORMERS = frozenset(PretrainedConfig().to_dict()) | {"is_composition", "torch_dtype"}


@dataclass
class GLiNERConfig:
    """gliner's configuration: its names and its defaults.

    encoder_config and labels_encoder_config are transformers configs. Keys that gliner does not
    know are kept in ``extra`` and written back. ``fine_tune`` is kept and, as in gliner, read
    nowhere.
    """

    model_name: str = "microsoft/deberta-v3-small"
    name: str = "gliner"
    max_width: int = 12
    hidden_size: int = 512
    dropout: float = 0.4
    fine_tune: bool = True
    subtoken_pooling: str = "first"
    span_mode: str = "markerV0"
    post_fusion_schema: str = ""
    num_post_fusion_layers: int = 1
    vocab_size: int = -1
    max_neg_type_ratio: int = 1
    max_types: int = 25
    max_len: int = 384
    words_splitter_type: str = "whitespace"
    num_rnn_layers: int = 1
    fuse_layers: bool = False
    embed_ent_token: bool = True
    class_token_index: int = -1
    encoder_config: PretrainedConfig | None = None
    span_encoder_config: dict | None = None
    ent_token: str = "<<ENT>>"
    sep_token: str = "<<SEP>>"
    _attn_implementation: str | None = None
    token_loss_coef: float = 1.0
    span_loss_coef: float = 1.0
    represent_spans: bool = False
    neg_spans_ratio: float = 1.0
    precomputed_prompts_mode: bool | None = None
    id_to_classes: dict | None = None
    labels_encoder: str | None = None
    labels_encoder_config: PretrainedConfig | None = None
    labels_decoder: str | None = None
    relations_layer: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("encoder_config", "labels_encoder_config"):
            value = getattr(self, name)
            if isinstance(value, dict):
                value = {"model_type": "deberta-v2", **value}
                _check_backbone(name, value["model_type"])
                setattr(self, name, CONFIG_MAPPING[value["model_type"]](**value))
            elif value is not None:
                _check_backbone(name, value.model_type)
        for name, served in (
            ("span_mode", (*SPAN_MODES, TOKEN_MODE)),
            ("subtoken_pooling", SUBTOKEN_POOLING),
            ("words_splitter_type", ("whitespace",)),
        ):
            if getattr(self, name) not in served:
                raise NotImplementedError(
                    f"{name}: fastenc serves {', '.join(served)}, got {getattr(self, name)!r}"
                )
        for name, what in _NOT_SERVED.items():
            if getattr(self, name):
                raise NotImplementedError(f"{name}: fastenc does not serve {what}")

    # ---- what kind of model ------------------------------------------------------------------

    @property
    def token_level(self) -> bool:
        """Starts, ends and insides of entities are scored, rather than spans."""
        return self.span_mode == TOKEN_MODE

    @property
    def bi_encoder(self) -> bool:
        """Labels have an encoder of their own, rather than being read before the text."""
        return self.labels_encoder is not None

    # ---- files -------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GLiNERConfig:
        """The configuration of a parsed gliner_config.json; missing keys take gliner's defaults.

        Raises:
            TypeError: a value of another type than its key's.
            ValueError: a size that is no size.
            NotImplementedError: a kind of gliner model that fastenc does not serve.
        """
        if not isinstance(values, dict):
            raise TypeError(f"gliner_config.json: expected an object, got {type(values).__name__}")
        known = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        given = {name: value for name, value in values.items() if name in known}
        for name, value in given.items():
            _check_value(name, value, known[name].default)
        extra = {name: value for name, value in values.items() if name not in known}
        unknown = sorted(set(extra) - _TRANSFORMERS)
        if unknown:
            log.warning("gliner_config.json: unknown keys, kept but not used: %s", unknown)
        return cls(**given, extra=extra)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> GLiNERConfig:
        """Read a gliner_config.json."""
        with open(path, encoding="utf-8") as file:
            try:
                values = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not JSON ({error})") from error
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """What gliner's own config class takes."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = values.pop("extra")
        for name in ("encoder_config", "labels_encoder_config"):
            if values[name] is not None:
                values[name] = values[name].to_dict()
        return {**extra, **values}


def _check_value(name: str, value: object, default: object) -> None:
    if value is None or default is None or name in ("post_fusion_schema",):
        return
    expected: tuple[type, ...] = (type(default),)
    if isinstance(default, float):
        expected = (float, int)
    elif isinstance(default, int) and not isinstance(default, bool):
        expected = (int,)
    wrong_bool = isinstance(value, bool) and bool not in expected
    if not isinstance(value, expected) or wrong_bool:
        raise TypeError(
            f"gliner_config.json: {name}: expected {expected[0].__name__}, got "
            f"{type(value).__name__} ({value!r})"
        )
    if name in ("max_width", "hidden_size", "max_len", "max_types") and value < 1:
        raise ValueError(f"gliner_config.json: {name}: expected at least 1, got {value}")


def _check_backbone(name: str, kind: str) -> None:
    if kind not in BACKBONES:
        raise NotImplementedError(
            f"{name}: fastenc serves the model types {', '.join(BACKBONES)}, got {kind!r}"
        )
