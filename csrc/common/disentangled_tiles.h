// The position terms of a tile of scores: which distances it meets, where they lie, what they cost.
// Neither CUDA nor torch in here: tests/test_cuda_disentangled_tiles.py checks it against brute
// force.
//
// A tile has kAttentionRows rows and kColumns columns, one of them queries, the other keys. Its
// distances (query - key) take rows + columns - 1 values; element (r, c) finds its own at
//
//   place(r, c) = r - c + kColumns - 1
//
// of a band that holds the table row of every place. 16 rows meet 16 + kColumns places of it, 16
// columns meet 80. The next tile's columns lie kColumns further, so its place p is this tile's
// place p - kColumns: the band is a ring, of which a step replaces kColumns rows.
#pragma once

#include "attention_tiles.h"

namespace fastenc {

constexpr int kPlaceBlock = 16;  // places that one step of the tensor cores takes

// Distance of a place; `base`: first query - first key of the tile; `sign`: 1 where rows are
// queries, -1 where they are keys.
FASTENC_HD constexpr int32_t place_distance(int32_t base, int sign, int32_t place, int columns) {
  return base + sign * (place - (columns - 1));
}

// Row of a band's memory for 0 <= place < band, 0 <= turn < band.
FASTENC_HD constexpr int ring_row(int place, int turn, int band) {
  return place + turn < band ? place + turn : place + turn - band;
}
FASTENC_HD constexpr int next_turn(int turn, int columns, int band) {
  return turn < columns ? turn - columns + band : turn - columns;
}

// Rows of a table of sums by distance: one for each distance below `reach`, and on either side, if
// there are distances beyond, one for each place of a band, so that no two threads ever share one.
struct DistanceRows {
  int32_t reach;
  int32_t far;  // rows on either side: at least the places of a band, or 0

  FASTENC_HD int32_t count() const { return 2 * far + 2 * reach - 1; }
  // -1: none.
  FASTENC_HD int32_t of(int32_t distance, int32_t place) const {
    if (distance <= -reach || distance >= reach) {
      return far == 0 ? -1 : distance < 0 ? place : far + 2 * reach - 1 + place;
    }
    return far + reach - 1 + distance;
  }
  // The distance of a row, -reach and reach standing for all beyond.
  FASTENC_HD int32_t distance(int32_t row) const {
    const int32_t d = row - far - reach + 1;
    return d < -reach ? -reach : d > reach ? reach : d;
  }
};

// `radius`: of the index from distances to rows of a position table, constant beyond.
FASTENC_HD DistanceRows distance_rows(int64_t radius, int64_t max_seqlen) {
  const int64_t longest = larger(1, max_seqlen);
  const auto reach = static_cast<int32_t>(larger(1, smaller(radius, longest)));
  return {reach, reach < longest ? 2 * kAttentionRows : 0};
}

// The shapes of the kernels. 16-bit types: both tables' bands are kept, as rings. fp32: one band's
// memory, which both tables pass through.
template <int kItem, int kWidth>
struct DisentangledShape {
  using Base = AttentionShape<kItem, kWidth>;
  static constexpr bool kHalf = kItem == 2;
  static constexpr int kPitch = Base::kPitch;
  static constexpr int kColumns = (kHalf ? 64 : 32) / (kWidth > 64 ? 2 : 1);
  static constexpr int kBand = kAttentionRows + kColumns;
  static constexpr int kBands = kHalf ? 2 : 1;

  // Blocks of places that 16 rows meet, and that 16 columns meet; a block of columns is shared by
  // kParts warps.
  static constexpr int kRowBlocks = 1 + kColumns / kPlaceBlock;
  static constexpr int kColumnBlocks = 1 + kAttentionRows / kPlaceBlock;
  static constexpr int kGroups = kColumns / 16;
  static constexpr int kParts = kAttentionThreads / 32 / kGroups;
  static constexpr int kPartBlocks = (kColumnBlocks + kParts - 1) / kParts;

  // Products with a band are picked from shared memory, fp32. With one warp a group of columns both
  // products of a warp take turns in the same 16 rows.
  static constexpr int kRowPitch = kRowBlocks * kPlaceBlock + 4;
  static constexpr int kColumnPitch = kColumnBlocks * kPlaceBlock + 5;  // 20 (c - 1) banks apart
  static constexpr bool kShared = kParts == 1;
  static constexpr int kRowStage = 16 * (kShared ? kColumnPitch : kRowPitch);  // floats of a warp
  FASTENC_HD static constexpr int row_stage_bytes() { return 4 * kRowStage * 4; }
  FASTENC_HD static constexpr int column_stage_bytes() {
    return kShared ? 0 : kColumns * kColumnPitch * 4;
  }

  // Score gradients by place, as operands: rows of kBand.
  static constexpr int kShearPitch = kBand + 16 / kItem;

  FASTENC_HD static constexpr int bands_bytes() { return kBands * Base::tile(kBand); }
  FASTENC_HD static constexpr int stages_bytes() {
    return row_stage_bytes() + column_stage_bytes();
  }
  // 16-bit queries live in registers: their tile is where products are picked.
  FASTENC_HD static constexpr int queries_bytes() {
    const int tile = Base::tile(kAttentionRows);
    return kHalf ? static_cast<int>(larger(tile, stages_bytes())) : tile + stages_bytes();
  }
  FASTENC_HD static constexpr int forward_bytes() {
    return queries_bytes() + 2 * Base::tile(kColumns) + bands_bytes();
  }
  FASTENC_HD static constexpr int backward_bytes() {
    return 2 * Base::tile(kAttentionRows) + 2 * Base::tile(kColumns) + bands_bytes() +
           stages_bytes() + kAttentionRows * kShearPitch * kItem + 2 * kColumns * 4;
  }
};

}  // namespace fastenc
