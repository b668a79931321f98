// Residual add + LayerNorm, forward, over (rows, hidden).
//
// A row lies in the registers of one warp (hidden <= 1024, no barrier) or one block, so mean and
// variance take two passes without a second read. Rows that do not allow 16-byte accesses, or are
// very wide, go through a kernel that loops over the row.
#pragma once

#include <type_traits>

#include "layer_norm.cuh"

namespace fastenc::cuda {

template <typename A, typename B>
using Promoted = std::conditional_t<std::is_same_v<A, B>, A, float>;

// Elements of 16 bytes of the narrower operand: both have whole vectors then.
template <typename X, typename R>
constexpr int kPairVector = kVector<X> > kVector<R> ? kVector<X> : kVector<R>;

__device__ __forceinline__ float row_sum(float x, int threads_per_row,
                                         float (&partial)[kMaxWarps]) {
  return threads_per_row == kWarp ? warp_sum(x) : block_sum(x, partial);
}

// residual and total: nullptr together. Rows of one warp each, or one row of the whole block.
template <typename X, typename R, int V>
__global__ __launch_bounds__(kMaxRowThreads) void add_layer_norm_fwd_kernel(
    const X* __restrict__ x, const R* __restrict__ residual, Parameter weight, Parameter bias,
    Promoted<X, R>* __restrict__ normed, Promoted<X, R>* __restrict__ total,
    float* __restrict__ mean, float* __restrict__ rstd, int64_t rows, int64_t hidden,
    int threads_per_row, float eps) {
  using T = Promoted<X, R>;
  constexpr int kVectors = kForwardElements / V;
  __shared__ float partial[kMaxWarps];
  const int thread = threadIdx.x % threads_per_row;
  const int rows_per_block = blockDim.x / threads_per_row;
  const int64_t r =
      static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  if (r >= rows) {
    return;  // a whole warp of a block without barriers
  }
  const int64_t at = r * hidden;
  float row[kVectors][V] = {};
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t column = row_column(thread, k, threads_per_row, V);
    if (column < hidden) {
      load<V>(x + at + column, row[k]);
      if (residual != nullptr) {
        float other[V];
        load<V>(residual + at + column, other);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          row[k][i] = rounded<T>(row[k][i] + other[i]);
        }
        store<V>(total + at + column, row[k]);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum += row[k][i];
      }
    }
  }
  const float inverse = 1.0f / static_cast<float>(hidden);
  const float m = row_sum(sum, threads_per_row, partial) * inverse;
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    if (row_column(thread, k, threads_per_row, V) < hidden) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float d = row[k][i] - m;
        squares = fmaf(d, d, squares);
      }
    }
  }
  const float s = rsqrtf(fmaf(row_sum(squares, threads_per_row, partial), inverse, eps));
  if (thread == 0) {
    mean[r] = m;
    rstd[r] = s;
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t column = row_column(thread, k, threads_per_row, V);
    if (column < hidden) {
      float w[V], b[V] = {};
      load(weight, column, w);
      if (bias.data != nullptr) {
        load(bias, column, b);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        row[k][i] = fmaf((row[k][i] - m) * s, w[i], b[i]);
      }
      store<V>(normed + at + column, row[k]);
    }
  }
}

// A block a row, any width and alignment; a thread reads again only what it wrote itself.
template <typename X, typename R>
__global__ __launch_bounds__(kLoopThreads) void add_layer_norm_fwd_loop_kernel(
    const X* __restrict__ x, const R* __restrict__ residual, Parameter weight, Parameter bias,
    Promoted<X, R>* __restrict__ normed, Promoted<X, R>* total, float* __restrict__ mean,
    float* __restrict__ rstd, int64_t hidden, float eps) {
  using T = Promoted<X, R>;
  __shared__ float partial[kMaxWarps];
  const int64_t at = static_cast<int64_t>(blockIdx.x) * hidden;
  const auto element = [&](int64_t i) {
    return residual == nullptr ? widen<X>(x[at + i]) : widen<T>(total[at + i]);
  };
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < hidden; i += kLoopThreads) {
    if (residual != nullptr) {
      total[at + i] = narrow<T>(widen<X>(x[at + i]) + widen<R>(residual[at + i]));
    }
    sum += element(i);
  }
  const float inverse = 1.0f / static_cast<float>(hidden);
  const float m = block_sum(sum, partial) * inverse;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < hidden; i += kLoopThreads) {
    const float d = element(i) - m;
    squares = fmaf(d, d, squares);
  }
  const float s = rsqrtf(fmaf(block_sum(squares, partial), inverse, eps));
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = m;
    rstd[blockIdx.x] = s;
  }
  for (int64_t i = threadIdx.x; i < hidden; i += kLoopThreads) {
    float w[1], b[1] = {};
    load(weight, i, w);
    if (bias.data != nullptr) {
      load(bias, i, b);
    }
    normed[at + i] = narrow<T>(fmaf((element(i) - m) * s, w[0], b[0]));
  }
}

}  // namespace fastenc::cuda
