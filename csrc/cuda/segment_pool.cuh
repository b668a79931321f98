// One row for each packed sequence, and its gradient.
//
// Forward: a block takes 128 bytes of columns of one sequence; 32 slices of its tokens are summed
// (or their maximum is found) side by side and put together in order: no atomics, and a sequence's
// row does not depend on its neighbours. "cls" and "last" are the mean of one token.
// Backward: linear in tokens, so one long sequence is no longer than many short ones; a block
// finds the sequences of its 32 tokens by binary search, once.
#pragma once

#include "vectors.cuh"

namespace fastenc::cuda {

enum class PoolMode { kMean, kCls, kMax, kLast };

template <typename T, int V>
__global__ __launch_bounds__(PoolTiles::kThreads) void segment_pool_mean_kernel(
    const T* __restrict__ x, const int32_t* __restrict__ edges, T* __restrict__ out, int64_t hidden,
    int64_t first_seq, PoolMode mode) {
  __shared__ float sums[PoolTiles::kSlices][PoolTiles::kLanes][V];
  const int lane = threadIdx.x % PoolTiles::kLanes, slice = threadIdx.x / PoolTiles::kLanes;
  const int64_t seq = first_seq + blockIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * PoolTiles::kLanes + lane) * V;
  int64_t begin = edges[seq], end = edges[seq + 1];
  if (mode == PoolMode::kCls) {
    end = smaller(end, begin + 1);
  } else if (mode == PoolMode::kLast) {
    begin = larger(begin, end - 1);
  }
  float sum[V] = {};
  if (column < hidden) {
    for (int64_t token = begin + slice; token < end; token += PoolTiles::kSlices) {
      float value[V];
      load<V>(x + token * hidden + column, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[i] += value[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    sums[slice][lane][i] = sum[i];
  }
  __syncthreads();
  if (slice == 0 && column < hidden) {
    const float scale = end > begin ? 1.0f / static_cast<float>(end - begin) : 0.0f;
    const int filled = static_cast<int>(smaller(end - begin, PoolTiles::kSlices));
    add_slices(sums, lane, filled, sum);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sum[i] *= scale;
    }
    store<V>(out + seq * hidden + column, sum);
  }
}

template <typename T, int V>
__global__ __launch_bounds__(PoolTiles::kThreads) void segment_pool_max_kernel(
    const T* __restrict__ x, const int32_t* __restrict__ edges, T* __restrict__ out,
    int32_t* __restrict__ index, int64_t hidden, int64_t first_seq) {
  __shared__ float values[PoolTiles::kSlices][PoolTiles::kLanes][V];
  __shared__ int32_t tokens[PoolTiles::kSlices][PoolTiles::kLanes][V];
  const int lane = threadIdx.x % PoolTiles::kLanes, slice = threadIdx.x / PoolTiles::kLanes;
  const int64_t seq = first_seq + blockIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * PoolTiles::kLanes + lane) * V;
  const int64_t begin = edges[seq], end = edges[seq + 1];
  Peak peak[V];
  if (column < hidden) {
    for (int64_t token = begin + slice; token < end; token += PoolTiles::kSlices) {
      float value[V];
      load<V>(x + token * hidden + column, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        peak[i] = higher(peak[i], {value[i], static_cast<int32_t>(token)});
      }
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    values[slice][lane][i] = peak[i].value;
    tokens[slice][lane][i] = peak[i].token;
  }
  __syncthreads();
  if (slice == 0 && column < hidden) {
    for (int other = 1; other < PoolTiles::kSlices; ++other) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        peak[i] = higher(peak[i], {values[other][lane][i], tokens[other][lane][i]});
      }
    }
    float best[V];
    int32_t winners[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      best[i] = peak[i].value;
      winners[i] = peak[i].token;
    }
    store<V>(out + seq * hidden + column, best);
    store_as_is<V>(index + seq * hidden + column, winners);
  }
}

template <typename T, int V>
__global__ __launch_bounds__(PoolTiles::kThreads) void segment_pool_bwd_kernel(
    const T* __restrict__ grad, const int32_t* __restrict__ index,
    const int32_t* __restrict__ edges, T* __restrict__ dx, int64_t total_tokens, int64_t hidden,
    int64_t num_seqs, Divider by_vectors, PoolMode mode) {
  __shared__ int64_t seqs[PoolTiles::kTokens];
  __shared__ float scales[PoolTiles::kTokens];  // of a token's gradient: 0, 1 or 1 / length
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * PoolTiles::kTokens;
  if (threadIdx.x < PoolTiles::kTokens) {
    const int64_t token = smaller(first_token + threadIdx.x, total_tokens - 1);
    const int64_t seq = find_sequence(edges, num_seqs, token);
    const int64_t begin = edges[seq], end = edges[seq + 1];
    const bool chosen =
        mode == PoolMode::kMax || token == (mode == PoolMode::kCls ? begin : end - 1);
    seqs[threadIdx.x] = seq;
    scales[threadIdx.x] = mode == PoolMode::kMean ? 1.0f / static_cast<float>(end - begin)
                          : chosen                ? 1.0f
                                                  : 0.0f;
  }
  __syncthreads();
  const uint32_t items = PoolTiles::kTokens * by_vectors.divisor;
  for (uint32_t item = threadIdx.x; item < items; item += PoolTiles::kThreads) {
    const uint32_t t = by_vectors.quotient(item);
    const int64_t column = static_cast<int64_t>(by_vectors.remainder(item, t)) * V;
    const int64_t token = first_token + t;
    if (token >= total_tokens) {
      return;
    }
    const int64_t at = seqs[t] * hidden + column;
    const float scale = scales[t];
    float g[V] = {};
    if (scale != 0.0f) {
      load<V>(grad + at, g);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        g[i] *= scale;
      }
    }
    if (mode == PoolMode::kMax) {
      const auto winners = load<V>(index + at);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        g[i] = winners.items[i] == token ? g[i] : 0.0f;
      }
    }
    store<V>(dx + token * hidden + column, g);
  }
}

}  // namespace fastenc::cuda
