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
