"""CUDA graphs of a packed forward: one launch a call instead of a few hundred.

A graph replays fixed shapes, so a batch is laid into a bucket of (tokens, sequences, longest): the
tokens that are missing become dummy sequences at the tail, which no real token sees. Buckets have
eight steps an octave of tokens: at most an eighth of them, for batches of 64 tokens and more, is
filler. Worth it where launches and not kernels take the time: small batches.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastenc.nn.varlen_batch import VarlenBatch
from fastenc.ops import _registry

STEPS = 8
LEAST_TOKENS, LEAST_LONGEST = 64, 32
MAX_TOKENS = 16384
"""Larger batches run as they are: their kernels outlast the launches of the next ones."""
MAX_GRAPHS = 32

Forward = Callable[..., Tensor]
"""(VarlenBatch with input_ids, **rows) -> (total_tokens, hidden)."""


@dataclass(frozen=True)
class Bucket:
    """The shape that a graph was captured with."""

    tokens: int
    num_seqs: int
    longest: int


def bucket_of(total_tokens: int, num_seqs: int, max_seqlen: int) -> Bucket:
    """The smallest bucket that holds a batch and the dummy sequences that fill it up.

    ``tokens``: up to a multiple of an eighth of the power of two below; ``longest`` and
    ``num_seqs``: powers of two. Dummy sequences have at most ``longest`` tokens.
    """
    tokens = LEAST_TOKENS
    if total_tokens > LEAST_TOKENS:
        unit = max(1, (1 << ((total_tokens - 1).bit_length() - 1)) // STEPS)
        tokens = -(-total_tokens // unit) * unit
    longest = max(LEAST_LONGEST, _power_of_two(max_seqlen))
    fillers = -(-(tokens - total_tokens) // longest)
    return Bucket(tokens, _power_of_two(num_seqs + fillers), longest)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Captured(Protocol):
    """A recorded forward: ``replay()`` reads the static inputs again and rewrites ``output``."""

    output: Tensor

    def replay(self) -> None: ...


class CudaGraph:
    """``run()`` captured on the current device, after one warm run on a side stream."""

    def __init__(self, run: Callable[[], Tensor], pool: Any) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = run()

    def replay(self) -> None:
        self._graph.replay()


@dataclass
class _Entry:
    """A captured bucket with the static tensors that it reads."""

    captured: Captured
    input_ids: Tensor
    cu_seqlens: Tensor
    rows: dict[str, Tensor]
    launches: collections.Counter
    alive: list[Any] = field(default_factory=list)
    fresh: bool = True


class ForwardGraphs:
    """Calls ``forward`` through CUDA graphs, one a bucket, the least recently used dropped first.

    Args:
        forward: a packed forward; what it computes must depend on nothing but its arguments and
            ``module``'s parameters.
        module: whose parameters it reads: graphs of parameters that have moved are not used.
        pad_id: the token of dummy sequences.
        max_tokens, max_graphs: larger batches run as they are; at most so many graphs are kept. All
            share one memory pool.
        keep: returns what must outlive a graph beside the parameters (tables kept elsewhere).
        capture: ``CudaGraph``; tests put their own in its place.

    A batch runs as it is (``forward`` itself), with a noted reason, where a graph would not do:
    under autograd or autocast, in training, on a CPU, or where capturing failed; and past
    ``max_tokens``.
    """

    def __init__(
        self,
        forward: Forward,
        module: nn.Module,
        *,
        pad_id: int = 0,
        max_tokens: int = MAX_TOKENS,
        max_graphs: int = MAX_GRAPHS,
        keep: Callable[[], list[Any]] = list,
        capture: Callable[[Callable[[], Tensor], Any], Captured] | None = None,
    ) -> None:
        self.forward, self.module, self.pad_id = forward, module, pad_id
        self.max_tokens, self.max_graphs = max_tokens, max_graphs
        self._keep, self._capture = keep, capture
        self._entries: collections.OrderedDict[tuple, _Entry] = collections.OrderedDict()
        self._failed: set[tuple] = set()
        self._pool: Any = None
        self._replayed: Any = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __call__(self, batch: VarlenBatch, **rows: Tensor | None) -> Tensor:
        """(total_tokens, hidden), a tensor of its own.

        ``rows``: further arguments of ``forward``, (total_tokens,) integers each, or None.
        """
        rows = {name: x for name, x in rows.items() if x is not None}
        reason = self._why_not(batch)
        if reason is not None:
            _registry.note_fallback(f"cuda_graphs: {reason}")
        if reason is not None or not 0 < batch.total_tokens <= self.max_tokens:
            return self.forward(batch, **rows)
        bucket = bucket_of(batch.total_tokens, batch.num_seqs, batch.max_seqlen)
        key = (bucket, tuple(sorted(rows)), *self._state(batch))
        with self._lock:
            entry = self._entries.get(key) or self._record(key, batch, rows)
            if entry is not None:
                self._entries.move_to_end(key)
                return self._replay(entry, bucket, batch, rows)
        return self.forward(batch, **rows)

    def _why_not(self, batch: VarlenBatch) -> str | None:
        device = batch.device.type
        if device != "cuda" and self._capture is None:
            return f"the batch is on {device}"
        if self.module.training:
            return "the model is in training mode"
        if torch.is_grad_enabled():
            return "gradients are wanted"
        if torch.is_autocast_enabled(device):
            return "autocast keeps casts between calls"
        return None

    def _state(self, batch: VarlenBatch) -> tuple:
        """What else a captured graph depends on."""
        addresses = tuple(p.data_ptr() for p in self.module.parameters())
        return batch.device, _registry.chosen_backend(), hash(addresses)

    def _record(self, key: tuple, batch: VarlenBatch, rows: dict[str, Tensor]) -> _Entry | None:
        if key in self._failed:
            return None
        bucket: Bucket = key[0]
        with torch.inference_mode(False):  # filled again later, perhaps outside inference_mode
            ids = torch.full((bucket.tokens,), self.pad_id, device=batch.device)
            edges = torch.zeros(bucket.num_seqs + 1, dtype=torch.int32, device=batch.device)
            static = {
                name: torch.zeros(bucket.tokens, dtype=x.dtype, device=x.device)
                for name, x in rows.items()
            }
        _fill(bucket, batch, rows, ids, edges, static, self.pad_id)
        whole = VarlenBatch(edges, bucket.longest, bucket.tokens, ids)
        try:
            before = _registry.launches()
            captured = self._capturing(lambda: self.forward(whole, **static))
        except Exception as error:
            self._failed.add(key)
            _registry.note_fallback(f"cuda_graphs: capturing failed: {error}")
            return None
        launches = _registry.launches() - before
        launches = collections.Counter({k: n // 2 for k, n in launches.items()})  # ran twice
        entry = _Entry(captured, ids, edges, static, launches, self._keep())
        self._entries[key] = entry
        while len(self._entries) > self.max_graphs:
            self._entries.popitem(last=False)
        return entry

    def _capturing(self, run: Callable[[], Tensor]) -> Captured:
        if self._capture is not None:
            return self._capture(run, self._pool)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(run, self._pool)

    def _replay(
        self, entry: _Entry, bucket: Bucket, batch: VarlenBatch, rows: dict[str, Tensor]
    ) -> Tensor:
        on_gpu = batch.device.type == "cuda"
        if on_gpu and self._replayed is not None:
            torch.cuda.current_stream(batch.device).wait_event(self._replayed)
        _fill(bucket, batch, rows, entry.input_ids, entry.cu_seqlens, entry.rows, self.pad_id)
        entry.captured.replay()
        out = entry.captured.output[: batch.total_tokens].clone()
        if on_gpu:  # the pool's memory is the next replay's too, perhaps on another stream
            self._replayed = torch.cuda.Event()
            self._replayed.record()
        if not entry.fresh:  # the launches of the capture itself were counted as they were recorded
            _registry.count_launches(entry.launches)
        entry.fresh = False
        return out


def _fill(
    bucket: Bucket,
    batch: VarlenBatch,
    rows: dict[str, Tensor],
    input_ids: Tensor,
    cu_seqlens: Tensor,
    static: dict[str, Tensor],
    pad_id: int,
) -> None:
    """Lay a batch into the static tensors of its bucket, on the device, without waiting."""
    total, count = batch.total_tokens, batch.num_seqs
    for target, source, filler in (
        (input_ids, batch.input_ids, pad_id),
        *((static[name], x, 0) for name, x in rows.items()),
    ):
        target[:total].copy_(source)
        target[total:].fill_(filler)
    cu_seqlens[: count + 1].copy_(batch.cu_seqlens)
    fillers = bucket.num_seqs - count
    if fillers:
        last = total + bucket.longest * fillers
        steps = torch.arange(
            total + bucket.longest, last + 1, bucket.longest, device=cu_seqlens.device
        )
        cu_seqlens[count + 1 :].copy_(steps.clamp_(max=bucket.tokens))


class GraphsOf:
    """A model's own :class:`ForwardGraphs`, made at the first call. Copies and pickles of the model
    take the wish along, not the graphs."""

    def __init__(self) -> None:
        self.made: ForwardGraphs | None = None

    def __deepcopy__(self, memo: dict) -> GraphsOf:
        return GraphsOf()

    def __reduce__(self) -> tuple:
        return GraphsOf, ()
