"""Every op, forward and backward, beside its floor and its peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

import fastenc
from bench import gpu_peers as peers
from bench.gpu_record import COMPILED, OURS, PEERS, Found, Record, of_kinds, shown
from bench.gpu_timing import (
    CUDA,
    DEVICE,
    backward_call,
    cold_copies,
    free_memory,
    on_side_stream,
    timed,
)
from fastenc import testing

BF16 = torch.bfloat16
BACKENDS = ("cuda", "triton")
RAGGED = tuple(16 + (37 * i) % 497 for i in range(128))  # half of 128 x 512
Make = Callable[[], tuple]


@dataclass(frozen=True)
class Row:
    """One shape of one op. ``make()`` builds (arguments, leaves); ``runs``: {name: factory of fn}.

    ``moved`` and ``flops``: what forward and backward cannot do without. ``synchronising``: runs
    whose forward waits for the GPU, as no graph can.
    """

    op: str
    name: str
    make: Make = field(repr=False)
    runs: dict[str, Callable[[], Callable]] = field(repr=False)
    moved: tuple[int, int]
    flops: tuple[int, int] = (0, 0)
    synchronising: tuple[str, ...] = ()


def ours(op: str, fn: Callable) -> dict[str, Callable[[], Callable]]:
    """fastenc on each backend; one that does not serve this machine says why in its run's error."""

    def on(backend):
        def run(*args):
            with fastenc.use_backend(backend):
                return fn(*args)

        def factory():
            if (reason := fastenc.backends()[op][backend]) != "available":
                raise NotImplementedError(reason)
            return run

        return factory

    return {f"fastenc {backend}": on(backend) for backend in BACKENDS}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=BF16)


def _plain(fn: Callable) -> dict[str, Callable[[], Callable]]:
    return {"torch": lambda: fn, "torch.compile": lambda: peers.compiled(fn)}


def geglu_rows() -> Iterator[Row]:
    shapes = ((8192, 1152), (65536, 1152), (65536, 2624)) if CUDA else ((4, 16),)
    for tokens, intermediate in shapes:

        def make(tokens=tokens, intermediate=intermediate):
            x = random(tokens, 2 * intermediate).requires_grad_()
            return (x,), (x,)

        elements = 2 * tokens * intermediate
        yield Row(
            "geglu", f"{tokens}x{2 * intermediate}", make,
            {**ours("geglu", fastenc.geglu), **_plain(peers.geglu),
             "Liger (tanh)": lambda: peers.liger_geglu},
            (3 * elements, 5 * elements),
        )  # fmt: skip


def rope_rows() -> Iterator[Row]:
    for tokens in (8192, 65536) if CUDA else (4,):

        def make(tokens=tokens):
            x = random(tokens, 3, 12, 64)[:, :2].requires_grad_()
            tables = (t.to(DEVICE, BF16) for t in testing.rope_tables(512, 64))
            return (x, *tables, torch.arange(tokens, device=DEVICE) % 512), (x,)

        moved = 4 * tokens * 2 * 12 * 64
        yield Row(
            "rope", f"{tokens}x2x12x64", make,
            {**ours("rope", fastenc.rope), **_plain(peers.rope)}, (moved, moved),
        )  # fmt: skip


def add_layer_norm_rows() -> Iterator[Row]:
    for tokens, hidden in ((8192, 768), (65536, 768), (65536, 1024)) if CUDA else ((4, 16),):

        def make(tokens=tokens, hidden=hidden):
            x, residual = (random(tokens, hidden).requires_grad_() for _ in range(2))
            weight = random(hidden).requires_grad_()
            return (x, residual, weight), (x, residual, weight)

        yield Row(
            "add_layer_norm", f"{tokens}x{hidden}", make,
            {**ours("add_layer_norm", fastenc.add_layer_norm), **_plain(peers.add_layer_norm),
             "Liger": lambda: peers.liger_add_layer_norm},
            (8 * tokens * hidden, 6 * tokens * hidden),
        )  # fmt: skip


def segment_pool_rows() -> Iterator[Row]:
    for lengths in ((512,) * 128, (8192,), RAGGED) if CUDA else ((3, 5),):

        def make(lengths=lengths):
            x = random(sum(lengths), 768 if CUDA else 16).requires_grad_()
            return (x, testing.cu_seqlens_of(lengths, DEVICE)), (x,)

        moved = 2 * sum(lengths) * 768
        yield Row(
            "segment_pool", batch_name(lengths), make,
            {**ours("segment_pool", fastenc.segment_pool), **_plain(peers.segment_mean)},
            (moved, moved),
        )  # fmt: skip


def batch_name(lengths: tuple[int, ...]) -> str:
    one = len(set(lengths)) == 1
    return f"{len(lengths)}x{lengths[0]}" if one else f"{len(lengths)} ragged, {sum(lengths)}"


