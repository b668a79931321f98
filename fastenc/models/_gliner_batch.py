"""Words and labels to packed tokens: what every GLiNER model reads.

Uni-encoder: one sequence is ``[CLS] <<ENT>> label <<ENT>> label … <<SEP>> word word … [SEP]``.
Bi-encoder: the words alone; labels are sequences of another batch. Every word is tokenised on its
own, as transformers does with ``is_split_into_words=True``, so the tokens of a word never change
and are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastenc.nn import VarlenBatch

KEPT_WORDS = 200_000
"""Words whose tokens are kept (about 30 MB); the table starts anew when it is full."""


@dataclass(frozen=True, eq=False)
class GLiNERBatch:
    """Packed texts with their labels.

    Attributes:
        tokens: the packed tokens, with ``input_ids``.
        word_rows: (words,) int64, the row of each word's first token in the packed tokens.
        word_ends: (words,) int64, the row of its last token; ``word_rows - 1`` for a word that the
            tokenizer drops altogether, whose representation is zero.
        cu_words: (num_seqs + 1,) int32, from 0 to words.
        label_rows: (num_seqs, C) int64, the row of each label's <<ENT>> token, -1 where a sequence
            has fewer labels than C; (num_seqs, 0) for bi-encoders.
        num_labels: labels of each sequence.
        word_lengths: words of each sequence, on the host.
        dropped: whether there is a word without tokens.
    """

    tokens: VarlenBatch
    word_rows: Tensor
    word_ends: Tensor
    cu_words: Tensor
    label_rows: Tensor
    num_labels: list[int]
    word_lengths: list[int]
    dropped: bool = False

    @property
    def num_seqs(self) -> int:
        return len(self.word_lengths)

    @property
    def label_mask(self) -> Tensor:
        """(num_seqs, C) bool: the labels that exist."""
        return self.label_rows >= 0

    def span_mask(self, max_width: int) -> Tensor:
        """(words, max_width) bool: the spans that end within their sequence."""
        lengths = self.cu_words.diff().long()
        ends = self.cu_words[1:].long().repeat_interleave(lengths, output_size=self.words)
        word = torch.arange(self.words, device=ends.device)
        return (word.unsqueeze(1) + torch.arange(max_width, device=ends.device)) < ends[:, None]

    @property
    def words(self) -> int:
        return self.word_rows.shape[0]

    def to(self, device: torch.device | str) -> GLiNERBatch:
        """The batch on ``device``; the copy does not block the host."""
        names = ("tokens", "word_rows", "word_ends", "cu_words", "label_rows")
        moved = {}
        for name in names:
            x = getattr(self, name)
            moved[name] = x.to(device, non_blocking=True) if isinstance(x, Tensor) else x.to(device)
        return replace(self, **moved)


class WordTokenizer:
    """Words and labels to token ids, one word at a time.

    Args:
        tokenizer: of transformers; its special tokens are put around every sequence.
        ent_token, sep_token: gliner's markers, known to the tokenizer.
        embed_ent_token: a label is read at its <<ENT>> token, else at the token behind it.
    """

    def __init__(
        self, tokenizer: Any, ent_token: str, sep_token: str, embed_ent_token: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.markers = (ent_token, sep_token)
        self.embed_ent_token = embed_ent_token
        self._kept: dict[str, tuple[int, ...]] = {}
        self._size = len(tokenizer) if tokenizer is not None else 0
        self._around: tuple[list[int], list[int]] | None = None

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a sequence."""
        if self._around is None:
            full = self.tokenizer(["a"], is_split_into_words=True)["input_ids"]
            bare = self._tokenise(["a"])[0]
            at = next(i for i in range(len(full)) if tuple(full[i : i + len(bare)]) == bare)
            self._around = (list(full[:at]), list(full[at + len(bare) :]))
        return self._around

    def word_ids(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids of each word, without special tokens. Tokens that are added are seen."""
        if (size := len(self.tokenizer)) != self._size:
            self._kept, self._size = {}, size
        kept = self._kept
        new = [word for word in dict.fromkeys(words) if word not in kept]
        if new:
            if len(kept) + len(new) > KEPT_WORDS:
                kept = self._kept = {}
                new = [*dict.fromkeys(words)]
            kept.update(zip(new, self._tokenise(new), strict=True))
        return [kept[word] for word in words]

    def prompt(self, labels: Sequence[str]) -> tuple[list[int], list[int]]:
        """(token ids, places of the labels in them) of ``<<ENT>> label … <<SEP>>``."""
        ent, sep = self.word_ids(self.markers)
        ids: list[int] = []
        places = []
        for tokens in self.word_ids([str(label) for label in labels]):
            places.append(len(ids) + (0 if self.embed_ent_token else len(ent)))
            ids += ent + tokens
        return [*ids, *sep], places

    def batch(
        self,
        texts: Sequence[Sequence[str]],
        labels: Sequence[Sequence[str]] | None,
        device: torch.device | str = "cpu",
        max_tokens: int | None = None,
    ) -> GLiNERBatch:
        """Pack words with their labels in front.

        Args:
            texts: the words of each text.
            labels: the labels of each text, or None where they are no part of the sequence
                (bi-encoder).
            device: of the batch.
            max_tokens: words are cut short where a sequence would be longer.
        """
        shared: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
        prompts = []
        for i in range(len(texts)):
            key = () if labels is None else tuple(labels[i])
            if key not in shared:
                shared[key] = ([], []) if labels is None else self.prompt(key)
            prompts.append(shared[key])
        words = self.word_ids([word for text in texts for word in text])
        lengths = [len(text) for text in texts]
        return self.pack(words, lengths, prompts, max_tokens).to(device)

    def pack(
        self,
        words: Sequence[tuple[int, ...]],
        lengths: Sequence[int],
        prompts: Sequence[tuple[list[int], list[int]]],
        max_tokens: int | None = None,
    ) -> GLiNERBatch:
        """As :meth:`batch`, from token ids: ``words`` of all texts, ``lengths`` words a text."""
        before, after = self.around
        ids: list[int] = []
        sizes, counts = [], []
        word_starts = np.empty(len(words), np.int64)
        label_rows = np.full(
            (len(lengths), max((len(p[1]) for p in prompts), default=0)), -1, np.int64
        )
        first = 0
        for seq, (count, (prompt, places)) in enumerate(zip(lengths, prompts, strict=True)):
            start = len(ids)
            own = words[first : first + count]
            room = None
            if max_tokens is not None:
                room = max_tokens - len(before) - len(prompt) - len(after)
                own = _fitted(own, room)
            ids += before
            label_rows[seq, : len(places)] = np.asarray(places, np.int64) + len(ids)
            ids += prompt
            sizes_here = np.fromiter(map(len, own), np.int64, count)
            word_starts[first : first + count] = len(ids) + np.cumsum(sizes_here) - sizes_here
            counts.append(sizes_here)
            ids += itertools.chain.from_iterable(own)
            ids += after
            sizes.append(len(ids) - start)
            first += count
        edges = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        tokens = VarlenBatch(
            edges, max(sizes, default=0), len(ids), torch.tensor(ids, dtype=torch.int64)
        )
        per_word = np.concatenate(counts) if counts else np.empty(0, np.int64)
        return GLiNERBatch(
            tokens=tokens,
            word_rows=torch.from_numpy(word_starts),
            word_ends=torch.from_numpy(word_starts + per_word - 1),
            cu_words=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            label_rows=torch.from_numpy(label_rows),
            num_labels=[len(places) for _, places in prompts],
            word_lengths=list(lengths),
            dropped=bool((per_word == 0).any()),
        )

    def _tokenise(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        rows = self.tokenizer(
            [[word] for word in words], is_split_into_words=True, add_special_tokens=False
        )["input_ids"]
        return [tuple(row) for row in rows]


def _fitted(words: Sequence[tuple[int, ...]], room: int) -> Sequence[tuple[int, ...]]:
    """The words, each cut to its first tokens, so that all of them fit; at least one token each."""
    total = sum(map(len, words))
    if total <= room:
        return words
    most = max(map(len, words))
    while most > 1 and total > room:
        most = max(1, most // 2)
        total = sum(min(len(word), most) for word in words)
    return [word[:most] for word in words]
