"""gliner's padded inputs as packed words and labels, and packed scores as gliner pads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastenc.models._gliner_batch import GLiNERBatch
from fastenc.nn import VarlenBatch


@dataclass(frozen=True, eq=False)
class Padded:
    """A packed batch with its way back.

    Attributes:
        batch: packed.
        seq, column: (words,) int64, each packed word's text and place in it.
        columns: words of gliner's padded tensors.
        mask: (num_seqs, columns), the words that exist.
        label_mask: (num_seqs, C), the labels that exist, in the dtype of gliner's attention mask.
    """

    batch: GLiNERBatch
    seq: Tensor
    column: Tensor
    columns: int
    mask: Tensor
    label_mask: Tensor

    @classmethod
    def read(
        cls,
        config: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        words_mask: Tensor,
        text_lengths: Tensor,
        word_lengths: list[int] | None,
        columns: int | None,
        markers: bool = True,
    ) -> Padded:
        """From what gliner's collator makes.

        Args:
            words_mask: (rows, tokens), the word of a token from 1, 0 for tokens that are not read.
            columns: of gliner's padded words; None: of the longest text.
            markers: labels stand in the tokens, behind ``config.class_token_index``.
        """
        tokens = VarlenBatch.from_padded(input_ids, attention_mask)
        device = tokens.device
        if word_lengths is None:
            word_lengths = text_lengths.flatten().tolist()
        lengths = torch.tensor(word_lengths, device=device)
        edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        total = sum(word_lengths)
        token_seq = torch.arange(tokens.num_seqs, device=device).repeat_interleave(
            tokens.lengths.long(), output_size=tokens.total_tokens
        )
        word = tokens.pack(words_mask)
        rows = ((word > 0) & (word <= lengths[token_seq])).nonzero().squeeze(1)
        place = edges[token_seq[rows]] + word[rows] - 1
        first = torch.full((total,), tokens.total_tokens, device=device)
        first.scatter_reduce_(0, place, rows, "amin")
        last = torch.full((total,), -1, device=device).scatter_reduce_(0, place, rows, "amax")
        dropped = last < 0  # those are empty, where the next word begins
        first = first.flip(0).cummin(0).values.flip(0)
        last = torch.where(dropped, first - 1, last)
        label_rows, counts = _labels(config, tokens, token_seq, markers)
        columns = max(word_lengths, default=0) if columns is None else columns
        seq = torch.arange(tokens.num_seqs, device=device).repeat_interleave(
            lengths, output_size=total
        )
        batch = GLiNERBatch(
            tokens=tokens,
            word_rows=first,
            word_ends=last,
            cu_words=edges.int(),
            label_rows=label_rows,
            num_labels=counts,
            word_lengths=list(word_lengths),
            dropped=bool(dropped.any()),
        )
        return cls(
            batch=batch,
            seq=seq,
            column=torch.arange(total, device=device) - edges[seq],
            columns=columns,
            mask=torch.arange(columns, device=device) < lengths.unsqueeze(1),
            label_mask=batch.label_mask.to(attention_mask.dtype),
        )

    def pad(self, packed: Tensor) -> Tensor:
        """(words, ...) -> (num_seqs, columns, ...), zeros in the padding."""
        shape = (self.batch.num_seqs, self.columns, *packed.shape[1:])
        return packed.new_zeros(shape).index_put((self.seq, self.column), packed)

    def pad_spans(self, logits: Tensor) -> Tensor:
        """(words, max_width, C) -> (num_seqs, columns, max_width, C).

        gliner scores the span (0, 0) of its text wherever a span does not exist.
        """
        shape = (self.batch.num_seqs, self.columns, *logits.shape[1:])
        starts = self.batch.cu_words[:-1].long().clamp(max=max(logits.shape[0] - 1, 0))
        collapsed = logits[starts, 0].unsqueeze(1)
        filled = torch.where(
            self.batch.span_mask(logits.shape[1]).unsqueeze(-1), logits, collapsed[self.seq]
        )
        padding = collapsed.unsqueeze(1).expand(shape)
        return padding.index_put((self.seq, self.column), filled)


def _labels(
    config: Any, tokens: VarlenBatch, token_seq: Tensor, markers: bool
) -> tuple[Tensor, list[int]]:
    """(num_seqs, C) rows of the labels' markers, -1 where there is none, and their numbers."""
    if not markers:
        return token_seq.new_empty(tokens.num_seqs, 0), [0] * tokens.num_seqs
    rows = (tokens.input_ids == config.class_token_index).nonzero().squeeze(1)
    seq = token_seq[rows]
    counts = torch.bincount(seq, minlength=tokens.num_seqs)
    most = int(counts.max()) if len(counts) else 0
    rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[seq]
    found = torch.full((tokens.num_seqs, most), -1, device=rows.device)
    found[seq, rank] = rows if config.embed_ent_token else rows + 1
    return found, counts.tolist()
