"""``VarlenBatch``: many sequences in one packed row of tokens, and the way back to padded tensors.

A padded (rows, columns, ...) tensor and its mask become (total_tokens, ...) and ``cu_seqlens``
(num_seqs + 1,) int32: sequence i owns the tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
Tokens move by index, never by multiplication with the mask, so what stands in the padding (NaN
too) cannot reach a real token, and gradients of padding are exactly zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops.segment_pool import segment_pool


@dataclass(frozen=True, eq=False)
class VarlenBatch:
    """Packed sequences.

    Attributes:
        cu_seqlens: (num_seqs + 1,) int32, from 0 to ``total_tokens``.
        max_seqlen: a bound of the longest sequence, on the host.
        total_tokens: T, on the host.
        input_ids: (T,) or None.
        padded_shape: (rows, columns) of the padded tensors that this came from, or None.
        indices: (T,) int64, each token's place in the flattened padded tensor; None where the
            padded tensor has no padding, or where there is none.
        gaps: the mask had holes: a sequence's tokens are not adjacent columns.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    total_tokens: int
    input_ids: Tensor | None = None
    padded_shape: tuple[int, int] | None = None
    indices: Tensor | None = None
    gaps: bool = False

    # ---- from what people have ---------------------------------------------------------------

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> VarlenBatch:
        """Drop the padding of a (rows, columns) batch; left, right and mixed padding, and holes.

        A CUDA mask costs exactly one synchronisation; a CPU mask (of CUDA ``input_ids`` too) or no
        mask costs none.

        Args:
            input_ids: (rows, columns) integers, or None.
            attention_mask: (rows, columns) bool, int or float; nonzero marks a real token. None:
                every token is real. A row without a real token is an empty sequence.
            position_ids: (rows or 1, columns), read only where there is no mask: a position that
                does not exceed the one before it starts a new sequence within the row.
            shape: (rows, columns), needed where neither ids nor mask are given.
            device: of the result; by default that of ``input_ids``, else of the mask.
        """
        shape = _padded_shape(input_ids, attention_mask, shape)
        given = input_ids if input_ids is not None else attention_mask
        if device is None:
            device = torch.device("cpu") if given is None else given.device
        if attention_mask is not None:
            batch = _from_mask(cls, attention_mask, shape).to(device)
        elif position_ids is not None:
            batch = _from_restarts(cls, position_ids, shape).to(device)
        else:
            batch = _dense(cls, shape, device)
        return batch if input_ids is None else replace(batch, input_ids=batch.pack(input_ids))

    @classmethod
    def from_lists(
        cls, token_lists: Sequence[Sequence[int] | Tensor], device: torch.device | str | None = None
    ) -> VarlenBatch:
        """Pack lists (or 1-D tensors) of token ids. No synchronisation.

        Raises:
            TypeError, ValueError: ids are no integers, or a tensor is not 1-D.
        """
        token_lists = list(token_lists)
        lengths = [len(tokens) for tokens in token_lists]
        edges = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        if any(isinstance(tokens, Tensor) for tokens in token_lists):
            rows = [torch.as_tensor(tokens) for tokens in token_lists]
            for index, row in enumerate(rows):
                _checks.tensor(f"token_lists[{index}]", row, 1)
            ids = torch.cat([_as_ids(row) for row in rows])
        else:
            ids = _as_ids(torch.tensor([*itertools.chain(*token_lists)]))
        return cls(edges, max(lengths, default=0), sum(lengths), ids).to(device or ids.device)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, input_ids: Tensor | None = None, max_seqlen: int | None = None
    ) -> VarlenBatch:
        """Take packed tokens as they are.

        No synchronisation where ``input_ids`` and ``max_seqlen`` are given or ``cu_seqlens`` is on
        the CPU, else one.

        Args:
            cu_seqlens: (num_seqs + 1,) integers, non-decreasing from 0 to T.
            input_ids: (T,) integers, or None.
            max_seqlen: a bound of the longest sequence.
        """
        _checks.tensor("cu_seqlens", cu_seqlens, 1)
        if cu_seqlens.is_floating_point() or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"cu_seqlens: expected (num_seqs + 1,) integers, got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)}"
            )
        total = None
        if input_ids is not None:
            _checks.tensor("input_ids", input_ids, 1)
            _checks.same_device("cu_seqlens", cu_seqlens, "input_ids", input_ids)
            total = input_ids.shape[0]
        if total is None or max_seqlen is None:
            longest = cu_seqlens.diff().amax() if cu_seqlens.shape[0] > 1 else cu_seqlens[0]
            last, longest = torch.stack([cu_seqlens[-1], longest]).tolist()
            total = last if total is None else total
            max_seqlen = longest if max_seqlen is None else max_seqlen
        cu_seqlens = cu_seqlens.to(torch.int32)
        like = cu_seqlens if input_ids is None else input_ids
        cu_seqlens = _checks.cu_seqlens("cu_seqlens", cu_seqlens, total, like, max_seqlen)
        return cls(cu_seqlens, max_seqlen, total, input_ids)

    # ---- what it says ------------------------------------------------------------------------

    @property
    def num_seqs(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """(num_seqs,) int32."""
        return self.cu_seqlens.diff()

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @property
    def columns(self) -> Tensor:
        """(T,) int64: each token's column in the padded tensor, else its position."""
        if self.padded_shape is None:
            return self.positions
        if self.indices is not None:
            return self.indices % self.padded_shape[1]
        rows, columns = self.padded_shape
        return torch.arange(columns, device=self.device).repeat(rows)

    @property
    def positions(self) -> Tensor:
        """(T,) int64: each token's place within its sequence, from 0; holes are kept."""
        starts = self.cu_seqlens[:-1].long()
        token = torch.arange(self.total_tokens, device=self.device)
        if self.gaps:
            token = self.columns
            starts = token[starts.clamp(max=self.total_tokens - 1)]
        return token - starts.repeat_interleave(self.lengths.long(), output_size=self.total_tokens)

    # ---- there and back ----------------------------------------------------------------------

    def pack(self, padded: Tensor) -> Tensor:
        """(rows, columns, ...) -> (T, ...): the real tokens; differentiable."""
        shape = self._shape()
        if tuple(padded.shape[:2]) != shape:
            raise ValueError(f"padded: expected ({shape[0]}, {shape[1]}, ...), got {padded.shape}")
        flat = padded.flatten(0, 1)
        places = self._places()
        return flat if places is None else flat.index_select(0, places)

    def pad(self, packed: Tensor, value: float = 0.0) -> Tensor:
        """(T, ...) -> (rows, columns, ...), ``value`` in the padding; differentiable.

        Batches from lists or ``cu_seqlens`` are padded on the right to ``max_seqlen``.
        """
        if packed.shape[0] != self.total_tokens:
            raise ValueError(f"packed: expected ({self.total_tokens}, ...), got {packed.shape}")
        shape = self._shape()
        places = self._places()
        if places is None:
            return packed.unflatten(0, shape)
        flat = packed.new_full((shape[0] * shape[1], *packed.shape[1:]), value)
        return flat.index_copy(0, places, packed).unflatten(0, shape)

    def split(self, cu_seqlens: Tensor, max_seqlen: int | None = None) -> VarlenBatch:
        """The same tokens, their rows split into sequences at ``cu_seqlens`` (num_seqs + 1,)."""
        longest = self.max_seqlen if max_seqlen is None else int(max_seqlen)
        _checks.tensor("cu_seqlens", cu_seqlens, 1)
        cu_seqlens = cu_seqlens.to(self.device, torch.int32)
        cu_seqlens = _checks.cu_seqlens(
            "cu_seqlens", cu_seqlens, self.total_tokens, cu_seqlens, longest
        )
        return replace(self, cu_seqlens=cu_seqlens, max_seqlen=longest)

    def first(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (rows, ...): the first real token of each row, zeros for a row without one.

        A row of the padded tensor, where there is one, else a sequence.
        """
        if self.padded_shape is not None and self.indices is None and self.padded_shape[1] > 0:
            return packed.unflatten(0, self.padded_shape)[:, 0]
        if packed.dim() == 2 and packed.is_floating_point():
            return segment_pool(packed, self.cu_seqlens, "cls")
        if packed.shape[0] != self.total_tokens:
            raise ValueError(f"packed: expected ({self.total_tokens}, ...), got {packed.shape}")
        if self.total_tokens == 0:
            return packed.new_zeros(self.num_seqs, *packed.shape[1:])
        begins = self.cu_seqlens[:-1].clamp(max=self.total_tokens - 1)
        empty = (self.lengths == 0).view(-1, *(1,) * (packed.dim() - 1))
        return packed.index_select(0, begins).masked_fill(empty, 0)

    def to(self, device: torch.device | str) -> VarlenBatch:
        """The batch on ``device``; the copy does not block the host."""
        if self.device == torch.device(device):
            return self

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        tensors = {name: move(getattr(self, name)) for name in ("input_ids", "indices")}
        return replace(self, cu_seqlens=move(self.cu_seqlens), **tensors)

    def _shape(self) -> tuple[int, int]:
        return self.padded_shape or (self.num_seqs, self.max_seqlen)

    def _places(self) -> Tensor | None:
        """(T,) int64: each token's place in the flattened padded tensor; None: the same."""
        if self.padded_shape is not None:
            return self.indices
        row = torch.arange(self.num_seqs, device=self.device) * self.max_seqlen
        rows = row.repeat_interleave(self.lengths.long(), output_size=self.total_tokens)
        return rows + self.positions


def _as_ids(tokens: Tensor) -> Tensor:
    """int64; an empty tensor of any dtype is no ids."""
    if tokens.is_floating_point() and tokens.numel():
        raise TypeError(f"token ids: expected integers, got {tokens.dtype}")
    return tokens.to(torch.int64)


def _padded_shape(
    input_ids: Tensor | None, attention_mask: Tensor | None, shape: tuple[int, int] | None
) -> tuple[int, int]:
    for name, x in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if x is None:
            continue
        _checks.tensor(name, x, 2)
        if shape is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(x.shape)}")
        shape = tuple(x.shape)
    if shape is None:
        raise ValueError("from_padded: expected input_ids, attention_mask or shape, got none")
    return shape[0], shape[1]


def _dense(cls, shape: tuple[int, int], device: torch.device | str) -> VarlenBatch:
    rows, columns = shape
    edges = torch.arange(rows + 1, dtype=torch.int32, device=device) * columns
    return cls(edges, columns, rows * columns, None, shape)


def _from_mask(cls, attention_mask: Tensor, shape: tuple[int, int]) -> VarlenBatch:
    rows, columns = shape
    if rows * columns == 0:
        edges = torch.zeros(rows + 1, dtype=torch.int32, device=attention_mask.device)
        return cls(edges, 0, 0, None, shape)
    real = attention_mask != 0
    lengths = real.sum(1)
    first = real.byte().argmax(1)
    last = columns - 1 - real.flip(1).byte().argmax(1)
    holes = ((last - first + 1 != lengths) & (lengths > 0)).any()
    if torch.compiler.is_exporting():
        torch._assert_async(~holes, "an exported model takes no attention_mask with holes")
        edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        indices = real.flatten().nonzero().squeeze(1)
        return cls(edges, columns, indices.shape[0], None, shape, indices)
    total, longest, gaps = torch.stack([lengths.sum(), lengths.amax(), holes.long()]).tolist()
    if total == rows * columns:
        return _dense(cls, shape, attention_mask.device)
    edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    indices = torch.nonzero_static(real.flatten(), size=total).squeeze(1)
    return cls(edges, longest, total, None, shape, indices, bool(gaps))


def _from_restarts(cls, position_ids: Tensor, shape: tuple[int, int]) -> VarlenBatch:
    """No padding, but perhaps several sequences in a row: split where positions do not grow."""
    rows, columns = shape
    _checks.tensor("position_ids", position_ids, 2)
    if position_ids.shape[1] != columns or position_ids.shape[0] not in (1, rows):
        raise ValueError(
            f"position_ids: expected ({rows} or 1, {columns}), got {tuple(position_ids.shape)}"
        )
    dense = _dense(cls, shape, position_ids.device)
    if rows * columns == 0:
        return dense
    starts = torch.ones(shape, dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    starts = starts.flatten()
    token = torch.arange(rows * columns, device=starts.device)
    longest = (token - torch.where(starts, token, 0).cummax(0).values).amax() + 1
    count, longest = torch.stack([starts.sum(), longest]).tolist()
    if count == rows:
        return dense
    edges = torch.nonzero_static(starts, size=count).squeeze(1)
    edges = torch.nn.functional.pad(edges, (0, 1), value=rows * columns).int()
    return replace(dense, cu_seqlens=edges, max_seqlen=longest)
