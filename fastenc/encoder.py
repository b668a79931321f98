"""``Encoder``: texts in, one vector a text out.

Tokenised in a thread ahead of the model, sorted by token count, packed without padding up to a
budget of tokens a batch, pooled by segment, and put back in input order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastenc._encoder_folder import Normalize, Recipe, read_folder, read_sentence_transformer
from fastenc._encoder_model import Runner, edges_of, length_limit, on_device, padding_id
from fastenc._encoder_tokens import Tokens, Window, batches, tokenised
from fastenc.nn import POOLING_MODES, pool
from fastenc.nn._modules import evaluating

CPU_TOKENS_PER_THREAD = 2048
"""On a CPU a batch has at most this many tokens a thread: larger ones fall out of its caches.
MiniLM on one AVX-512 core, tokens/s at 1024, 2048, 4096, 8192, 16384 tokens a batch: 3870, 4000,
3980, 3810, 3560."""

log = logging.getLogger("fastenc")


class _Default(str):
    """A default that can be told from the same value given by the caller."""


class Encoder:
    """Embeds texts with an encoder model.

    Args:
        model: a folder or hub id, of sentence-transformers (its pooling, Dense and Normalize
            modules, length limit and prompts are read) or of transformers; or a module: fastenc's
            (a SentenceBody too), transformers', or a SentenceTransformer. BERT, RoBERTa and
            ModernBERT run packed; every other architecture runs padded through transformers, with
            a logged reason.
        tokenizer: of transformers or of the tokenizers library, or a folder; None: the model's own.
        pooling: "mean", "cls", "max", "last", "mean_sqrt_len_tokens" or "weightedmean", over a
            text's tokens, special ones included. Given explicitly it replaces the pooling of a
            sentence-transformers model.
        normalize: scale each vector to length 1 (a sentence-transformers Normalize module always
            runs).
        token_budget: most tokens in a batch; a single longer text is a batch of its own. A CPU gets
            at most 2048 tokens a thread, beyond which it slows down.
        truncate: cut texts at ``max_length`` tokens; False: a longer text raises ValueError.
        max_length: most tokens of a text; None: the checkpoint's limit.
        cuda_graphs: on a GPU, replay captured CUDA graphs of batches up to 16384 tokens, one a
            bucket of (tokens, sequences, longest); elsewhere nothing changes but a noted reason.

    The vectors come from the device that the model is on, in its dtype, and are float32 at the end.
    ``encode`` may be called from several threads: their batches take turns.

    Raises:
        TypeError, ValueError: an argument does not fit, or a model comes without a tokenizer.
        NotImplementedError: a sentence-transformers module or mode that fastenc does not serve.
        OSError: files are missing.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike,
        tokenizer: Any = None,
        pooling: str = _Default("mean"),
        normalize: bool = False,
        token_budget: int = 16384,
        truncate: bool = True,
        *,
        max_length: int | None = None,
        cuda_graphs: bool = False,
    ):
        if pooling not in POOLING_MODES:
            raise ValueError(
                f"pooling: expected one of {', '.join(POOLING_MODES)}, got {pooling!r}"
            )
        self.token_budget = _positive("token_budget", token_budget)
        recipe = _read(model, tokenizer)
        if recipe.pooling is None or not isinstance(pooling, _Default):
            recipe.pooling = (str(pooling),)
        if max_length is not None:
            recipe.max_length = _positive("max_length", max_length)
        self.model, self.tokenizer = recipe.model, recipe.tokenizer
        self.max_length, self.truncate = recipe.max_length, truncate
        self.pooling, self.prompts = recipe.pooling, recipe.prompts
        self.default_prompt = recipe.default_prompt
        self._pool_prompt = recipe.pool_prompt
        self._head = nn.Sequential(*recipe.head, *([Normalize()] if normalize else []))
        self._tokens = Tokens(self.tokenizer, self.max_length, truncate)
        pad_id = padding_id(self.tokenizer, self.model)
        self._runner = Runner(self.model, pad_id, cuda_graphs)
        self._turn = threading.RLock()

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._runner.device

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        for layer in reversed(self._head):
            if isinstance(layer, nn.Sequential):
                return layer[0].out_features
        return len(self.pooling) * self.model.config.hidden_size

    def to(self, *args: Any, **kwargs: Any) -> Encoder:
        """Move the model, as ``nn.Module.to``; returns self."""
        self.model.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        return (
            f"Encoder({type(self.model).__name__}, dimension={self.dimension},"
            f" pooling={'+'.join(self.pooling)}, max_length={self.max_length},"
            f" token_budget={self.token_budget}, device={str(self.device)!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.RLock())

    # ---- encode --------------------------------------------------------------------------------

    def encode(
        self,
        texts: str | Iterable[str],
        show_progress: bool | None = None,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        token_budget: int | None = None,
    ) -> np.ndarray:
        """Embed texts.

        Args:
            texts: a string, or strings. An empty string is its special tokens alone; a text of no
                token at all gives the pooled zero vector.
            show_progress: a progress bar on stderr; None: once it has run for two seconds.
            prompt: put before every text; None: ``prompts[prompt_name]``, else the checkpoint's
                default prompt.
            prompt_name: a name in ``prompts``.
            token_budget: most tokens in a batch of this call.

        Returns:
            float32, (n, dimension) in input order; (dimension,) for a single string.

        Raises:
            TypeError: something is not a string (its index is named).
            ValueError: ``truncate=False`` and a text is too long (its index and length are named),
                or an unknown prompt name.
        """
        single = isinstance(texts, str)
        texts = _strings([texts] if single else texts)
        prompt = self._prompt(prompt, prompt_name)
        budget = self.token_budget
        if token_budget is not None:
            budget = _positive("token_budget", token_budget)
        out = np.empty((len(texts), self.dimension), np.float32)
        if texts:
            self._encode(texts, prompt, budget, show_progress, out)
        return out[0] if single else out

    @torch.inference_mode()
    def _encode(
        self, texts: list[str], prompt: str, budget: int, show: bool | None, out: np.ndarray
    ) -> None:
        skip = 0 if self._pool_prompt or not prompt else self._prompt_tokens(prompt)
        forward, padded = self._runner.choose()
        if self.device.type == "cpu":
            budget = min(budget, CPU_TOKENS_PER_THREAD * torch.get_num_threads())
        arriving = _Arriving(out)
        with (
            evaluating(self.model),
            evaluating(self._head.to(self.device)),
            _progress(len(texts), show) as advance,
            contextlib.closing(tokenised(texts, self._tokens, prompt)) as windows,
        ):
            for window in windows:
                advance(window, 0, 0)
                rows = []
                for start, stop in batches(window.edges, budget, padded):
                    with self._turn:
                        rows.append(self._embed(window, start, stop, forward, skip))
                    advance(window, start, stop)
                arriving.put(window, torch.cat(rows))
            arriving.flush()

    def _embed(self, window: Window, start: int, stop: int, forward: Any, skip: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a window -> (rows, dimension) float32 on the device."""
        lengths = np.diff(window.edges[start : stop + 1])
        ids = window.ids[window.edges[start] : window.edges[stop]]
        device = self.device
        if len(ids):
            hidden = forward(ids, lengths[lengths > 0])
        else:
            hidden = torch.zeros(0, self.model.config.hidden_size, device=device)
        hidden = hidden.float()
        skipped = None
        if skip:
            skipped = on_device(np.where(lengths > skip, skip, 0), device)
            hidden, lengths = _without_prompt(hidden, lengths, skip)
        pooled = pool(hidden, edges_of(lengths, device), self.pooling, skipped)
        weight = next(self._head.parameters(), pooled)
        return self._head(pooled.to(weight.dtype)).float()

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            if name is not None:
                log.warning("encode: prompt was given, prompt_name %r is ignored", name)
            return prompt
        if name is None:
            name = self.default_prompt
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"prompt_name: expected one of {sorted(self.prompts)}, got {name!r}")
        return self.prompts[name]

    def _prompt_tokens(self, prompt: str) -> int:
        """Tokens that stand before the text: the prompt's, without a special token at its end."""
        ids = self._tokens([prompt])[0]
        special = getattr(self.tokenizer, "all_special_ids", [])
        return len(ids) - int(len(ids) > 0 and ids[-1] in special)


def _read(model: Any, tokenizer: Any) -> Recipe:
    if isinstance(model, Recipe):
        recipe = replace(model)
    elif isinstance(model, (str, os.PathLike)):
        recipe = read_folder(os.fspath(model))
    elif any(c.__name__ == "SentenceTransformer" for c in type(model).__mro__):
        recipe = read_sentence_transformer(model)
    elif isinstance(model, nn.Module) and hasattr(model, "recipe"):
        recipe = model.recipe()
    elif isinstance(model, nn.Module) and hasattr(model, "config"):
        tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(model)
        recipe = Recipe(model, tokenizer)
    else:
        raise TypeError(
            "model: expected a folder, a hub id, or a model of fastenc, transformers or"
            f" sentence_transformers, got {type(model).__name__}"
        )
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(os.fspath(tokenizer))
    if tokenizer is not None:
        recipe.tokenizer = tokenizer
    if recipe.max_length is None:
        recipe.max_length = length_limit(recipe.tokenizer, recipe.model.config)
    return recipe


def _tokenizer_of(model: nn.Module) -> str:
    """The folder or hub id that a model was loaded from."""
    name = getattr(model.config, "name_or_path", "")
    if not name:
        raise TypeError("tokenizer: the model was not loaded from a folder, so one must be given")
    return name


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def _strings(texts: Any) -> list[str]:
    if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected a string or strings, got {type(texts).__name__}")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__} at index {i}")
    return texts


def _without_prompt(hidden: Tensor, lengths: np.ndarray, skip: int) -> tuple[Tensor, np.ndarray]:
    """Drop the first ``skip`` tokens of every sequence that is longer."""
    drop = np.where(lengths > skip, skip, 0)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    keep = np.flatnonzero(place >= np.repeat(drop, lengths))
    return hidden.index_select(0, on_device(keep, hidden.device)), lengths - drop


class _Arriving:
    """Writes pooled rows to the output. From a GPU: one asynchronous copy a window, and its end is
    waited for only when the next window's copy has been queued."""

    def __init__(self, out: np.ndarray):
        self._out = out
        self._pending: tuple[Window, Tensor, Any] | None = None

    def put(self, window: Window, rows: Tensor) -> None:
        """rows (n, dimension), in the window's sorted order."""
        if rows.device.type == "cuda":
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            host.copy_(rows, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(rows.device))
        else:
            host, copied = rows.cpu(), None
        self.flush()
        self._pending = window, host, copied

    def flush(self) -> None:
        if self._pending is None:
            return
        (window, host, copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        self._out[window.start + window.order] = host.numpy()


@contextlib.contextmanager
def _progress(texts: int, show: bool | None) -> Iterator[Any]:
    """A tqdm bar over tokens; their total is exact once every window is tokenised."""
    if show is False:
        yield lambda window, start, stop: None
        return
    from tqdm import tqdm

    seen = [0, 0]
    delay = 2.0 if show is None else 0.0
    with tqdm(unit="tok", unit_scale=True, desc="Encoding", delay=delay) as bar:

        def advance(window: Window, start: int, stop: int) -> None:
            if stop == 0:
                seen[0] += len(window.order)
                seen[1] += len(window.ids)
                bar.total = round(seen[1] * texts / seen[0])
            else:
                bar.update(int(window.edges[stop] - window.edges[start]))

        yield advance
