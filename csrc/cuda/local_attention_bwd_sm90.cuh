// Windowed attention on Hopper, backward, device code (see local_attention_bwd_sm90.cu).
#pragma once

#include "sm90/attention.cuh"

namespace fastenc::cuda::sm90 {

struct LocalGradMaps {
  TensorMap q, k, v, grad_out;
};

// Where a block keeps its rows: tile rows, from `reach` before its first own row on.
template <typename T>
struct LocalGradMemory {
  unsigned char *q, *k, *v, *grad_out;
  T *cos, *sin;
  float *lse, *delta;  // of the tile's rows; lse in base 2
  uint64_t* full;
  KeptTile* kept;
};

template <typename T, int kHeadDim, int kReach>
__device__ __forceinline__ LocalGradMemory<T> local_grad_memory() {
  using Shape = LocalGradShape<kHeadDim, kReach>;
  unsigned char* shared = aligned_shared();
  return {shared + Shape::kQuery,
          shared + Shape::kKey,
          shared + Shape::kValue,
          shared + Shape::kGrad,
          reinterpret_cast<T*>(shared + Shape::kCos),
          reinterpret_cast<T*>(shared + Shape::kSin),
          reinterpret_cast<float*>(shared + Shape::kLse),
          reinterpret_cast<float*>(shared + Shape::kDelta),
          reinterpret_cast<uint64_t*>(shared + Shape::kBarrier),
          reinterpret_cast<KeptTile*>(shared + Shape::kBarrier + 8)};
}

// lse log2(e), and delta = sum_d out grad_out - grad_lse, of the tile's rows: a thread a row. Rows
// outside of the sequence get what makes their weights and gradients 0.
template <typename T, typename Rows, int kThreads>
__device__ __forceinline__ void local_row_terms(const LocalGradMemory<T>& m,
                                                const AttentionGradArgs& args, int head,
                                                const AttentionTile& tile, int first) {
  constexpr float kLog2e = 1.44269504f;
  const AttentionArgs& forward = args.forward;
#pragma unroll 1
  for (int row = threadIdx.x; row < Rows::kRowCount; row += kThreads) {
    if (first + row < 0 || first + row >= tile.length) {
      m.lse[row] = INFINITY;
      m.delta[row] = 0.0f;
      continue;
    }
    const int64_t token = static_cast<int64_t>(tile.start) + first + row;
    const int64_t at = head * forward.total_tokens + token;
    const T* out = forward.out.at<T>(token, head);
    float delta = args.grad_lse == nullptr ? 0.0f : -args.grad_lse[at];
#pragma unroll 2
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      float x[8], g[8];
      load<8>(out + chunk * 8, x);
      load<8>(reinterpret_cast<const T*>(m.grad_out + Rows::chunk_offset(row, chunk)), g);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        delta = fmaf(x[j], g[j], delta);
      }
    }
    m.lse[row] = forward.lse[at] * kLog2e;
    m.delta[row] = delta;
  }
}

// d (64, 64) = rows of a from `a_row` on times the transposed rows of b from `b_row` on.
template <typename T, typename Rows>
__device__ __forceinline__ void multiply_rows(float (&d)[8][4], const unsigned char* a, int a_row,
                                              const unsigned char* b, int b_row) {
#pragma unroll
  for (int k = 0; k < Rows::kChunks / 2; ++k) {
    wgmma<T, false, false>(d, Rows::along_rows(shared_address(a), a_row, k),
                           Rows::along_rows(shared_address(b), b_row, k), k > 0);
  }
}

// d (64, head_dim) += weights (64, 64) times rows of b from `row` on.
template <typename T, typename Rows, int kTiles>
__device__ __forceinline__ void accumulate(float (&d)[kTiles][4], const uint32_t (&weights)[4][4],
                                           const unsigned char* b, int row, bool onto) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma<T, true>(d, weights[k], Rows::across_rows(shared_address(b), row + k * 16),
                   onto || k > 0);
  }
}

