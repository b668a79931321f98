// Shapes and index arithmetic of the Hopper attention kernels. Neither CUDA nor torch in here:
// the host model of tests/test_cuda_local_attention_sm90.py uses the same functions.
#pragma once

#include "attention_tiles.h"

namespace fastenc {

constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kGroupRows = 64;      // of one wgmma
constexpr int kBoxRows = 64;        // of one TMA load
constexpr int kHopperAlignment = 1024;

// Rows in the order in which threads take them: neighbours in it are four rows apart, so that eight
// threads that each read 16 bytes of half a 128-byte row touch all banks (the swizzle puts the same
// half of rows r and r + 4 side by side).
FASTENC_HD constexpr int spread_row(int slot) {
  return (slot >> 1 & 3) | (slot & 1) << 2 | slot >> 3 << 3;
}

// The slot of a row: spread_row(spread_slot(row)) == row.
FASTENC_HD constexpr int spread_slot(int row) {
  return (row & 3) << 1 | (row >> 2 & 1) | row >> 3 << 3;
}

// ---- windowed attention, forward ----------------------------------------------------------------

// 128 queries and the keys from `kReach` before the first to `kReach` after the last; each of two
// warpgroups takes 64 queries and the 64 + 2 kReach keys that those can see.
template <int kHeadDim, int kReach>
struct LocalShape {
  static constexpr int kGroups = 2;
  static constexpr int kThreads = kGroups * kGroupThreads;
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kKeys = kRows + 2 * kReach;
  static constexpr int kGroupKeys = kGroupRows + 2 * kReach;
  static constexpr int kRowBytes = kHeadDim * 2;
  // Shared memory: queries, keys, values; cos and sin of the keys' positions; two mbarriers, and
  // the tile.
  static constexpr int kQuery = 0;
  static constexpr int kKey = kQuery + kRows * kRowBytes;
  static constexpr int kValue = kKey + kKeys * kRowBytes;
  static constexpr int kCos = kValue + kKeys * kRowBytes;
  static constexpr int kSin = kCos + kKeys * kRowBytes / 2;
  static constexpr int kBarriers = kSin + kKeys * kRowBytes / 2;
  static constexpr int kBytes = kBarriers + 32;
  // An SM has 228 KB, 1 KB of it taken by each block.
  static constexpr int kBlocksPerSm = 2 * (kBytes + 1024) <= 228 * 1024 && kReach <= 64 ? 2 : 1;
};

// Columns of a warpgroup's scores that row `row` (0 .. 63) sees: [begin, end). Column c is key
// first_query - reach + c of a sequence of `length`.
FASTENC_HD constexpr Range seen_columns(int row, int first_query, int length, int reach, int left,
                                        int right) {
  const int before = reach - first_query;  // columns before the sequence begins
  const int begin = row + reach - left, end = row + reach + right + 1;
  return {begin > before ? begin : before, end < length + before ? end : length + before};
}

// Whether every row of the warpgroup sees the columns [reach, reach + 64).
FASTENC_HD constexpr bool middle_is_seen(int first_query, int length, int left, int right) {
  return left >= kGroupRows - 1 && right >= kGroupRows - 1 && first_query + kGroupRows <= length;
}

// Of the boxes of kBoxRows rows that begin at row `first` of a sequence, whether box `box` holds
// any of its rows.
FASTENC_HD constexpr bool box_is_inside(int first, int box, int length) {
  return first + (box + 1) * kBoxRows > 0 && first + box * kBoxRows < length;
}

// ---- windowed attention, backward ---------------------------------------------------------------

// 128 rows of a sequence, as queries and as keys, and what is in their reach on both sides. Each of
// two warpgroups makes the gradients of its 64 rows: against the 64 + 2 kReach keys that they see,
// then against the queries that see them, 64 at a time.
template <int kHeadDim, int kReach>
struct LocalGradShape {
  static constexpr int kGroups = 2;
  static constexpr int kThreads = kGroups * kGroupThreads;
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kTileRows = kRows + 2 * kReach;
  static constexpr int kBlocks = 1 + 2 * kReach / kGroupRows;
  static constexpr int kTileBytes = kTileRows * kHeadDim * 2;
  // Shared memory: q, k, v, grad_out; cos and sin; lse and delta; an mbarrier and the tile.
  static constexpr int kQuery = 0, kKey = kTileBytes, kValue = 2 * kTileBytes;
  static constexpr int kGrad = 3 * kTileBytes;
  static constexpr int kCos = 4 * kTileBytes, kSin = kCos + kTileBytes / 2;
  static constexpr int kLse = 5 * kTileBytes, kDelta = kLse + kTileRows * 4;
  static constexpr int kBarrier = kDelta + kTileRows * 4;
  static constexpr int kBytes = kBarrier + 32;
  static_assert(kBytes <= 227 * 1024);
};

// ---- windowed attention, backward, where a tile and its halo do not fit together ----------------

// 128 rows stay, as queries and as keys; what lies in their reach streams by in blocks of 64, two
// operands at a time: keys and values for grad_q, then queries and grad_out for grad_k and grad_v.
// Warpgroup 0 loads (warp 0) and prepares (the others) for two warpgroups of 64 rows each.
template <int kHeadDim>
struct LocalStreamShape {
  static constexpr int kGroups = 2;
  static constexpr int kThreads = (1 + kGroups) * kGroupThreads;
  static constexpr int kPreparers = kGroupThreads - 32;
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kStays = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kStages = kHeadDim <= 64 ? 4 : 2;
  // Of 504 a thread of each warpgroup.
  static constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
  // Shared memory, in blocks of 64 rows: q, k, v and grad_out of the tiles that stay, two blocks
  // each; the pairs that stream. Then lse and delta of the same rows, and the barriers.
  static constexpr int kBlockBytes = kBoxRows * kHeadDim * 2;
  static constexpr int kStayBytes = 4 * kGroups * kBlockBytes, kStageBytes = 2 * kBlockBytes;
  static constexpr int kStream = kStays * kStayBytes;
  static constexpr int kStayTerms = kStream + kStages * kStageBytes;
  static constexpr int kStreamTerms = kStayTerms + kStays * 2 * kRows * 4;
  static constexpr int kBarriers = kStreamTerms + kStages * 2 * kBoxRows * 4;
  static constexpr int kTile = kBarriers + 3 * (kStays + kStages) * 8;
  static constexpr int kBytes = kTile + 16;
  static_assert(kBytes <= 227 * 1024);
};

// The blocks of 64 rows around a tile of two blocks that its rows see: `before` of them precede it.
struct Halo {
  int before, count;
};

// Rows see from `back` before to `ahead` after themselves. Tiles begin at multiples of 128.
FASTENC_HD constexpr Halo halo_of(int first, int length, int back, int ahead) {
  const int behind = length - first - 2 * kBoxRows;  // rows after the tile
  const int rows_before = first < back ? first : back;
  const int rows_after = behind < 0 ? 0 : behind < ahead ? behind : ahead;
  const int before = (rows_before + kBoxRows - 1) / kBoxRows;
  return {before, before + (rows_after + kBoxRows - 1) / kBoxRows};
}

// The first row of block i of the halo.
FASTENC_HD constexpr int halo_row(const Halo& halo, int first, int i) {
  return first + (i - halo.before + (i < halo.before ? 0 : 2)) * kBoxRows;
}

// Whether any of 64 rows from `first` on sees any of 64 rows from `other` on.
FASTENC_HD constexpr bool blocks_meet(int first, int other, int length, int back, int ahead) {
  return first < length && other < length && other > first - back - kBoxRows &&
         other < first + kBoxRows + ahead;
}

// ---- attention without a window -----------------------------------------------------------------

constexpr int kOrderThreads = 512;
constexpr int kOrderMost = 4096;
constexpr int kRotateThreads = 256;

// A producer warpgroup and two consumers of 64 queries each; keys and values in blocks of 128 go
// through a ring of stages.
template <int kHeadDim>
struct GlobalShape {
  static constexpr int kGroups = 2;
  static constexpr int kThreads = (1 + kGroups) * kGroupThreads;
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  // Of 504 a thread of each warpgroup: the producer needs few.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kQuery = 0, kKey = kRows * kHeadDim * 2;
  static constexpr int kValue = kKey + kStages * kKeys * kHeadDim * 2;
  static constexpr int kBarriers = kValue + kStages * kKeys * kHeadDim * 2;
  static constexpr int kTile = kBarriers + (2 + 4 * kStages) * 8;
  static constexpr int kBytes = kTile + 16;
};

// Backward: 128 rows stay, blocks of 64 stream by.
template <int kHeadDim>
struct GlobalGradShape {
  static constexpr int kGroups = 2;
  static constexpr int kThreads = (1 + kGroups) * kGroupThreads;
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kBlock = kBoxRows;
  static constexpr int kStages = 3;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kStay1 = 0, kStay2 = kRows * kHeadDim * 2, kStream1 = 2 * kStay2;
  static constexpr int kStream2 = kStream1 + kStages * kBlock * kHeadDim * 2;
  static constexpr int kBarriers = kStream2 + kStages * kBlock * kHeadDim * 2;
  static constexpr int kTile = kBarriers + (2 + 2 * kStages) * 8;
  static constexpr int kBytes = kTile + 16;
};

// Blocks of the kernels that take a row, or a chunk of one, a thread.
constexpr uint32_t rotate_blocks(int64_t items) {
  return static_cast<uint32_t>(ceil_div(items, kRotateThreads));
}

// Heads that one block walks: all of them, unless that leaves SMs idle.
constexpr int heads_per_block(int64_t slots, int heads, int64_t resident) {
  const int64_t parts = slots > 0 ? ceil_div(2 * resident, slots) : 1;
  return static_cast<int>(ceil_div(heads, parts < heads ? parts : heads));
}

}  // namespace fastenc
