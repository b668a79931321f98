"""The index arithmetic of the CUDA kernels of disentangled attention, against brute force."""

from __future__ import annotations

import ctypes
import itertools

import cuda_model
import pytest

SHIM = r"""
#include "csrc/common/disentangled_tiles.h"
using namespace fastenc;
extern "C" {

int32_t distance_of_place(int32_t base, int sign, int32_t place, int columns) {
  return place_distance(base, sign, place, columns);
}
int ring(int place, int turn, int band) { return ring_row(place, turn, band); }
int turned(int turn, int columns, int band) { return next_turn(turn, columns, band); }
void rows_of(int64_t radius, int64_t longest, int32_t* out) {
  const DistanceRows rows = distance_rows(radius, longest);
  out[0] = rows.reach;
  out[1] = rows.far;
  out[2] = rows.count();
}
int32_t row(int32_t reach, int32_t far, int32_t distance, int32_t place) {
  return DistanceRows{reach, far}.of(distance, place);
}
int32_t distance_of_row(int32_t reach, int32_t far, int32_t row) {
  return DistanceRows{reach, far}.distance(row);
}

// Of a shape: columns, band, row blocks, column blocks, groups, parts, part blocks, forward and
// backward bytes, floats of a warp's row stage, row and column pitch.
void shape(int item, int width, int32_t* out) {
  const auto of = [&](auto s) {
    const int32_t fields[] = {
        s.kColumns, s.kBand, s.kRowBlocks, s.kColumnBlocks, s.kGroups, s.kParts, s.kPartBlocks,
        s.forward_bytes(), s.backward_bytes(), s.kRowStage, s.kRowPitch, s.kColumnPitch};
    for (int i = 0; i < 12; ++i) out[i] = fields[i];
  };
  if (item == 2 && width == 64) of(DisentangledShape<2, 64>{});
  if (item == 2 && width == 128) of(DisentangledShape<2, 128>{});
  if (item == 4 && width == 64) of(DisentangledShape<4, 64>{});
  if (item == 4 && width == 128) of(DisentangledShape<4, 128>{});
}
}
"""
SHAPES = list(itertools.product((2, 4), (64, 128)))
ROWS = 64


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return cuda_model.compile_shim(SHIM, tmp_path_factory.mktemp("disentangled_tiles"))


def shape_of(lib, item: int, width: int) -> dict[str, int]:
    names = ("columns", "band", "row_blocks", "column_blocks", "groups", "parts", "part_blocks",
             "forward", "backward", "row_stage", "row_pitch", "column_pitch")  # fmt: skip
    out = (ctypes.c_int32 * len(names))()
    lib.shape(item, width, out)
    return dict(zip(names, out, strict=True))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("item", "width"), SHAPES)
def test_a_place_has_the_distance_of_its_elements(lib, item, width, sign):
    columns, band = (shape_of(lib, item, width)[x] for x in ("columns", "band"))
    for first_row, first_column in ((0, 0), (128, 64), (64, 320)):
        base = first_row - first_column if sign == 1 else first_column - first_row
        for r, c in itertools.product(range(ROWS), range(columns)):
            place = r - c + columns - 1
            row, column = first_row + r, first_column + c
            assert 0 <= place < band
            distance = row - column if sign == 1 else column - row
            assert lib.distance_of_place(base, sign, place, columns) == distance


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("item", "width"), SHAPES)
def test_the_ring_holds_every_place_after_every_step(lib, item, width, sign):
    columns, band = (shape_of(lib, item, width)[x] for x in ("columns", "band"))
    held, turn = [None] * band, 0
    for step, column in enumerate(range(0, 20 * columns, columns)):
        base = 640 - column if sign == 1 else column - 640
        if step:
            turn = lib.turned(turn, columns, band)
        for place in range(columns if step else band):  # what the kernels load
            held[lib.ring(place, turn, band)] = lib.distance_of_place(base, sign, place, columns)
        for place in range(band):
            expected = lib.distance_of_place(base, sign, place, columns)
            assert held[lib.ring(place, turn, band)] == expected
        # A product takes 16 places at a time, which must not wrap.
        for place in range(0, band, 16):
            row = lib.ring(place, turn, band)
            assert [lib.ring(place + i, turn, band) for i in range(16)] == [*range(row, row + 16)]


