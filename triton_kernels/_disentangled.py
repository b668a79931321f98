"""What the disentangled attention kernels share: relative positions of a tile of scores.

A tile has ROWS rows and COLS columns, one of them queries, the other keys. Its distances take
ROWS + COLS - 1 values, so a term of the form ``x_r . table[distance(r, c)]`` is one product of the
rows with a BAND of ``table`` rows, and a pick within each row of that product:

    place(r, c) = r - c + COLS - 1         distance = base + SIGN * (place - (COLS - 1))

with base = first query - first key, SIGN 1 where rows are queries and -1 where they are keys. The
band repeats a table row where the bucket is logarithmic, so its place stands for one distance, and
the gradient of a band is a pick as well, with nothing to add up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastenc.triton_kernels._attention import accumulate, dot_heads, load_head
from fastenc.triton_kernels._common import dot


@triton.jit
def band_rows(index_ptr, radius, base, SIGN: tl.constexpr, COLS: tl.constexpr, BAND: tl.constexpr):
    """The table row of each place of the band, (BAND,) int32."""
    distance = base + SIGN * (tl.arange(0, BAND) - (COLS - 1))
    distance = tl.minimum(tl.maximum(distance, -radius), radius)
    return tl.load(index_ptr + distance + radius)


@triton.jit
def _places(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] - tl.arange(0, COLS)[None, :] + (COLS - 1)


@triton.jit
def row_term(
    s, x, table_ptr, rows, table_stride, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """``s + x_r . table[distance(r, c)]``; ``rows``: from :func:`band_rows`.

    The band is made on its side: it is wider than ROWS, and wgmma wants 64 rows.
    """
    table = load_head(table_ptr, rows, table_stride, PIECES)
    band = dot_heads(table, x, BAND, ROWS, len(PIECES), PRECISION)
    return s + tl.trans(tl.gather(band, tl.trans(_places(ROWS, COLS)), 0))


@triton.jit
def column_term(
    s, y, table_ptr, rows, table_stride, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """``s + y_c . table[distance(r, c)]``."""
    table = load_head(table_ptr, rows, table_stride, PIECES)
    band = dot_heads(table, y, BAND, COLS, len(PIECES), PRECISION)
    return s + tl.gather(band, _places(ROWS, COLS), 0)


@triton.jit
def row_band(ds, ROWS: tl.constexpr, COLS: tl.constexpr, BAND: tl.constexpr):
    """(ROWS, BAND): ``ds`` by place, 0 where a place has no column in that row."""
    column = tl.arange(0, ROWS)[:, None] - tl.arange(0, BAND)[None, :] + (COLS - 1)
    there = (column >= 0) & (column < COLS)
    picked = tl.gather(ds, tl.minimum(tl.maximum(column, 0), COLS - 1), 1)
    return tl.where(there, picked, 0.0)


@triton.jit
def column_band(ds, ROWS: tl.constexpr, COLS: tl.constexpr, BAND: tl.constexpr):
    """(BAND, COLS): ``ds`` by place, 0 where a place has no row in that column."""
    row = tl.arange(0, BAND)[:, None] + tl.arange(0, COLS)[None, :] - (COLS - 1)
    there = (row >= 0) & (row < ROWS)
    picked = tl.gather(ds, tl.minimum(tl.maximum(row, 0), ROWS - 1), 0)
    return tl.where(there, picked, 0.0)


@triton.jit
def add_row_gradient(
    dx, band, table_ptr, rows, table_stride, PIECES: tl.constexpr, PRECISION: tl.constexpr
):
    """``dx + band . table``: the row term's gradient with respect to its rows."""
    table = load_head(table_ptr, rows, table_stride, PIECES)
    return accumulate(dx, band, table, len(PIECES), PRECISION)


@triton.jit
def add_table_gradient(
    dtable, band, x, N: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """``dtable + band . x``, piece by piece; ``band``: (BAND, rows of x)."""
    result = ()
    for i in tl.static_range(N):
        result += (dot(band, x[i], dtable[i], PRECISION),)
    return result
