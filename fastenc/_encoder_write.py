"""Writing a folder that every version of sentence-transformers reads.

Class paths are the old ones (``sentence_transformers.models.*``) and pooling is written with the
old boolean keys: releases from 2 to 6 read both. Nothing that only fastenc knows is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from fastenc._encoder_folder import OLD_POOLING, Normalize, Recipe


def write_folder(folder: Path, recipe: Recipe) -> None:
    """modules.json, the encoder and its tokenizer, Pooling, Dense and Normalize."""
    recipe.model.save_pretrained(folder)
    recipe.tokenizer.save_pretrained(folder)
    limit = {"max_seq_length": recipe.max_length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", limit)
    names = ["Transformer", "Pooling", *(_name(module) for module in recipe.head)]
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(names) if i > 0)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    for path in paths[1:]:
        (folder / path).mkdir()
    write_json(folder / paths[1] / "config.json", _pooling(recipe))
    for module, path in zip(recipe.head, paths[2:], strict=True):
        if isinstance(module, nn.Sequential):
            _write_dense(folder / path, module)
    about = {
        "__version__": _versions(),
        "prompts": recipe.prompts,
        "default_prompt_name": recipe.default_prompt,
    }
    write_json(folder / "config_sentence_transformers.json", about)
    write_json(folder / "modules.json", modules)


def _name(module: nn.Module) -> str:
    return "Dense" if isinstance(module, nn.Sequential) else type(module).__name__


def _pooling(recipe: Recipe) -> dict[str, Any]:
    config: dict[str, Any] = {"word_embedding_dimension": recipe.model.config.hidden_size}
    given = ["lasttoken" if mode == "last" else mode for mode in recipe.pooling or ("mean",)]
    config |= {key: mode in given for key, mode in OLD_POOLING.items()}
    if given != [mode for mode in OLD_POOLING.values() if mode in given]:
        config["pooling_mode"] = given  # an order that the boolean keys cannot say
    return config | {"include_prompt": recipe.pool_prompt}


def _write_dense(folder: Path, module: nn.Sequential) -> None:
    from safetensors.torch import save_file

    linear, activation = module
    kind = type(activation)
    config = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "activation_function": f"{kind.__module__}.{kind.__name__}",
    }
    write_json(folder / "config.json", config)
    weights = {f"linear.{k}": v.detach().cpu().contiguous() for k, v in linear.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {
        "sentence_transformers": "2.0.0",  # the format's
        "transformers": transformers.__version__,
        "pytorch": torch.__version__,
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def writing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder beside ``path``, whose files replace those of ``path`` at the end.

    Files of ``path`` that were not written anew stay. After an exception ``path`` is as before.

    Raises:
        NotADirectoryError: ``path`` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"expected a folder to write to, got the file {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for file in sorted(p for p in temporary.rglob("*") if not p.is_dir()):
            target = path / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        for folder in (p for p in temporary.rglob("*") if p.is_dir()):
            (path / folder.relative_to(temporary)).mkdir(parents=True, exist_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


__all__ = ["Normalize", "write_folder", "write_json", "writing_folder"]