// grad_q of this warpgroup's rows, over the blocks of 64 keys in their reach.
template <typename T, int kHeadDim, int kReach>
__device__ __forceinline__ void local_grad_queries(const LocalGradMemory<T>& m,
                                                   const AttentionGradArgs& args, int head,
                                                   int group) {
  using Shape = LocalGradShape<kHeadDim, kReach>;
  using Rows = Tile<kHeadDim, Shape::kTileRows>;
  const AttentionArgs& forward = args.forward;
  const AttentionTile tile = reread(*m.kept);
  const int own = kReach + group * kGroupRows, first = tile.first + group * kGroupRows;
  float lse[2], delta[2];
  Range seen[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    lse[half] = m.lse[own + group_row() + half * 8];
    delta[half] = m.delta[own + group_row() + half * 8];
    seen[half] = seen_columns(group_row() + half * 8, first, tile.length, kReach, forward.left,
                              forward.right);
  }
  float dq[kHeadDim / 8][4] = {};
#pragma unroll 1
  for (int block = 0; block < Shape::kBlocks; ++block) {
    const int row = group * kGroupRows + block * kGroupRows;  // of the tile: the block's first key
    float s[8][4] = {}, dp[8][4] = {};
    hold(s);
    hold(dp);
    hold(dq);
    wgmma_fence();
    multiply_rows<T, Rows>(s, m.q, own, m.k, row);
    multiply_rows<T, Rows>(dp, m.grad_out, own, m.v, row);
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
    hold(dp);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = block * kGroupRows + n * 8 + pair_of_lane() + i % 2;
        const bool in = column >= seen[i / 2].begin && column < seen[i / 2].end;
        const float p = fast_exp2(fmaf(s[n][i], forward.scale_log2, -lse[i / 2]));
        s[n][i] = in ? p * (dp[n][i] - delta[i / 2]) : 0.0f;
      }
    }
    uint32_t ds[4][4];
    pack_left<T>(ds, s);
    hold(dq);
    wgmma_fence();
    accumulate<T, Rows>(dq, ds, m.k, row, block > 0);
    wgmma_commit();
    wgmma_wait<0>();
    hold(dq);
  }
  const auto slot_of = [&](int half) {
    return spread_slot(own + group_row() + half * 8) * (kHeadDim / 2);
  };
  if (forward.cos.data != nullptr) {
    rotate_back(dq, m.cos, m.sin, slot_of);
  }
  const float factor[2] = {args.scale, args.scale};
  store_accumulators<T>(dq, factor, args.dq, head, tile.start, first, tile.length);
}

// grad_k and grad_v of this warpgroup's rows, over the blocks of 64 queries that may see them.
// Scores are transposed, so that the weights stay in registers.
template <typename T, int kHeadDim, int kReach>
__device__ __forceinline__ void local_grad_keys(const LocalGradMemory<T>& m,
                                                const AttentionGradArgs& args, int head,
                                                int group) {
  using Shape = LocalGradShape<kHeadDim, kReach>;
  using Rows = Tile<kHeadDim, Shape::kTileRows>;
  const AttentionArgs& forward = args.forward;
  const AttentionTile tile = reread(*m.kept);
  const int own = kReach + group * kGroupRows, first = tile.first + group * kGroupRows;
  Range seen[2];  // a key is seen from `right` before it to `left` after it
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    seen[half] = seen_columns(group_row() + half * 8, first, tile.length, kReach, forward.right,
                              forward.left);
  }
  float dk[kHeadDim / 8][4] = {}, dv[kHeadDim / 8][4] = {};
#pragma unroll 1
  for (int block = 0; block < Shape::kBlocks; ++block) {
    const int row = group * kGroupRows + block * kGroupRows;
    float s[8][4] = {}, dp[8][4] = {};
    hold(s);
    hold(dp);
    wgmma_fence();
    multiply_rows<T, Rows>(s, m.k, own, m.q, row);
    multiply_rows<T, Rows>(dp, m.v, own, m.grad_out, row);
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
    hold(dp);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int in_block = n * 8 + pair_of_lane() + i % 2;
        const int column = block * kGroupRows + in_block;
        const bool in = column >= seen[i / 2].begin && column < seen[i / 2].end;
        const float p = fast_exp2(fmaf(s[n][i], forward.scale_log2, -m.lse[row + in_block]));
        s[n][i] = in ? p : 0.0f;
        dp[n][i] = in ? p * (dp[n][i] - m.delta[row + in_block]) : 0.0f;
      }
    }
    uint32_t p[4][4], ds[4][4];
    pack_left<T>(p, s);
    pack_left<T>(ds, dp);
    hold(dv);
    hold(dk);
    wgmma_fence();
    accumulate<T, Rows>(dv, p, m.grad_out, row, block > 0);
    accumulate<T, Rows>(dk, ds, m.q, row, block > 0);
    wgmma_commit();
    wgmma_wait<0>();
    hold(dv);
    hold(dk);
  }
  const auto slot_of = [&](int half) {
    return spread_slot(own + group_row() + half * 8) * (kHeadDim / 2);
  };
  if (forward.cos.data != nullptr) {
    rotate_back(dk, m.cos, m.sin, slot_of);
  }
  const float factor[2] = {args.scale, args.scale}, one[2] = {1.0f, 1.0f};
  store_accumulators<T>(dk, factor, args.dk, head, tile.start, first, tile.length);
  store_accumulators<T>(dv, one, args.dv, head, tile.start, first, tile.length);
}

