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
    ``num_seqs``: powers of two. Dummy sequences have at most ``max_seqlen`` tokens: a model with
    learned positions may have none beyond.
    """
    tokens = LEAST_TOKENS
    if total_tokens > LEAST_TOKENS:
        unit = max(1, (1 << ((total_tokens - 1).bit_length() - 1)) // STEPS)
        tokens = -(-total_tokens // unit) * unit
    longest = max(LEAST_LONGEST, _power_of_two(max_seqlen))
    fillers = -(-(tokens - total_tokens) // max_seqlen)
    return Bucket(tokens, _power_of_two(num_seqs + fillers), longest)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Captured(Protocol):
    """A recorded forward: ``replay()`` reads the static inputs again and rewrites ``output``."""

    output: Tensor

    def replay(self) -> None: ...


class CapturePlace:
    """Where a device's graphs are captured: they share a memory pool, which asks for one stream.

    torch's own capture stream is of whichever device captured first in the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()


class CudaGraph:
    """``run()`` captured, after one warm run on the capture stream."""

    def __init__(self, run: Callable[[], Tensor], place: CapturePlace) -> None:
        current = torch.cuda.current_stream(place.device)
        with torch.cuda.device(place.device):
            place.stream.wait_stream(current)
            with torch.cuda.stream(place.stream):
                run()
            current.wait_stream(place.stream)
            try:
                self._capture(run, place)
            except Exception:
                # Up to torch 2.12 a capture that fails leaves the generator capturing, and the next
                # dropout raises; one that succeeds sets it right.
                empty = torch.zeros(1, device=place.device)
                self._capture(lambda: empty + 1, CapturePlace(place.device))
                raise

    def _capture(self, run: Callable[[], Tensor], place: CapturePlace) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            self._graph, place.pool, place.stream, capture_error_mode="thread_local"
        ):
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
        max_tokens, max_graphs: larger batches run as they are; at most so many graphs are kept.
            Those of a device share one memory pool.
        keep: returns what a graph reads beside the parameters, made of them and kept elsewhere: it
            lives as long as the graph, which is not used after a parameter has changed in place.
        capture: what records a run, ``CudaGraph`` if None; tests put their own in its place.

    A batch runs as it is (``forward`` itself), with a noted reason, where a graph would not do:
    under autograd or autocast, in training, on a CPU, or once capturing has failed. Past
    ``max_tokens`` and inside someone else's capture it does so without a note.
    """

    def __init__(
        self,
        forward: Forward,
        module: nn.Module,
        *,
        pad_id: int = 0,
        max_tokens: int = MAX_TOKENS,
        max_graphs: int = MAX_GRAPHS,
        keep: Callable[[], list[Any]] | None = None,
        capture: Callable[[Callable[[], Tensor]], Captured] | None = None,
    ) -> None:
        self.forward, self.module, self.pad_id = forward, module, pad_id
        self.max_tokens, self.max_graphs = max_tokens, max_graphs
        self._keep, self._capture = keep, capture
        self._entries: collections.OrderedDict[tuple, _Entry] = collections.OrderedDict()
        self._failure: str | None = None
        self._places: dict[torch.device, CapturePlace] = {}
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
        fits = 0 < batch.total_tokens <= self.max_tokens
        if reason is not None or not fits or _is_capturing(batch.device):
            return self.forward(batch, **rows)
        bucket = bucket_of(batch.total_tokens, batch.num_seqs, batch.max_seqlen)
        key = (bucket, tuple(sorted(rows)), *self._state(batch))
        with self._lock:
            entry = self._entries.get(key)
            if entry is None and self._failure is None:
                entry = self._record(key, batch, rows)
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
        return self._failure

    def _state(self, batch: VarlenBatch) -> tuple:
        """What else a captured graph depends on."""
        versioned = self._keep is not None
        addresses = tuple(
            (p.data_ptr(), p._version if versioned and not p.is_inference() else 0)
            for p in self.module.parameters()
        )
        return batch.device, _registry.chosen_backend(), hash(addresses)

    # Outside inference_mode: the inputs are filled again later, perhaps outside of it, and up to
    # torch 2.12 the first capture makes the generator's own state in the mode that it finds.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _record(self, key: tuple, batch: VarlenBatch, rows: dict[str, Tensor]) -> _Entry | None:
        bucket: Bucket = key[0]
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
            captured = self._capturing(lambda: self.forward(whole, **static), batch.device)
        except Exception as error:
            self._failure = f"capturing failed: {error}"
            _registry.note_fallback(f"cuda_graphs: {self._failure}")
            return None
        launches = _registry.launches() - before
        launches = collections.Counter({k: n // 2 for k, n in launches.items()})  # ran twice
        kept = [] if self._keep is None else self._keep()
        entry = _Entry(captured, ids, edges, static, launches, kept)
        self._entries[key] = entry
        while len(self._entries) > self.max_graphs:
            self._entries.popitem(last=False)
        return entry

    def _capturing(self, run: Callable[[], Tensor], device: torch.device) -> Captured:
        if self._capture is not None:
            return self._capture(run)
        if device not in self._places:
            self._places[device] = CapturePlace(device)
        return CudaGraph(run, self._places[device])

    def _replay(
        self, entry: _Entry, bucket: Bucket, batch: VarlenBatch, rows: dict[str, Tensor]
    ) -> Tensor:
        stream = None
        if batch.device.type == "cuda":
            stream = torch.cuda.current_stream(batch.device)
            if self._replayed is not None:
                stream.wait_event(self._replayed)
        _fill(bucket, batch, rows, entry.input_ids, entry.cu_seqlens, entry.rows, self.pad_id)
        entry.captured.replay()
        out = entry.captured.output[: batch.total_tokens].clone()
        if stream is not None:  # the pool is the next replay's too, perhaps on another stream
            self._replayed = torch.cuda.Event()
            self._replayed.record(stream)
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
    fillers, length = bucket.num_seqs - count, batch.max_seqlen
    if fillers:
        last = total + length * fillers
        steps = torch.arange(total + length, last + 1, length, device=cu_seqlens.device)
        cu_seqlens[count + 1 :].copy_(steps.clamp_(max=bucket.tokens))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class GraphsOf:
    """A model's own :class:`ForwardGraphs`, made at the first call. Copies and pickles of the model
    take the wish along, not the graphs."""

    def __init__(self) -> None:
        self.made: ForwardGraphs | None = None

    def __deepcopy__(self, memo: dict) -> GraphsOf:
        return GraphsOf()

    def __reduce__(self) -> tuple:
        return GraphsOf, ()
