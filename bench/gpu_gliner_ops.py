"""GLiNER's ops on a GPU: spans scored and found, words scored, disentangled attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

import fastenc
from bench import gpu_peers as peers
from bench.gpu_ops import Row, batch_name, ours, random
from bench.gpu_timing import CUDA, DEVICE
from fastenc import testing

WIDTH = 12
SPANS = (((384,) * 8, 2048, 10), ((384,) * 8, 3072, 25), ((384,), 2048, 1000))
TOY_SPANS = (((4, 4), 16, 3),)
TOKENS = (((384,) * 8, 2048, 512, 25), ((384,) * 8, 3072, 768, 10))
TOY_TOKENS = (((4, 4), 16, 4, 3),)
LENGTHS = ((512,) * 32, (40,) * 256, tuple(16 + (37 * i) % 497 for i in range(64)))
TOY_LENGTHS = ((5, 5),)


def span_rows() -> Iterator[Row]:
    for lengths, size, labels in SPANS if CUDA else TOY_SPANS:
        words, num_seqs = sum(lengths), len(lengths)
        cu = testing.cu_seqlens_of(lengths, DEVICE)
        name = f"{batch_name(lengths)} R {size} C {labels}"

        def make(words=words, size=size, labels=labels, num_seqs=num_seqs):
            leaves = random(words, size), random(words, size), random(num_seqs, labels, size)
            return tuple(x.requires_grad_() for x in leaves), tuple(leaves)

        def score(start, end, v, cu=cu):
            return fastenc.span_score(start, end, v, cu, WIDTH)

        def found(start, end, v, cu=cu):
            return fastenc.span_candidates(start, end, v, cu, WIDTH, 0.99)

        def pool(start, end, _, cu=cu):
            return fastenc.span_pool(start, end, cu, WIDTH)

        spans = words * WIDTH
        rows_bytes, label_bytes = 4 * words * size, 2 * num_seqs * labels * size
        moved = rows_bytes + label_bytes + 2 * spans * labels
        flops = 2 * spans * size * labels
        plain = {"torch": lambda n=lengths: lambda *x: peers.span_score(*x, n, WIDTH)}
        yield Row(
            "span_score", name, make, {**ours("span_score", score), **plain},
            (moved, moved + rows_bytes + label_bytes), (flops, 2 * flops),
        )  # fmt: skip
        candidates = ours("span_candidates", found)
        yield Row(
            "span_candidates", name, make, candidates, (rows_bytes + label_bytes, 0), (flops, 0),
            synchronising=tuple(candidates),  # their number is what it waits for
        )  # fmt: skip
        pooled = 2 * spans * size + rows_bytes
        yield Row(
            "span_pool", name, lambda make=make: _two(make()),
            ours("span_pool", pool), (pooled, pooled + rows_bytes),
        )  # fmt: skip


def _two(made: tuple) -> tuple:
    """The leaves without the labels."""
    args, leaves = made
    return args, leaves[:2]


def token_rows() -> Iterator[Row]:
    for lengths, size, factors, labels in TOKENS if CUDA else TOY_TOKENS:
        words, num_seqs = sum(lengths), len(lengths)
        cu = testing.cu_seqlens_of(lengths, DEVICE)
        shapes = (
            (words, size), (num_seqs, labels, size), (words, factors), (num_seqs, labels, factors),
            (size, factors), (3, size),
        )  # fmt: skip

        def make(shapes=shapes):
            leaves = tuple(random(*shape).requires_grad_() for shape in shapes)
            return leaves, leaves

        def score(*tensors, cu=cu):
            return fastenc.token_score(*tensors, cu)

        inputs = 2 * sum(math.prod(shape) for shape in shapes)
        outputs = 2 * 3 * words * labels
        flops = 2 * words * labels * size * (factors + 3)
        plain = {"torch": lambda n=lengths: lambda *x: peers.token_score(*x, n)}
        yield Row(
            "token_score", f"{batch_name(lengths)} R {size} D {factors} C {labels}", make,
            {**ours("token_score", score), **plain}, (inputs + outputs, 2 * inputs + outputs),
            (flops, 3 * flops),
        )  # fmt: skip


def disentangled_rows() -> Iterator[Row]:
    heads, head_dim, buckets = (12, 64, 256) if CUDA else (1, 16, 8)
    far = 512 if CUDA else 20
    for lengths in LENGTHS if CUDA else TOY_LENGTHS:
        total, longest = sum(lengths), max(lengths)
        cu = testing.cu_seqlens_of(lengths, DEVICE)

        def make(total=total):
            qkv = random(total, 3, heads, head_dim).requires_grad_()
            tables = random(2, heads, 2 * buckets, head_dim).requires_grad_()
            return (*qkv.unbind(1), *tables.unbind(0)), (qkv, tables)

        def attend(*tensors, cu=cu, longest=longest):
            return fastenc.disentangled_attention(
                *tensors, cu, longest, buckets=buckets, max_positions=far
            )

        def theirs(lengths=lengths):
            return peers.hf_disentangled(lengths, heads, head_dim, buckets, far)

        pairs = testing.useful_pairs(lengths, (-1, -1))
        # A token meets at most 2 * buckets rows of each table.
        positions = sum(n * min(2 * n - 1, 2 * buckets) for n in lengths)
        flops = (4 * pairs + 4 * positions) * heads * head_dim
        elements = total * heads * head_dim
        yield Row(
            "disentangled_attention", batch_name(lengths), make,
            {**ours("disentangled_attention", attend), "transformers": theirs},
            (8 * elements, 16 * elements), (flops, flops * 5 // 2),
            synchronising=("transformers",),  # it makes masks and constants on the CPU
        )  # fmt: skip
