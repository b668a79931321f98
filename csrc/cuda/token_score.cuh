// Scores of words against labels, forward. A block takes 128 pairs and 128 columns of their hidden
// rows at a time, adds those to the three outputs, and either walks over all columns or leaves the
// sum of its own to token_score_sum_kernel: in both cases the sums of 128 columns are added in
// order, so that a score is the same bit for bit.
#pragma once

#include "token_rows.cuh"

namespace fastenc::cuda {

template <typename T>
constexpr int kTokenForwardBytes =
    kHiddenBytes<T> + kTokenRows * (static_cast<int>(sizeof(TokenPair)) + kTokenOutputs * 4);

// totals += out_weight y, y being this lane's elements of the row that a part of its warp shares.
template <int V, typename T, int E>
__device__ __forceinline__ void add_outputs(float* totals, const TokenArgs& args, int column,
                                            const float (&y)[E]) {
  float w[kTokenOutputs][E] = {};
  if (column < args.size) {
    load_out_weights<V, E, T>(args, column, w);
  }
#pragma unroll
  for (int o = 0; o < kTokenOutputs; ++o) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < E; ++j) {
      sum = fmaf(y[j], w[o][j], sum);
    }
#pragma unroll
    for (int mask = kTokenColumns / E / 2; mask > 0; mask /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    }
    if (lane_id() % (kTokenColumns / E) == 0) {
      totals[o] += sum;
    }
  }
}

template <typename T>
__device__ __forceinline__ T token_output(const TokenArgs& args, float total, int output) {
  const T* bias = static_cast<const T*>(args.out_bias);
  return narrow<T>(fmaf(total, args.keep_scale, bias == nullptr ? 0.0f : widen<T>(bias[output])));
}

// Grid: (tiles of pairs, 1 or chunks of R). parts (chunks, pairs, 3): the sums of each chunk, or
// null where one block takes them all.
template <typename T, int V>
__global__ __launch_bounds__(kTokenThreads, kTokenBlocks<T>) void token_score_fwd_kernel(
    const __grid_constant__ TokenArgs args, T* __restrict__ out, float* __restrict__ parts) {
  constexpr int E = kVector<T>;
  T* memory = reinterpret_cast<T*>(dynamic_shared());
  auto* pairs = reinterpret_cast<TokenPair*>(dynamic_shared() + kHiddenBytes<T>);
  auto* totals = reinterpret_cast<float*>(pairs + kTokenRows);
  const int64_t first = int64_t{blockIdx.x} * kTokenRows, last = args.words * args.labels;
  locate_pairs<kTokenRows>(pairs, args, first, last);
  for (int i = threadIdx.x; i < kTokenRows * kTokenOutputs; i += kTokenThreads) {
    totals[i] = 0.0f;
  }
  const uint64_t seed = token_seed(args);
#pragma unroll 1
  for (int64_t chunk = int64_t{blockIdx.y} * kTokenColumns; chunk < args.size;
       chunk += int64_t{gridDim.y} * kTokenColumns) {
    const int column = static_cast<int>(chunk);
    multiply_factors<V>(memory, pairs, args, column);
    __syncthreads();
    visit_hidden<V, T>(reinterpret_cast<float*>(memory), pairs, args, column, seed,
                       [&](int row, int local, const float (&y)[E]) {
                         add_outputs<V, T>(totals + row * kTokenOutputs, args, column + local, y);
                       });
  }
  __syncthreads();
  const int64_t at = first * kTokenOutputs, end = last * kTokenOutputs;
  for (int i = threadIdx.x; i < kTokenRows * kTokenOutputs && at + i < end; i += kTokenThreads) {
    if (parts != nullptr) {
      parts[blockIdx.y * end + at + i] = totals[i];
    } else {
      out[at + i] = token_output<T>(args, totals[i], i % kTokenOutputs);
    }
  }
}

// out (pairs, 3) from the sums of each chunk, added in order; a thread an element.
template <typename T>
__global__ __launch_bounds__(kTokenThreads) void token_score_sum_kernel(
    const __grid_constant__ TokenArgs args, const float* __restrict__ parts, int chunks,
    T* __restrict__ out) {
  const int64_t at = int64_t{blockIdx.x} * kTokenThreads + threadIdx.x;
  const int64_t outputs = args.words * args.labels * kTokenOutputs;
  if (at < outputs) {
    float total = 0.0f;
#pragma unroll 4
    for (int chunk = 0; chunk < chunks; ++chunk) {
      total += parts[chunk * outputs + at];
    }
    out[at] = token_output<T>(args, total, static_cast<int>(at % kTokenOutputs));
  }
}

}  // namespace fastenc::cuda
