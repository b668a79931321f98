"""gliner's checkpoint folders, read and written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastenc.models._gliner_config import GLiNERConfig
from fastenc.nn import prepack

if TYPE_CHECKING:
    from fastenc.models.gliner import GLiNER

CONFIG, SAFE, PICKLED = "gliner_config.json", "model.safetensors", "pytorch_model.bin"
_EMBEDDINGS = "token_rep_layer.bert_layer.model.embeddings"
_SHOWN = 8


def load(cls: type[GLiNER], path: str | os.PathLike, dtype, hub: dict[str, Any]) -> GLiNER:
    """What ``GLiNER.from_pretrained`` documents."""
    folder = _folder(path, hub)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}")
    config = GLiNERConfig.from_file(folder / CONFIG)
    weights = read_weights(folder)
    tokenizer = _tokenizer(folder, config.model_name)
    _complete(config, tokenizer, weights, folder)
    labels_tokenizer = None
    if config.bi_encoder:
        labels_tokenizer = _tokenizer(folder / "labels_tokenizer", config.labels_encoder, False)
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = cls(config, tokenizer, labels_tokenizer)
    _fill(model, weights, folder)
    if dtype is not None:
        model.to(dtype)
    return prepack(model).eval()


def save(model: GLiNER, folder: Path) -> None:
    """What ``GLiNER.save_pretrained`` documents; each file under a temporary name first."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    kept: dict[int, str] = {}
    for name, x in state.items():
        if x.data_ptr() in kept or x.untyped_storage().nbytes() != x.numel() * x.element_size():
            state[name] = x.clone()
        kept[x.data_ptr()] = name

    def replace(name: str, write) -> None:
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            write(temporary)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    replace(SAFE, lambda path: save_file(state, path, metadata={"format": "pt"}))
    text = json.dumps(model.config.to_dict(), indent=2, sort_keys=True, default=str) + "\n"
    replace(CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    if model.labels_tokenizer is not None:
        model.labels_tokenizer.save_pretrained(folder / "labels_tokenizer")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, else of pytorch_model.bin without running its code."""
    if (folder / SAFE).is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / SAFE, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                shared = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{folder / SAFE}: not a safetensors file ({error})") from error
        # gliner stores a tensor that is another's alias by name
        for name, kept in shared.items():
            if name not in weights and kept in weights:
                weights[name] = weights[kept]
        return weights
    path = folder / PICKLED
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds neither {SAFE} nor {PICKLED}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path}: not a file of tensors only, and nothing else is loaded ({error})"
        ) from error
    if not isinstance(weights, Mapping) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path}: expected a mapping of names to tensors")
    return dict(weights)


def _folder(path: str | os.PathLike, hub: dict[str, Any]) -> Path:
    if os.path.isdir(path):
        if hub:
            raise TypeError(
                f"from_pretrained: {', '.join(hub)} are for hub ids, {path} is a folder"
            )
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [CONFIG, SAFE, PICKLED, "*token*", "*.model", "vocab*", "labels_tokenizer/*"]
    try:
        return Path(snapshot_download(os.fspath(path), allow_patterns=patterns, **hub))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no folder, not in the hub's cache, and the hub was not reached: {error}"
        ) from error


def _tokenizer(folder: Path, name: str | None, markers: bool = True) -> Any:
    """The folder's tokenizer, else the backbone's; bos and eos as gliner sets them."""
    from transformers import AutoTokenizer

    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder if own else name)
    if markers:
        for kind in ("bos", "eos"):
            flag, token_id = f"add_{kind}_token", getattr(tokenizer, f"{kind}_token_id", None)
            if hasattr(tokenizer, flag) and token_id is not None:
                setattr(tokenizer, flag, True)
    return tokenizer


def _complete(config: GLiNERConfig, tokenizer: Any, weights: dict[str, Tensor], folder: Path):
    """What gliner derives when it loads: the encoder's config, the markers, the vocabulary."""
    from transformers import AutoConfig

    for encoder, name in (
        ("encoder_config", config.model_name),
        ("labels_encoder_config", config.labels_encoder),
    ):
        if name is not None and getattr(config, encoder) is None:
            setattr(config, encoder, AutoConfig.from_pretrained(name))
            config.__post_init__()
    if not config.bi_encoder and (config.class_token_index == -1 or config.vocab_size == -1):
        tokenizer.add_tokens(["[FLERT]", config.ent_token, config.sep_token], special_tokens=True)
        config.class_token_index = len(tokenizer) - 2
    rows = next(
        (x.shape[0] for key, x in weights.items() if key == f"{_EMBEDDINGS}.word_embeddings.weight"
         or key == f"{_EMBEDDINGS}.tok_embeddings.weight"),
        None,
    )  # fmt: skip
    if rows is None:
        raise ValueError(f"{folder}: the weights hold no word embeddings under {_EMBEDDINGS}")
    config.encoder_config.vocab_size = rows
    if config.bi_encoder:
        return
    config.vocab_size = rows
    marker = tokenizer.convert_tokens_to_ids(config.ent_token)
    if marker is None or marker == tokenizer.unk_token_id:
        raise ValueError(f"{folder}: the tokenizer does not know the marker {config.ent_token!r}")
    if len(tokenizer) > rows:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows"
        )


def _fill(model: GLiNER, weights: dict[str, Tensor], folder: Path) -> None:
    own = model.state_dict()
    ignored = ("position_ids", "inv_freq", "token_type_ids", "precomputed_prompts")
    extra = [k for k in weights if k not in own and not k.endswith(ignored)]
    missing = [k for k in own if k not in weights]
    misshaped = [
        f"{k} ({tuple(weights[k].shape)} in the checkpoint, {tuple(x.shape)} in the model)"
        for k, x in own.items()
        if k in weights and weights[k].shape != x.shape
    ]
    complaints = [
        f"{what} keys: {', '.join(sorted(keys)[:_SHOWN])}"
        + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
        for what, keys in (("missing", missing), ("unexpected", extra), ("misshaped", misshaped))
        if keys
    ]
    if complaints:
        raise ValueError(f"{folder} does not fit GLiNER: {'; '.join(complaints)}")
    dtypes = {x.dtype for x in weights.values() if x.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict({k: weights[k] for k in own})
