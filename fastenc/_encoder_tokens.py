"""Texts to token ids, ahead of the model.

Texts are taken in windows. A thread tokenises window k + 1 while the model works on window k, so at
most two windows are in memory; inside a window texts are sorted by token count, longest first, and
cut into batches of at most ``token_budget`` tokens. Windows grow from 256 to 65536 texts: the model
starts after a fraction of a second, and long jobs still sort over many texts.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

FIRST_WINDOW, GROWTH, LAST_WINDOW = 256, 4, 65536
CHUNK = 1024
"""Texts in one call of the tokenizer: enough to fill its threads, few enough to stop soon."""


@dataclass(frozen=True)
class Window:
    """Tokenised texts ``start`` to ``start + len(order)``, longest first.

    order (n,) int64: place of each row among the window's texts; edges (n + 1,) int64: row i owns
    ``ids[edges[i] : edges[i + 1]]``; ids (total_tokens,) int32.
    """

    start: int
    order: np.ndarray
    edges: np.ndarray
    ids: np.ndarray


class Tokens:
    """A tokenizer with its length limit, callable from any thread.

    ``tokenizer``: of transformers or of the tokenizers library, or a callable with the arguments of
    transformers' tokenizers. Works on a private copy where it can: transformers changes the state
    of a shared one at each call. Tokens that are added to it are seen.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, truncate: bool):
        self.max_length, self.truncate = max_length, truncate
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._copied: tuple[Any, int, Any] | None = None

    def __reduce__(self) -> tuple:
        return Tokens, (self._tokenizer, self.max_length, self.truncate)

    def _fast(self) -> Any:
        """The private copy of the tokenizers.Tokenizer inside, None where there is none."""
        shared = _shared(self._tokenizer)
        if shared is None:
            return None
        size = shared.get_vocab_size()
        with self._lock:
            if self._copied is None or self._copied[0] is not shared or self._copied[1] != size:
                self._copied = shared, size, self._copy(shared)
            return self._copied[2]

    def _copy(self, shared: Any) -> Any:
        made = copy.deepcopy(shared)
        made.no_padding()
        made.no_truncation()
        made.encode_special_tokens = getattr(self._tokenizer, "split_special_tokens", False)
        if self.truncate and self.max_length is not None:
            side = getattr(self._tokenizer, "truncation_side", "right")
            made.enable_truncation(self.max_length, direction=side)
        return made

    def __call__(self, texts: list[str], first: int = 0) -> list[np.ndarray]:
        """One int32 array of token ids a text, special tokens included.

        Raises:
            ValueError: truncate is False and a text is longer than max_length. The message names
                its place, counted from ``first``, and its token count.
        """
        if (fast := self._fast()) is not None:
            ids = [row.ids for row in fast.encode_batch_fast(texts)]
        else:
            cut = {"truncation": True, "max_length": self.max_length}
            with self._lock:
                given = self._tokenizer(texts, **(cut if self.truncate and self.max_length else {}))
            ids = given["input_ids"]
        if not self.truncate and self.max_length is not None:
            for i, row in enumerate(ids):
                if len(row) > self.max_length:
                    raise ValueError(
                        f"text {first + i} has {len(row)} tokens, the model takes"
                        f" {self.max_length} (truncate=True cuts it)"
                    )
        return [np.asarray(row, dtype=np.int32) for row in ids]


def _shared(tokenizer: Any) -> Any:
    """The tokenizers.Tokenizer inside, None where Python code of its own takes part."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, tokenizers.Tokenizer):
        return tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    own = ("__call__", "_encode_plus")
    if any(getattr(type(tokenizer), f) is not getattr(PreTrainedTokenizerFast, f) for f in own):
        return None
    return tokenizer.backend_tokenizer


def window_edges(count: int) -> list[tuple[int, int]]:
    """[(start, stop)] of the windows over ``count`` texts, growing from 256 to 65536."""
    edges, start, size = [], 0, FIRST_WINDOW
    while start < count:
        edges.append((start, min(count, start + size)))
        start, size = start + size, min(size * GROWTH, LAST_WINDOW)
    return edges


def tokenised(texts: Sequence[str], tokens: Tokens, prompt: str = "") -> Iterator[Window]:
    """The windows over ``texts``, each tokenised while the caller works on the one before.

    An exception of the tokenizer is raised here. Close the generator to stop the thread early.
    """
    edges = window_edges(len(texts))
    stop = threading.Event()

    def window(start: int, end: int) -> Window:
        rows: list[np.ndarray] = []
        for first in range(start, end, CHUNK):
            if stop.is_set():
                break
            chunk = [prompt + text for text in texts[first : min(first + CHUNK, end)]]
            rows += tokens(chunk, first)
        return sorted_window(start, rows)

    if len(edges) == 1:
        yield window(*edges[0])
        return
    with ThreadPoolExecutor(1, thread_name_prefix="fastenc-tokenise") as thread:
        try:
            ahead = None
            for edge in edges:
                ready, ahead = ahead, thread.submit(window, *edge)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()
        finally:
            stop.set()


def sorted_window(start: int, rows: list[np.ndarray]) -> Window:
    """Token rows, longest first; equal lengths keep their order."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    ids = np.concatenate([rows[i] for i in order]) if rows else np.empty(0, np.int32)
    return Window(start, order, np.concatenate([[0], np.cumsum(lengths[order])]), ids)


def batches(edges: np.ndarray, token_budget: int, padded: bool = False) -> list[tuple[int, int]]:
    """Cut rows, longest first, into batches: [(first row, end row)], none empty.

    Args:
        edges: (n + 1,), from 0; the lengths between them do not increase.
        token_budget: most tokens in a batch; a single longer row is a batch of its own.
        padded: count each row as long as the longest of its batch.
    """
    rows = len(edges) - 1
    cuts, start = [], 0
    while start < rows:
        if padded:
            longest = int(edges[start + 1] - edges[start])
            stop = start + token_budget // max(longest, 1)
        else:
            stop = int(np.searchsorted(edges, edges[start] + token_budget, side="right")) - 1
        stop = min(max(stop, start + 1), rows)
        cuts.append((start, stop))
        start = stop
    return cuts
