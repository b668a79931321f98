// Which tile of which sequence a block of the GPU attention kernels takes, and what it sees.
// Neither CUDA nor torch in here: tests/test_cuda_attention_tiles.py checks it against brute force.
//
// Tiles are numbered over the packed tokens: sequence s owns the slots from cu_seqlens[s] / rows +
// s to that of s + 1, which are at least ceil(length / rows); a block whose slot has no rows
// leaves. So the grid needs no length on the host, and no list in memory.
#pragma once

#include "row_tiles.h"

namespace fastenc {

// Distances beyond it do not occur: sequences are shorter (checked on the host).
constexpr int32_t kUnlimited = 1 << 30;

struct AttentionTile {
  int32_t seq;
  int32_t start;   // packed row of the sequence's first token
  int32_t length;  // of the sequence, in rows
  int32_t first;   // row of the tile, within the sequence; >= length: nothing to do
};

FASTENC_HD constexpr int64_t attention_slots(int64_t total_tokens, int64_t num_seqs, int rows) {
  return total_tokens / rows + num_seqs;
}

// `scale`: rows of a token (spans of a word).
FASTENC_HD int64_t first_slot(const int32_t* edges, int64_t seq, int rows, int64_t scale = 1) {
  return edges[seq] * scale / rows + seq;
}

// Needs 0 <= slot < attention_slots(...).
FASTENC_HD AttentionTile locate_tile(const int32_t* edges, int32_t num_seqs, int64_t slot, int rows,
                                     int64_t scale = 1) {
  int32_t low = 0, high = num_seqs;  // first_slot(low) <= slot < first_slot(high)
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (first_slot(edges, middle, rows, scale) <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t first = (slot - first_slot(edges, low, rows, scale)) * rows;
  return {low, edges[low], static_cast<int32_t>((edges[low + 1] - edges[low]) * scale),
          static_cast<int32_t>(first)};
}

struct Range {
  int32_t begin, end;
};

// What rows first .. last of a sequence see: from `back` before the first to `ahead` after the
// last. The beginning is rounded down to a multiple of 4, the keys of one Philox counter.
FASTENC_HD Range seen_from(int32_t first, int32_t last, int32_t length, int32_t back,
                           int32_t ahead) {
  const int32_t begin = first > back ? (first - back) / 4 * 4 : 0;
  return {begin, static_cast<int32_t>(smaller(length, int64_t{last} + ahead + 1))};
}

// Whether every query of [query, query + queries) sees every key of [key, key + keys), all of them
// inside the sequence.
FASTENC_HD bool fully_seen(int32_t query, int32_t queries, int32_t key, int32_t keys,
                           int32_t length, int32_t left, int32_t right) {
  return query + queries <= length && key + keys <= length && key >= query + queries - 1 - left &&
         key + keys - 1 <= query + right;
}

FASTENC_HD bool sees(int32_t query, int32_t key, int32_t length, int32_t left, int32_t right) {
  return key < length && key >= query - left && key <= query + right;
}

FASTENC_HD int32_t clamped_distance(int32_t query, int32_t key, int32_t radius) {
  const int32_t distance = key - query;
  return distance < -radius ? -radius : distance > radius ? radius : distance;
}

// The shapes of the kernels: what host and device both must know.
constexpr int kAttentionRows = 64;  // of a tile: 16 a warp
constexpr int kAttentionThreads = 128;

template <int kItem, int kWidth>
struct AttentionShape {
  static constexpr bool kHalf = kItem == 2;           // tensor cores; else fp32 on the FMA units
  static constexpr int kPitch = kWidth + 16 / kItem;  // odd in units of 16 bytes: no bank conflict
  static constexpr int kStages = kHalf ? 2 : 1;
  static constexpr int kKeys = kHalf ? 64 : 32;                          // forward, dq
  static constexpr int kQueries = kHalf ? (kWidth > 64 ? 32 : 64) : 16;  // dk, dv
  // fp32 weights pass through shared memory, 16 rows a warp.
  FASTENC_HD static constexpr int staging(int columns) {
    return kHalf ? 0 : 64 * (columns + 4) * 4;
  }
  FASTENC_HD static constexpr int tile(int rows) { return rows * kPitch * kItem; }

  FASTENC_HD static constexpr int forward_bytes() {
    return tile(kAttentionRows) + 2 * kStages * tile(kKeys) + staging(kKeys);
  }
  FASTENC_HD static constexpr int dq_bytes() {
    return 2 * tile(kAttentionRows) + 2 * kStages * tile(kKeys) + staging(kKeys);
  }
  // With a bias: the score gradients of a block, its diagonals' sums, the sums by distance.
  FASTENC_HD static constexpr int bias_bytes(int radius) {
    return (kAttentionRows * (kKeys + 1) + kAttentionRows + kKeys + 2 * radius + 1) * 4;
  }
  FASTENC_HD static constexpr int dkdv_bytes() {
    return 2 * tile(kAttentionRows) + 2 * kStages * tile(kQueries) + 2 * kStages * kQueries * 4 +
           staging(kQueries);
  }
};

}  // namespace fastenc
