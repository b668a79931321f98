"""What a checkpoint says about embedding with it: sentence-transformers and transformers folders.

sentence-transformers writes ``modules.json`` (old class paths ``sentence_transformers.models.*``,
new ones ``sentence_transformers.base.modules.*``), a folder a module, and the length limit, lower
casing and prompts in files of their own. No class of sentence-transformers is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import nn

from fastenc._encoder_model import (
    bounded,
    learns_prompts,
    length_limit,
    load_transformer,
    lower_case,
)
from fastenc.nn import POOLING_MODES

TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Boolean keys of old Pooling configs, in the order in which their vectors are concatenated."""


@dataclass
class Recipe:
    """How to embed: ``model`` and ``tokenizer``, pool, then ``head`` on the pooled rows.

    ``pooling`` is None where the checkpoint leaves it open; several modes are concatenated.
    """

    model: nn.Module
    tokenizer: Any
    pooling: tuple[str, ...] | None = None
    head: list[nn.Module] = field(default_factory=list)
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    pool_prompt: bool = True


class Normalize(nn.Module):
    """Rows of length 1: (n, hidden) -> (n, hidden); a zero row stays zero."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(rows, p=2.0, dim=-1)


def read_folder(source: str) -> Recipe:
    """Read a folder, or a hub id: sentence-transformers where it has modules.json.

    Raises:
        NotImplementedError: a module, a pooling mode or an option that fastenc does not serve.
        ValueError, OSError: files that contradict each other or are missing.
    """
    modules = read_json(source, "modules.json")
    if modules is None:
        model, tokenizer = load_transformer(source)
        return Recipe(model, tokenizer, max_length=length_limit(tokenizer, model.config))
    about = read_json(source, "config_sentence_transformers.json") or {}
    if (kind := about.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise _unsupported(source, f"a {kind} checkpoint")
    first, *rest = modules
    _check_first(source, first["type"])
    recipe = _read_transformer(source, first["path"])
    recipe.prompts = {k: v or "" for k, v in (about.get("prompts") or {}).items()}
    recipe.default_prompt = about.get("default_prompt_name")
    for module in rest:
        path = module["path"]
        config = read_json(source, "config.json", path) or {}
        _add(recipe, source, module["type"], config, lambda p=path, c=config: _dense(source, p, c))
    return _complete(recipe, source)


def read_sentence_transformer(model: nn.Module, whole: bool = False) -> Recipe:
    """The parts of a live SentenceTransformer: its own model and tokenizer, not copies.

    ``whole``: the vectors before its ``truncate_dim``, which else is refused.
    """
    source = type(model).__name__
    first, *rest = list(model)
    _check_first(source, _dotted(first))
    if not whole and getattr(model, "truncate_dim", None) is not None:
        raise _unsupported(source, "truncate_dim")
    _check_text(source, vars(first))
    if learns_prompts(first.auto_model):
        raise _unsupported(source, "prompt learning of peft")
    recipe = Recipe(first.auto_model, first.tokenizer, max_length=bounded(first.max_seq_length))
    recipe.prompts = {k: v or "" for k, v in (getattr(model, "prompts", None) or {}).items()}
    recipe.default_prompt = getattr(model, "default_prompt_name", None)
    for module in rest:
        is_pooling = type(module).__name__ == "Pooling"
        config = module.get_config_dict() if is_pooling else vars(module)
        _add(
            recipe,
            source,
            _dotted(module),
            config,
            lambda m=module: nn.Sequential(m.linear, m.activation_function),
        )
    return _complete(recipe, source)


def _add(
    recipe: Recipe, source: str, dotted: str, config: dict, dense: Callable[[], nn.Module]
) -> None:
    """Take one module behind the Transformer into the recipe."""
    kind = _kind(source, dotted)
    if kind == "Pooling":
        _read_pooling(recipe, config, source)
    elif kind in ("Dense", "Normalize"):
        keys = ("module_input_name", "module_output_name")
        if any(config.get(key) not in (None, "sentence_embedding") for key in keys):
            raise _unsupported(source, f"{kind} on anything but the sentence embedding")
        if config.get("use_residual"):
            raise _unsupported(source, f"{kind} with use_residual")
        recipe.head.append(dense() if kind == "Dense" else Normalize())
    elif kind != "Dropout":
        raise _unsupported(source, f"module {dotted}")


def _check_first(source: str, dotted: str) -> None:
    if _kind(source, dotted) != "Transformer":
        raise _unsupported(source, f"{dotted} as the first module")


def _check_text(source: str, config: dict) -> None:
    """Refuse a Transformer module, by its settings, that makes other token embeddings."""
    served = config.get("modality_config") or {}
    text = served.get("text") or {}
    wanted = (text.get("method", "forward"), text.get("method_output_name", "last_hidden_state"))
    if wanted != ("forward", "last_hidden_state"):
        raise _unsupported(source, f"pooling of {wanted[1]} of {wanted[0]}")
    if "message" in served or config.get("processing_kwargs"):
        raise _unsupported(source, "a chat template, or processing_kwargs,")


def _complete(recipe: Recipe, source: str) -> Recipe:
    if recipe.pooling is None:
        raise _unsupported(source, "a model without a Pooling module")
    return recipe


def _unsupported(source: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{source}: {what} is not supported; expected a SentenceTransformer made of Transformer,"
        " Pooling, Dense, Normalize and Dropout"
    )


def _kind(source: str, dotted: str) -> str:
    if not dotted.startswith("sentence_transformers."):
        raise _unsupported(source, f"module {dotted}")
    return dotted.rsplit(".", 1)[-1]


def _dotted(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _read_transformer(source: str, path: str) -> Recipe:
    configs = (read_json(source, name, path) for name in TRANSFORMER_CONFIGS)
    config: dict = next((c for c in configs if c), {})
    _check_text(source, config)
    model, tokenizer = load_transformer(source, path)
    if config.get("do_lower_case"):
        lower_case(tokenizer)
    limit = bounded(config.get("max_seq_length")) or length_limit(tokenizer, model.config)
    return Recipe(model, tokenizer, max_length=limit)


def _read_pooling(recipe: Recipe, config: dict, source: str) -> None:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in OLD_POOLING.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    names = tuple("last" if mode == "lasttoken" else mode for mode in modes)
    for name in names:
        if name not in POOLING_MODES:
            raise _unsupported(source, f"pooling {name!r}")
    recipe.pooling, recipe.pool_prompt = names, config.get("include_prompt", True)


def _dense(source: str, path: str, config: dict) -> nn.Module:
    name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    found = getattr(nn, name.rsplit(".", 1)[-1], None) if name.startswith("torch.nn.") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise _unsupported(source, f"activation {name}")
    linear = nn.Linear(config["in_features"], config["out_features"], config.get("bias", True))
    weights = _read_weights(source, path)
    linear.load_state_dict({k.removeprefix("linear."): v for k, v in weights.items()})
    return nn.Sequential(linear, found())


def _read_weights(source: str, path: str) -> dict[str, torch.Tensor]:
    if (file := find_file(source, "model.safetensors", path)) is not None:
        from safetensors.torch import load_file

        return load_file(file)
    if (file := find_file(source, "pytorch_model.bin", path)) is not None:
        return torch.load(file, map_location="cpu", weights_only=True)
    raise OSError(f"{source}/{path}: neither model.safetensors nor pytorch_model.bin")


# ---- files -------------------------------------------------------------------------------------


def find_file(source: str, name: str, path: str = "") -> str | None:
    """Where file ``name`` of a folder or hub id lies on this machine; None if it has none."""
    inside = PurePosixPath(path, name)
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"{source}: module path {path!r} leaves the folder")
    if os.path.isdir(source):
        file = os.path.join(source, *inside.parts)
        return file if os.path.isfile(file) else None
    if os.path.isabs(source) or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {source}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(source, str(inside))
    except EntryNotFoundError:
        return None


def read_json(source: str, name: str, path: str = "") -> Any:
    file = find_file(source, name, path)
    if file is None:
        return None
    with open(file, encoding="utf-8") as f:
        return json.load(f)
