// What the backward kernels of Hopper attention share.
#pragma once

#include "attention.cuh"

namespace fastenc::cuda::sm90 {

// Of the kernels with a window.
struct GradMaps {
  TensorMap q, k, v, grad_out;
};

// delta = sum_d out grad_out - grad_lse, of every row.
template <typename T, int kHeadDim>
__global__ __launch_bounds__(kRotateThreads) void attention_delta_sm90(
    const __grid_constant__ AttentionGradArgs args) {
  const AttentionArgs& forward = args.forward;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRotateThreads + threadIdx.x;
  const int64_t token = row / forward.heads;
  if (token >= forward.total_tokens) {
    return;
  }
  const int head = static_cast<int>(row % forward.heads);
  const int64_t at = head * forward.total_tokens + token;
  const T *out = forward.out.at<T>(token, head), *grad = args.grad_out.at<T>(token, head);
  float delta = args.grad_lse == nullptr ? 0.0f : -args.grad_lse[at];
#pragma unroll 4
  for (int column = 0; column < kHeadDim; column += 8) {
    float x[8], g[8];
    load<8>(out + column, x);
    load<8>(grad + column, g);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      delta = fmaf(x[j], g[j], delta);
    }
  }
  args.delta[at] = delta;
}

// d (64, 64) = rows of a from `a_row` on times the transposed rows of b from `b_row` on.
template <typename T, typename Left, typename Right>
__device__ __forceinline__ void multiply_rows(float (&d)[8][4], const unsigned char* a, int a_row,
                                              const unsigned char* b, int b_row) {
#pragma unroll
  for (int k = 0; k < Left::kChunks / 2; ++k) {
    wgmma<T, false, false>(d, Left::along_rows(shared_address(a), a_row, k),
                           Right::along_rows(shared_address(b), b_row, k), k > 0);
  }
}

// d (64, head_dim) += weights (64, 64) times rows of b from `row` on.
template <typename T, typename Rows, int kTiles>
__device__ __forceinline__ void accumulate(float (&d)[kTiles][4], const uint32_t (&weights)[4][4],
                                           const unsigned char* b, int row) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma<T, true>(d, weights[k], Rows::across_rows(shared_address(b), row + k * 16), true);
  }
}

// A warpgroup's 64 rows, from row `own` of two tiles on, and the 64 rows that they meet, from row
// `met` of two others on. Queries meet keys: q, grad_out | k, v; keys meet queries: k, v | q,
// grad_out.
struct GradBlocks {
  const unsigned char *own1, *own2;
  int own;
  const unsigned char *met1, *met2;
  int met;
};

// log-sum-exp in base 2, and delta, of a query.
struct QueryTerms {
  float lse, delta;
};

// scores = own1 met1^T, dp = own2 met2^T, p = 2^(scores - lse), ds = p (dp - delta), both 0 but
// where in(half, column): column 0 .. 63 is a row that is met, against own row group_row() + 8
// half. first_sum += ds met1: grad_q, or grad_k; of keys also second_sum += p met2: grad_v.
template <typename T, typename Own, typename Met, bool kOfKeys, int kTiles, typename Terms,
          typename In>
__device__ __forceinline__ void add_block(float (&first_sum)[kTiles][4],
                                          float (&second_sum)[kTiles][4], const GradBlocks& blocks,
                                          float scale_log2, const Terms& terms, const In& in) {
  float s[8][4] = {}, dp[8][4] = {};
  hold(s);
  hold(dp);
  hold(first_sum);
  wgmma_fence();
  multiply_rows<T, Own, Met>(s, blocks.own1, blocks.own, blocks.met1, blocks.met);
  multiply_rows<T, Own, Met>(dp, blocks.own2, blocks.own, blocks.met2, blocks.met);
  wgmma_commit();
  wgmma_wait<0>();
  hold(s);
  hold(dp);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = n * 8 + pair_of_lane() + j;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = half * 2 + j;
        const QueryTerms of = terms(half, column);
        const float p = fast_exp2(fmaf(s[n][i], scale_log2, -of.lse));
        const bool seen = in(half, column);
        s[n][i] = seen ? p : 0.0f;
        dp[n][i] = seen ? p * (dp[n][i] - of.delta) : 0.0f;
      }
    }
  }
  uint32_t p[4][4], ds[4][4];
  pack_left<T>(ds, dp);
  if constexpr (kOfKeys) {
    pack_left<T>(p, s);
    hold(second_sum);
  }
  hold(first_sum);
  wgmma_fence();
  accumulate<T, Met>(first_sum, ds, blocks.met1, blocks.met);
  if constexpr (kOfKeys) {
    accumulate<T, Met>(second_sum, p, blocks.met2, blocks.met);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(first_sum);
  if constexpr (kOfKeys) {
    hold(second_sum);
  }
}

// The sums of a warpgroup's rows, from row `first` of a sequence on, to memory, the rotation undone
// (row_at: of rotate_back).
template <typename T, bool kOfKeys, int kTiles, typename RowAt>
__device__ __forceinline__ void store_gradients(float (&first_sum)[kTiles][4],
                                                const float (&second_sum)[kTiles][4],
                                                const AttentionGradArgs& args, const T* cos,
                                                const T* sin, const RowAt& row_at, int head,
                                                const AttentionTile& tile, int first) {
  if (args.forward.cos.data != nullptr) {
    rotate_back(first_sum, cos, sin, row_at);
  }
  const float factor[2] = {args.scale, args.scale}, one[2] = {1.0f, 1.0f};
  store_accumulators<T>(first_sum, factor, kOfKeys ? args.dk : args.dq, head, tile.start, first,
                        tile.length);
  if constexpr (kOfKeys) {
    store_accumulators<T>(second_sum, one, args.dv, head, tile.start, first, tile.length);
  }
}

// The same with the tables in global memory.
template <typename T, bool kOfKeys, int kTiles>
__device__ __forceinline__ void store_gradients(float (&first_sum)[kTiles][4],
                                                const float (&second_sum)[kTiles][4],
                                                const AttentionGradArgs& args, int head,
                                                const AttentionTile& tile, int first) {
  store_gradients<T, kOfKeys>(
      first_sum, second_sum, args, static_cast<const T*>(args.forward.cos.data),
      static_cast<const T*>(args.forward.sin.data),
      [&](int half) {
        const int row = first + group_row() + half * 8;
        return static_cast<int64_t>(row < tile.length ? row : 0) * (kTiles * 4);
      },
      head, tile, first);
}

}  // namespace fastenc::cuda::sm90
