// Windowed attention on Hopper, device code (see local_attention_sm90.cu).
#pragma once

#include "../common/hopper_tiles.h"
#include "attention_args.cuh"
#include "mma.cuh"
#include "sm90/attention.cuh"

namespace fastenc::cuda::sm90 {

struct LocalAttentionMaps {
  TensorMap q, k, v;  // (total_tokens, heads, head_dim), boxes of kBoxRows tokens of one head
};

// Scores of this warpgroup's rows against its keys.
template <typename T, int kHeadDim, int kReach>
__device__ __forceinline__ void local_scores(
    float (&s)[LocalShape<kHeadDim, kReach>::kGroupKeys / 8][4], uint32_t queries, uint32_t keys,
    int group) {
  using Shape = LocalShape<kHeadDim, kReach>;
  using Query = Tile<kHeadDim, Shape::kRows>;
  using Key = Tile<kHeadDim, Shape::kKeys>;
  constexpr int kFirst = 24;  // n8 tiles of the widest product
  static_assert(Shape::kGroupKeys / 8 == kFirst || Shape::kGroupKeys / 8 == kFirst + 16);
  const int row = group * kGroupRows;
  hold(s);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const uint64_t a = Query::along_rows(queries, row, k);
    wgmma<T, false, false>(part<0, kFirst>(s), a, Key::along_rows(keys, row, k), k > 0);
    if constexpr (kReach > 64) {
      wgmma<T, false, false>(part<kFirst, 16>(s), a, Key::along_rows(keys, row + kFirst * 8, k),
                             k > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(s);
}

template <int kReach, int kTiles>
__device__ __forceinline__ void local_mask(float (&s)[kTiles][4], int first_query, int length,
                                           int left, int right) {
  const bool middle = middle_is_seen(first_query, length, left, right);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Range seen =
        seen_columns(group_row() + half * 8, first_query, length, kReach, left, right);
    const int begin = opaque(seen.begin - pair_of_lane()), end = opaque(seen.end - pair_of_lane());
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const bool in_middle = n >= kReach / 8 && n < (kReach + kGroupRows) / 8;
      if (in_middle && middle) {
        continue;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = n * 8 + i;
        float& x = s[n][half * 2 + i];
        x = column >= begin && column < end ? x : -INFINITY;
      }
    }
  }
}

template <typename T, int kHeadDim, int kReach>
__global__ __launch_bounds__(
    LocalShape<kHeadDim, kReach>::kThreads,
    LocalShape<kHeadDim, kReach>::
        kBlocksPerSm) void local_attention_fwd_sm90(const __grid_constant__ LocalAttentionMaps maps,
                                                    const __grid_constant__ AttentionArgs args,
                                                    int heads_per_block) {
#ifdef FASTENC_SM90
  using Shape = LocalShape<kHeadDim, kReach>;
  using Query = Tile<kHeadDim, Shape::kRows>;
  using Key = Tile<kHeadDim, Shape::kKeys>;
  const AttentionTile found = locate_tile(args.cu_seqlens, args.num_seqs, blockIdx.x, Shape::kRows);
  if (found.first >= found.length) {
    return;
  }
  const int first_head = blockIdx.y * heads_per_block;
  const int last_head = static_cast<int>(smaller(first_head + heads_per_block, args.heads));

  unsigned char* shared = aligned_shared();
  unsigned char *queries = shared + Shape::kQuery, *keys = shared + Shape::kKey;
  unsigned char* values = shared + Shape::kValue;
  T *cos = reinterpret_cast<T*>(shared + Shape::kCos),
    *sin = reinterpret_cast<T*>(shared + Shape::kSin);
  uint64_t* keys_full = reinterpret_cast<uint64_t*>(shared + Shape::kBarriers);
  uint64_t* values_full = keys_full + 1;
  KeptTile* kept = reinterpret_cast<KeptTile*>(keys_full + 2);

  const auto load_keys = [&](const AttentionTile& tile, int head) {
    const int first_key = tile.first - kReach;
    mbarrier_expect(keys_full,
                    boxes_inside<Shape::kRows>(tile.first, tile.length) * Query::kBoxBytes +
                        boxes_inside<Shape::kKeys>(first_key, tile.length) * Key::kBoxBytes);
    load_rows<Query>(queries, maps.q, keys_full, head, tile, tile.first);
    load_rows<Key>(keys, maps.k, keys_full, head, tile, first_key);
  };
  const auto load_values = [&](const AttentionTile& tile, int head) {
    const int first_key = tile.first - kReach;
    mbarrier_expect(values_full,
                    boxes_inside<Shape::kKeys>(first_key, tile.length) * Key::kBoxBytes);
    load_rows<Key>(values, maps.v, values_full, head, tile, first_key);
  };

  if (threadIdx.x == 0) {
    mbarrier_init(keys_full, 1);
    mbarrier_init(values_full, 1);
    mbarrier_publish();
    load_keys(found, first_head);
    load_values(found, first_head);
    *kept = {found.start, found.length, found.first, last_head};
  }
  const bool rotary = args.cos.data != nullptr;
  if (rotary) {
    stage_rotation<kHeadDim, Shape::kKeys, Shape::kThreads>(cos, sin, args, found.first - kReach,
                                                            found.length);
  }
  __syncthreads();

  // The scores take most registers: where the tile is, is read again at each step. A warpgroup past
  // the end of the sequence works on what lies there, and stores nothing.
  uint32_t parity = 0;
#pragma unroll 1
  for (int head = first_head; head < last(*kept); ++head, parity ^= 1) {
    mbarrier_wait(keys_full, parity);
    if (rotary) {
      const AttentionTile tile = reread(*kept);
      rotate<T, Query, Shape::kThreads>(queries, cos, sin, kReach, tile.first, tile.length);
      rotate<T, Key, Shape::kThreads>(keys, cos, sin, 0, tile.first - kReach, tile.length);
      fence_async_proxy();
      __syncthreads();
    }
    float s[Shape::kGroupKeys / 8][4] = {};
    local_scores<T, kHeadDim, kReach>(s, shared_address(queries), shared_address(keys), group_id());
    __syncthreads();  // queries and keys are read
    if (threadIdx.x == 0 && head + 1 < last(*kept)) {
      load_keys(reread(*kept), head + 1);
    }
    mbarrier_wait(values_full, parity);
    {
      const AttentionTile tile = reread(*kept);
      const int first_key = tile.first - kReach;
      if (first_key < 0 || first_key + Shape::kKeys > tile.length) {
        clear_outside<Key, Shape::kThreads>(values, first_key, tile.length);
        fence_async_proxy();
        __syncthreads();
      }
      local_mask<kReach>(s, tile.first + group_id() * kGroupRows, tile.length, args.left,
                         args.right);
    }
    uint32_t p[Shape::kGroupKeys / 16][4];
    const RowStatistics rows = softmax<T, kHeadDim / 16>(p, s, args.scale_log2);
    float o[kHeadDim / 8][4] = {};
    hold(o);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Shape::kGroupKeys / 16; ++k) {
      wgmma<T, true>(o, p[k],
                     Key::across_rows(shared_address(values), group_id() * kGroupRows + k * 16),
                     k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(o);
    const AttentionTile tile = reread(*kept);
    store_rows<T>(o, rows, args, head, tile, tile.first + group_id() * kGroupRows);
    __syncthreads();  // values are read
    if (threadIdx.x == 0 && head + 1 < last(*kept)) {
      load_values(tile, head + 1);
    }
  }
#endif
}

}  // namespace fastenc::cuda::sm90
