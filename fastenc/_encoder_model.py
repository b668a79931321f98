"""Token ids in, hidden states out: which model runs, and whether it runs packed.

What fastenc.models has (BERT, RoBERTa, ModernBERT) runs packed: its own classes, models that
``fastenc.accelerate`` took over, and transformers' classes, seen as fastenc's. Every other
architecture runs padded through transformers, and says so.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastenc.models._takeover import our_class
from fastenc.nn import VarlenBatch, packed_forward_of, prepack
from fastenc.nn.graphs import ForwardGraphs
from fastenc.ops._registry import note_fallback

COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet")
"""Models whose first token has position pad_token_id + 1."""

HiddenStates = Callable[[np.ndarray, np.ndarray], Tensor]
"""(ids (total_tokens,) int32, lengths (n,), each >= 1) -> (total_tokens, hidden) on the device."""


def load_transformer(source: str, subfolder: str = "") -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a folder or hub id: fastenc's class where there is one, else AutoModel.

    fastenc's keep a copy of their linear layers' weights in the CPU's layout once they ran there
    (MiniLM: a fifth more tokens a second). Of an encoder-decoder only the encoder is taken. A
    folder of peft's (an adapter, no config.json) is the model that it names, with the adapter.
    Raises what transformers raises for missing files.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    if os.path.isdir(source):
        source, subfolder = os.path.join(source, subfolder), ""
        files = os.listdir(source)
        if "adapter_config.json" in files and "config.json" not in files:
            return AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    config = AutoConfig.from_pretrained(source, subfolder=subfolder)
    tokenizer = AutoTokenizer.from_pretrained(source, subfolder=subfolder)
    if (ours := packed_class(config)) is not None:
        return prepack(ours.from_pretrained(source, subfolder=subfolder)), tokenizer
    model = AutoModel.from_pretrained(source, subfolder=subfolder)
    return (model.get_encoder() if config.is_encoder_decoder else model), tokenizer


def packed_class(config: Any) -> type[nn.Module] | None:
    """fastenc's class of a config's base model, or None."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    theirs = MODEL_MAPPING.get(type(config), None)
    return our_class(theirs) if isinstance(theirs, type) else None


def length_limit(tokenizer: Any, config: Any) -> int | None:
    """Most tokens of a text, special ones included: of the tokenizer and the position table."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and getattr(config, "model_type", "") in COUNT_FROM_PADDING:
        positions -= config.pad_token_id + 1
    limits = (bounded(getattr(tokenizer, "model_max_length", None)), bounded(positions))
    return min((limit for limit in limits if limit is not None), default=None)


def bounded(limit: int | None) -> int | None:
    """A length limit, None where there is none: transformers' 10**30 among them."""
    return limit if limit and 0 < limit < 10**9 else None


def padding_id(tokenizer: Any, model: nn.Module) -> int:
    """The token that fills padding: the tokenizer's, else the model's, else 0."""
    for owner in (tokenizer, model.config):
        found = getattr(owner, "pad_token_id", None)
        if found is not None:
            return found
    return 0


def lower_case(tokenizer: Any) -> None:
    """Make a transformers tokenizer lower its input, as sentence-transformers' do_lower_case."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    given = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *given])


def learns_prompts(model: nn.Module) -> bool:
    """Whether peft puts virtual tokens before the texts: its wrapper does, no layer inside."""
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


# ---- running -----------------------------------------------------------------------------------


class Runner:
    """Runs one model, packed where it can. ``padded`` says which for the coming batches.

    Args:
        model: fastenc's, transformers', or accelerated; a model with a head runs without it.
        pad_id: the token that fills padding, for models that cannot run packed.
        cuda_graphs: replay captured graphs where the model runs packed on a GPU.
    """

    def __init__(self, model: nn.Module, pad_id: int, cuda_graphs: bool = False):
        self.base = model if learns_prompts(model) else getattr(model, "base_model", model)
        self.pad_id = pad_id
        self._graphs: ForwardGraphs | None = None
        if cuda_graphs:
            self._graphs = ForwardGraphs(
                lambda batch: self._packed()(batch),
                self.base,
                pad_id=pad_id,
                keep=getattr(_as_ours(self.base), "_kept_tables", None),
            )

    def __reduce__(self) -> tuple:
        return Runner, (self.base, self.pad_id, self._graphs is not None)

    def _packed(self) -> Callable[..., Tensor] | None:
        if learns_prompts(self.base):
            return None
        return packed_forward_of(self.base) or packed_forward_of(_as_ours(self.base))

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def packed(self) -> Callable[..., Tensor] | None:
        """The packed forward for the model as it is now; None where it pads, with a noted reason.

        It takes a :class:`VarlenBatch` and gives (total_tokens, hidden).
        """
        base = self.base
        packed = self._packed()
        reason = "it has no packed form" if packed is None else None
        if base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base):
            reason = "its forward has hooks or was replaced"
        if reason is None:
            return packed
        note_fallback(f"Encoder: {type(base).__name__} runs padded: {reason}")
        return None

    def choose(self) -> tuple[HiddenStates, bool]:
        """(the forward for the model as it is now, whether it pads); notes why where it pads."""
        packed = self.packed()
        if packed is None:
            return self._run_padded, True
        if self._graphs is not None:
            packed = self._graphs
        return lambda ids, lengths: packed(_varlen(ids, lengths, self.device)), False

    def _run_padded(self, ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        real = np.arange(int(lengths.max())) < lengths[:, None]
        grid = np.full(real.shape, self.pad_id, np.int64)
        grid[real] = ids
        out = self.base(
            input_ids=on_device(grid, self.device),
            attention_mask=on_device(real.astype(np.int64), self.device),
        )
        places = on_device(np.flatnonzero(real), self.device)
        hidden = out.last_hidden_state[:, -real.shape[1] :]  # virtual tokens stand before the text
        return hidden.flatten(0, 1).index_select(0, places)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device; to a GPU from pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def edges_of(lengths: np.ndarray, device: torch.device) -> Tensor:
    """(n,) lengths -> cu_seqlens (n + 1,) int32."""
    return on_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)


def _varlen(ids: np.ndarray, lengths: np.ndarray, device: torch.device) -> VarlenBatch:
    tokens = on_device(ids, device).long()
    return VarlenBatch.from_cu_seqlens(edges_of(lengths, device), tokens, int(lengths.max()))


def _as_ours(base: nn.Module) -> nn.Module:
    """A transformers model seen as fastenc's class of it; others as they are.

    The view has the model's own parameters, submodules and hooks, now and later: nothing is copied,
    and the model itself is not changed.
    """
    ours = our_class(type(base))
    if ours is None:
        return base
    view = copy.copy(base)
    view.__class__ = ours
    return view