@pytest.mark.parametrize(("item", "width"), SHAPES)
def test_the_warps_make_every_place_that_is_picked(lib, item, width):
    s = shape_of(lib, item, width)
    columns = s["columns"]
    for warp in range(4):
        rows = range(16 * warp, 16 * warp + 16)
        places = {r - c + columns - 1 for r in rows for c in range(columns)}
        assert places <= set(range(16 * warp, 16 * warp + 16 * s["row_blocks"]))
    made = {group: [] for group in range(s["groups"])}
    for warp in range(4):  # as stage_column_term does
        group, own = warp % s["groups"], warp // s["groups"] * s["part_blocks"]
        if own < s["column_blocks"]:
            first = min(own, s["column_blocks"] - s["part_blocks"])
            assert first >= 0
            made[group] += [b for b in range(first, first + s["part_blocks"]) if b >= own]
    for group, blocks in made.items():
        assert sorted(blocks) == [*range(s["column_blocks"])]  # each once
        start = columns - 16 - 16 * group
        group_columns = range(16 * group, 16 * group + 16)
        places = {r - c + columns - 1 for r in range(ROWS) for c in group_columns}
        assert places <= set(range(start, start + 16 * s["column_blocks"]))
        assert start >= 0 and start + 16 * s["column_blocks"] <= s["band"]


@pytest.mark.parametrize(("item", "width"), SHAPES)
def test_the_tiles_that_gradients_of_a_table_skip_are_empty(lib, item, width):
    s = shape_of(lib, item, width)
    columns = s["columns"]
    for first in range(0, s["band"], 16):  # as add_table does
        begin, end = max(0, first - columns), min(ROWS, first + 16)
        assert begin % 16 == 0 and end % 16 == 0
        for r in set(range(ROWS)) - set(range(begin, end)):
            assert not {r - c + columns - 1 for c in range(columns)} & set(range(first, first + 16))


@pytest.mark.parametrize(("radius", "longest"), [(512, 40), (512, 2000), (8, 8), (8, 9), (1, 300)])
def test_sums_by_distance_have_a_row_of_their_own(lib, radius, longest):
    found = (ctypes.c_int32 * 3)()
    lib.rows_of(ctypes.c_int64(radius), ctypes.c_int64(longest), found)
    reach, far, count = found
    assert reach == min(radius, longest) and (far == 0) == (longest <= radius)
    owners: dict[int, set] = {}
    for distance in range(-longest + 1, longest):
        clamped = max(-radius, min(radius, distance))
        for place in (0, 1, 63, 127):
            row = lib.row(reach, far, distance, place)
            assert 0 <= row < count and lib.distance_of_row(reach, far, row) == clamped
            owners.setdefault(row, set()).add(clamped if abs(clamped) < reach else (clamped, place))
    assert all(len(x) == 1 for x in owners.values())
    # A sequence longer than max_seqlen says writes nowhere.
    outside = lib.row(reach, far, longest + 5, 3)
    assert outside == -1 if far == 0 else 0 <= outside < count


@pytest.mark.parametrize(("item", "width"), SHAPES)
def test_shapes_fit_the_shared_memory_of_ampere(lib, item, width):
    s = shape_of(lib, item, width)
    assert 0 < s["forward"] <= 163 * 1024 and 0 < s["backward"] <= 163 * 1024
    if (item, width) == (2, 64):  # DeBERTa's: two blocks on an A100, and on an H100 (backward)
        assert 2 * (s["forward"] + 1024) <= 164 * 1024
        assert 2 * (s["backward"] + 1024) <= 228 * 1024
    # Weights in fp32 pass through a warp's row stage: 16 rows of columns + 4.
    assert s["row_stage"] >= 16 * s["row_pitch"] >= 16 * (s["columns"] + 4)