template <typename T, int kHeadDim, int kReach>
__global__ __launch_bounds__(
    LocalGradShape<kHeadDim, kReach>::kThreads,
    1) void local_attention_bwd_sm90(const __grid_constant__ LocalGradMaps maps,
                                     const __grid_constant__ AttentionGradArgs args,
                                     int heads_per_block) {
#ifdef FASTENC_SM90
  using Shape = LocalGradShape<kHeadDim, kReach>;
  using Rows = Tile<kHeadDim, Shape::kTileRows>;
  constexpr int kThreads = Shape::kThreads;
  const AttentionArgs& forward = args.forward;
  const AttentionTile found =
      locate_tile(forward.cu_seqlens, forward.num_seqs, blockIdx.x, Shape::kRows);
  if (found.first >= found.length) {
    return;
  }
  const int first_head = blockIdx.y * heads_per_block;
  const int last_head = static_cast<int>(smaller(first_head + heads_per_block, forward.heads));
  const LocalGradMemory<T> m = local_grad_memory<T, kHeadDim, kReach>();
  const auto load = [&](const AttentionTile& tile, int head) {
    const int first = tile.first - kReach;
    mbarrier_expect(m.full,
                    4 * boxes_inside<Shape::kTileRows>(first, tile.length) * Rows::kBoxBytes);
    load_rows<Rows>(m.q, maps.q, m.full, head, tile, first);
    load_rows<Rows>(m.k, maps.k, m.full, head, tile, first);
    load_rows<Rows>(m.v, maps.v, m.full, head, tile, first);
    load_rows<Rows>(m.grad_out, maps.grad_out, m.full, head, tile, first);
  };
  if (threadIdx.x == 0) {
    mbarrier_init(m.full, 1);
    mbarrier_publish();
    load(found, first_head);
    *m.kept = {found.start, found.length, found.first, last_head};
  }
  const bool rotary = forward.cos.data != nullptr;
  if (rotary) {
    stage_rotation<kHeadDim, Shape::kTileRows, kThreads>(m.cos, m.sin, forward,
                                                         found.first - kReach, found.length);
  }
  __syncthreads();
  uint32_t parity = 0;
#pragma unroll 1
  for (int head = first_head; head < last(*m.kept); ++head, parity ^= 1) {
    mbarrier_wait(m.full, parity);
    {
      const AttentionTile tile = reread(*m.kept);
      const int first = tile.first - kReach;
      if (rotary) {
        rotate<T, Rows, kThreads>(m.q, m.cos, m.sin, 0, first, tile.length);
        rotate<T, Rows, kThreads>(m.k, m.cos, m.sin, 0, first, tile.length);
      }
      if (first < 0 || first + Shape::kTileRows > tile.length) {
        clear_outside<Rows, kThreads>(m.q, first, tile.length);
        clear_outside<Rows, kThreads>(m.k, first, tile.length);
        clear_outside<Rows, kThreads>(m.v, first, tile.length);
        clear_outside<Rows, kThreads>(m.grad_out, first, tile.length);
      }
      local_row_terms<T, Rows, kThreads>(m, args, head, tile, first);
      fence_async_proxy();
      __syncthreads();
    }
    local_grad_queries<T, kHeadDim, kReach>(m, args, head, group_id());
    local_grad_keys<T, kHeadDim, kReach>(m, args, head, group_id());
    __syncthreads();  // everything is read
    if (threadIdx.x == 0 && head + 1 < last(*m.kept)) {
      load(reread(*m.kept), head + 1);
    }
  }
#endif
}

}  // namespace fastenc::cuda::sm90