def attention_rows() -> Iterator[Row]:
    batches = ((512,) * 64, (8192,) * 4, RAGGED) if CUDA else ((3, 5),)
    heads, head_dim = (12, 64) if CUDA else (1, 16)
    for lengths in batches:
        for window in ((64, 64), (-1, -1)):
            yield from _attention_rows(lengths, window, heads, head_dim)


def _attention_rows(lengths, window, heads, head_dim) -> Iterator[Row]:
    total, longest = sum(lengths), max(lengths)
    cu = testing.cu_seqlens_of(lengths, DEVICE)
    flops = 4 * testing.useful_pairs(lengths, window) * heads * head_dim
    elements = total * heads * head_dim
    work = (8 * elements, 16 * elements), (flops, flops * 5 // 2)
    name = f"{batch_name(lengths)} window {window[0]}"

    def make():
        qkv = random(total, 3, heads, head_dim).requires_grad_()
        return tuple(qkv.unbind(1)), (qkv,)

    def attend(q, k, v):
        return fastenc.varlen_attention(q, k, v, cu, longest, window)

    yield Row(
        "varlen_attention", name, make,
        {**ours("varlen_attention", attend), **peers.attention_peers(cu, lengths, window)}, *work,
    )  # fmt: skip

    tables = tuple(t.to(DEVICE, BF16) for t in testing.rope_tables(longest, head_dim))

    def make_qkv():
        qkv = random(total, 3, heads, head_dim).requires_grad_()
        return (qkv,), (qkv,)

    def rotated(qkv):
        return fastenc.rope_varlen_attention(qkv, *tables, cu, longest, window)

    yield Row(
        "rope_varlen_attention", name, make_qkv, ours("rope_varlen_attention", rotated), *work
    )


def families() -> tuple[Callable[[], Iterator[Row]], ...]:
    from bench import gpu_gliner_ops as gliner

    return (
        attention_rows, geglu_rows, rope_rows, add_layer_norm_rows, segment_pool_rows,
        gliner.span_rows, gliner.token_rows, gliner.disentangled_rows,
    )  # fmt: skip


@on_side_stream()
def _time(row: Row, name: str, backward: bool, sets: Callable[[], list], found: Found) -> None:
    if name in of_kinds(row.runs, (COMPILED,)):
        torch.compiler.reset()  # past eight shapes of one function dynamo compiles no more
    fn = row.runs[name]()
    if backward:
        calls = [backward_call(functools.partial(fn, *args), leaves) for args, leaves in sets()]
        timing = timed(calls)
    else:
        with torch.no_grad():
            calls = [functools.partial(fn, *args) for args, _ in sets()]
            timing = timed(calls, graph=name not in row.synchronising)
    found |= {"seconds": timing.seconds, "how": timing.how}


def measure_row(record: Record, row: Row, backward: bool, kinds: tuple[str, ...]) -> None:
    """The row's runs of ``kinds``, in one direction: times, floor / measured, errors."""
    moved, flops = row.moved[backward], row.flops[backward]
    ceilings = record.result["ceilings"]
    floor = max(moved / ceilings["copy"], flops / ceilings["matrix_bf16"])
    done = record.row(
        "ops", op=row.op, shape=row.name, direction="backward" if backward else "forward",
        bytes=moved, flops=flops, floor_seconds=floor,
    )  # fmt: skip
    sets = functools.cache(lambda: [row.make() for _ in range(cold_copies(moved))])
    for name in (runs := of_kinds(row.runs, kinds)):

        def call(found: Found, name=name) -> None:
            _time(row, name, backward, sets, found)
            found["floor_over_measured"] = floor / found["seconds"]

        record.run(done, name, call)
    if runs:
        print(line(done, runs), flush=True)


def measure(record: Record, phases: tuple[tuple[str, ...], ...] = ((OURS,), (PEERS,))) -> None:
    """Every row, a kind of runs at a time; of each kind the forwards first."""
    rows: list[Row] = []
    for family in families():
        try:
            rows += family()
        except Exception as error:
            record.error(f"{record.name}, {family.__name__}", error)
    for kinds in phases:
        for backward in (False, True):
            for row in rows:
                if not backward or row.moved[1]:
                    measure_row(record, row, backward, kinds)
                free_memory()


def line(row: dict, names: dict) -> str:
    def figure(run: Found) -> str:
        return f"{run['seconds'] * 1e6:.1f} us ({run['floor_over_measured']:.0%})"

    head = f"{row['op']} {row['shape']} {row['direction']}"
    return f"{head}: floor {row['floor_seconds'] * 1e6:.1f} us | {shown(row, names, figure)}"
