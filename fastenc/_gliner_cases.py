"""Cases of GLiNER's ops; :func:`fastenc.testing.cases` is the door to them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastenc.testing import LENGTHS, Case, cu_seqlens_of


def _random(generator, shape, dtype, device):
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _short(lengths) -> str:
    text = ".".join(map(str, lengths))
    return text if len(text) <= 24 else f"{len(lengths)}seqs-{sum(lengths)}words"


def _span_grid(size: str) -> list[tuple[tuple[int, ...], int, int, int]]:
    """(words of each sequence, max_width, R, labels)."""
    if size == "bench":
        return [
            ((384,), 12, 2048, 10),
            ((384,), 12, 3072, 25),
            ((40,) * 8, 12, 2048, 10),
            ((384,), 12, 2048, 1000),
        ]
    if size == "small":
        return [((3,), 2, 16, 2), ((0, 5, 1), 4, 33, 3), ((17,), 12, 64, 5)]
    ragged = (3, 40, 0, 1, 13)
    return [
        *((lengths, 12, 24, 5) for lengths in LENGTHS if sum(lengths) <= 400),
        ((1000,), 3, 24, 2),
        *((ragged, width, 40, 5) for width in (1, 2, 50)),
        *((ragged, 6, r, 4) for r in (1, 16, 33, 256, 257, 520)),
        *((ragged, 6, 70, c) for c in (0, 1, 10, 16, 25, 130, 260)),
    ]


def _pool(lengths, width, r):
    def make(dtype, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        start, end = (_random(g, (sum(lengths), r), dtype, device) for _ in range(2))
        return (start, end, cu_seqlens_of(lengths, device), width), {}

    return make


def pool_cases(size: str) -> Iterator[Case]:
    seen = set()
    for lengths, width, r, _ in _span_grid(size):
        name = f"{_short(lengths)}-k{width}-r{r}"
        if name not in seen:
            seen.add(name)
            settings = {"lengths": lengths, "max_width": width, "size": r}
            yield Case("span_pool", name, _pool(lengths, width, r), settings)


def _score(lengths, width, r, c, bias, dropout):
    def make(dtype, device="cpu", seed=0):
        (start, end, cu_words, _), options = _pool(lengths, width, r)(dtype, device, seed)
        g = torch.Generator().manual_seed(seed + 1)
        labels = _random(g, (len(lengths), c, r), dtype, device)
        if bias:
            options["label_bias"] = _random(g, (len(lengths), c), dtype, device)
        if dropout:
            options |= {"dropout_p": 0.3, "seed": -5 - seed}
        return (start, end, labels, cu_words, width), options

    return make


def score_cases(size: str) -> Iterator[Case]:
    for i, (lengths, width, r, c) in enumerate(_span_grid(size)):
        bias, dropout = i % 2 == 0, i % 3 == 0 and size != "bench"
        name = f"{_short(lengths)}-k{width}-r{r}-c{c}" + "-bias" * bias + "-dropout" * dropout
        make = _score(lengths, width, r, c, bias, dropout)
        settings = {"lengths": lengths, "max_width": width, "size": r, "labels": c}
        yield Case("span_score", name, make, settings)


def _lattice(generator, shape, limit, unit, dtype, device):
    """Multiples of ``unit`` up to ``limit`` units away from zero."""
    steps = torch.randint(-limit, limit + 1, shape, generator=generator)
    return (steps * unit).to(device=device, dtype=dtype)


def _token_score(lengths, d, r, c, bias, dropout):
    """Hidden sums are odd eighths: no rounding takes one across the kink of the ReLU."""

    def make(dtype, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        words, seqs = sum(lengths), len(lengths)
        token = 2 * _lattice(g, (words, r), 15, 1 / 8, dtype, device) + 1 / 8
        label = _lattice(g, (seqs, c, r), 8, 1 / 4, dtype, device)
        token_factor = _lattice(g, (words, d), 2, 1, dtype, device)
        label_factor = _lattice(g, (seqs, c, d), 3, 1 / 2, dtype, device)
        weight = _lattice(g, (r, d), 2, 1 / 2, dtype, device)
        out_weight = _random(g, (3, r), dtype, device)
        options = {"out_bias": _random(g, (3,), dtype, device)} if bias else {}
        if dropout:
            options |= {"dropout_p": 0.3, "seed": 9 + seed}
        cu_words = cu_seqlens_of(lengths, device)
        return (token, label, token_factor, label_factor, weight, out_weight, cu_words), options

    return make


def _token_grid(size: str) -> list[tuple[tuple[int, ...], int, int, int]]:
    """(words of each sequence, D, R, labels)."""
    if size == "bench":
        return [
            ((384,), 512, 2048, 25),
            ((384,), 768, 3072, 10),
            ((40,), 512, 2048, 5),
            ((16, 323, 45, 130, 60), 512, 2048, 25),
        ]
    if size == "small":
        return [((3,), 8, 16, 2), ((0, 5, 1), 16, 33, 3), ((17,), 12, 48, 5)]
    ragged = (3, 40, 0, 1, 13)
    return [
        *((lengths, 8, 20, 3) for lengths in LENGTHS if sum(lengths) <= 400),
        ((1000,), 6, 12, 2),
        *((ragged, d, 40, 5) for d in (1, 7, 16, 33, 100, 260)),
        *((ragged, 12, r, 4) for r in (1, 16, 31, 256, 257, 520)),
        *((ragged, 10, 36, c) for c in (0, 1, 10, 49, 130)),
        ((60, 9), 64, 256, 25),
    ]


def token_cases(size: str) -> Iterator[Case]:
    for i, (lengths, d, r, c) in enumerate(_token_grid(size)):
        bias, dropout = i % 2 == 0, i % 3 == 0 and size != "bench"
        name = f"{_short(lengths)}-d{d}-r{r}-c{c}" + "-bias" * bias + "-dropout" * dropout
        make = _token_score(lengths, d, r, c, bias, dropout)
        settings = {"lengths": lengths, "factors": d, "size": r, "labels": c}
        yield Case("token_score", name, make, settings)


def _disentangled(lengths, heads, head_dim, buckets, max_positions, terms, dropout):
    def make(dtype, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        q, k, v = _random(g, (sum(lengths), 3, heads, head_dim), dtype, device).unbind(1)
        tables = (
            _random(g, (heads, 2 * buckets, head_dim), dtype, device) if name in terms else None
            for name in ("c2p", "p2c")
        )
        options = {"buckets": buckets, "max_positions": max_positions}
        if dropout:
            options |= {"dropout_p": 0.2, "seed": 17 + seed}
        return (q, k, v, *tables, cu_seqlens_of(lengths, device), max([*lengths, 1])), options

    return make


def _disentangled_grid(size: str):
    """(tokens of each sequence, heads, head_dim, buckets, max_positions, terms)."""
    both = ("c2p", "p2c")
    if size == "bench":
        for lengths in ((512,) * 4, (40,) * 8, (16, 323, 45, 500, 130, 60, 210, 90, 25, 300)):
            yield lengths, 12, 64, 256, 512, both
        return
    if size == "small":
        for terms in (both, ("c2p",), ("p2c",), ()):
            yield (0, 5, 33, 1), 2, 16, 8, 20, terms
        yield (70,), 1, 64, 256, 512, both
        return
    for lengths in LENGTHS:
        if sum(lengths) <= 800:
            yield lengths, 2, 32, 32, 100, both
    yield (700,), 1, 16, 256, 512, both
    for terms in (("c2p",), ("p2c",), ()):
        yield (65, 0, 129), 2, 32, 16, 40, terms
    for head_dim in (1, 8, 33, 64, 96, 200):
        yield (65, 0, 129), 2, head_dim, 16, 40, both
    for buckets, max_positions in ((4, 6), (7, 0), (200, 0), (256, 512)):
        yield (130, 3), 2, 8, buckets, max_positions, both


def disentangled_cases(size: str) -> Iterator[Case]:
    for i, (lengths, heads, head_dim, buckets, far, terms) in enumerate(_disentangled_grid(size)):
        dropout = size != "bench" and i % 4 == 3
        name = f"{_short(lengths)}-d{head_dim}-b{buckets}.{far}-{'+'.join(terms) or 'content'}"
        make = _disentangled(lengths, heads, head_dim, buckets, far, terms, dropout)
        settings = {"lengths": lengths, "heads": heads, "head_dim": head_dim, "terms": terms}
        yield Case("disentangled_attention", name + "-dropout" * dropout, make, settings)
