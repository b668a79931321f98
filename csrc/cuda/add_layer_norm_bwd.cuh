// Residual add + LayerNorm, backward, over (rows, hidden).
//
// Blocks walk the rows with a fixed stride, keep dweight and dbias of their columns in registers
// and write one partial row each; a second kernel adds the partial rows in a fixed order, so the
// result does not depend on timing (on the number of SMs it does: that sets the number of partial
// rows). Rows that do not allow 16-byte accesses, or are very wide, go through a kernel that loops
// over the row.
#pragma once

#include "layer_norm.cuh"

namespace fastenc::cuda {

// partials: (1 or 2, blocks, pitch), dweight's rows, then dbias's if has_bias.
template <typename T, int kElements>
__global__ __launch_bounds__(kMaxRowThreads) void add_layer_norm_bwd_kernel(
    const T* __restrict__ grad_normed, const T* __restrict__ grad_total,
    const T* __restrict__ total, Parameter weight, const float* __restrict__ mean,
    const float* __restrict__ rstd, T* __restrict__ dx, float* __restrict__ partials, bool has_bias,
    int64_t rows, int64_t hidden, int64_t pitch) {
  constexpr int V = kVector<T>, kVectors = kElements / V;
  __shared__ float2 partial[2][kMaxWarps];  // of even and odd rows: one barrier a row
  float w[kVectors][V] = {}, dweight[kVectors][V] = {}, dbias[kVectors][V] = {};
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t column = row_column(threadIdx.x, k, blockDim.x, V);
    if (column < hidden) {
      load(weight, column, w[k]);
    }
  }
  const float inverse = 1.0f / static_cast<float>(hidden);
  int parity = 0;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x, parity ^= 1) {
    const int64_t at = r * hidden;
    const float m = mean[r], s = rstd[r];
    float gw[kVectors][V] = {}, xhat[kVectors][V] = {};
    float2 sums = {0.0f, 0.0f};  // of gw and of gw xhat
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t column = row_column(threadIdx.x, k, blockDim.x, V);
      if (column < hidden) {
        load<V>(grad_normed + at + column, gw[k]);
        load<V>(total + at + column, xhat[k]);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float g = gw[k][i];
          xhat[k][i] = (xhat[k][i] - m) * s;
          dweight[k][i] = fmaf(g, xhat[k][i], dweight[k][i]);
          dbias[k][i] += g;
          gw[k][i] = g * w[k][i];
          sums.x += gw[k][i];
          sums.y = fmaf(gw[k][i], xhat[k][i], sums.y);
        }
      }
    }
    sums = {warp_sum(sums.x), warp_sum(sums.y)};
    if (threadIdx.x % kWarp == 0) {
      partial[parity][threadIdx.x / kWarp] = sums;
    }
    __syncthreads();
    sums = {0.0f, 0.0f};
    for (int warp = 0; warp < blockDim.x / kWarp; ++warp) {
      sums.x += partial[parity][warp].x;
      sums.y += partial[parity][warp].y;
    }
    const float mean_gw = sums.x * inverse, mean_gwx = sums.y * inverse;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t column = row_column(threadIdx.x, k, blockDim.x, V);
      if (column < hidden) {
        float d[V], direct[V] = {};
        if (grad_total != nullptr) {
          load<V>(grad_total + at + column, direct);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
          d[i] = fmaf(gw[k][i] - mean_gw - xhat[k][i] * mean_gwx, s, direct[i]);
        }
        store<V>(dx + at + column, d);
      }
    }
  }
  float* dweight_row = partials + blockIdx.x * pitch;
  float* dbias_row = dweight_row + gridDim.x * pitch;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t column = row_column(threadIdx.x, k, blockDim.x, V);
    if (column < hidden) {
      store<V>(dweight_row + column, dweight[k]);
      if (has_bias) {
        store<V>(dbias_row + column, dbias[k]);
      }
    }
  }
}

// Any width and alignment; a thread adds into its own columns of the block's partial row.
template <typename T>
__global__ __launch_bounds__(kLoopThreads) void add_layer_norm_bwd_loop_kernel(
    const T* __restrict__ grad_normed, const T* __restrict__ grad_total,
    const T* __restrict__ total, Parameter weight, const float* __restrict__ mean,
    const float* __restrict__ rstd, T* __restrict__ dx, float* __restrict__ partials, bool has_bias,
    int64_t rows, int64_t hidden, int64_t pitch) {
  __shared__ float partial[kMaxWarps];
  float* dweight_row = partials + blockIdx.x * pitch;
  float* dbias_row = dweight_row + gridDim.x * pitch;
  const float inverse = 1.0f / static_cast<float>(hidden);
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t at = r * hidden;
    const float m = mean[r], s = rstd[r];
    const bool first = r == blockIdx.x;
    float sum_gw = 0.0f, sum_gwx = 0.0f;
    for (int64_t i = threadIdx.x; i < hidden; i += kLoopThreads) {
      float w[1];
      load(weight, i, w);
      const float g = widen<T>(grad_normed[at + i]);
      const float xhat = (widen<T>(total[at + i]) - m) * s;
      dweight_row[i] = fmaf(g, xhat, first ? 0.0f : dweight_row[i]);
      if (has_bias) {
        dbias_row[i] = first ? g : dbias_row[i] + g;
      }
      sum_gw += g * w[0];
      sum_gwx = fmaf(g * w[0], xhat, sum_gwx);
    }
    const float mean_gw = block_sum(sum_gw, partial) * inverse;
    const float mean_gwx = block_sum(sum_gwx, partial) * inverse;
    for (int64_t i = threadIdx.x; i < hidden; i += kLoopThreads) {
      float w[1];
      load(weight, i, w);
      const float gw = widen<T>(grad_normed[at + i]) * w[0];
      const float xhat = (widen<T>(total[at + i]) - m) * s;
      const float direct = grad_total == nullptr ? 0.0f : widen<T>(grad_total[at + i]);
      dx[at + i] = narrow<T>(fmaf(gw - mean_gw - xhat * mean_gwx, s, direct));
    }
  }
}

// gridDim.y: 0 dweight, 1 dbias.
template <typename W>
__global__
__launch_bounds__(PartialSums::kLanes* PartialSums::kSlices) void add_layer_norm_sum_kernel(
    const float* __restrict__ partials, W* __restrict__ dweight, W* __restrict__ dbias,
    int64_t count, int64_t hidden, int64_t pitch) {
  constexpr int V = PartialSums::kWidth;
  __shared__ float sums[PartialSums::kSlices][PartialSums::kLanes][V];
  const int lane = threadIdx.x % PartialSums::kLanes, slice = threadIdx.x / PartialSums::kLanes;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * PartialSums::kColumns + lane * V;
  const float* rows = partials + blockIdx.y * count * pitch;
  float sum[V] = {};
  if (column < pitch) {
    for (int64_t p = slice; p < count; p += PartialSums::kSlices) {
      float value[V];
      load<V>(rows + p * pitch + column, value);
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
  if (slice == 0) {
    W* out = blockIdx.y == 0 ? dweight : dbias;
    add_slices(sums, lane, PartialSums::kSlices, sum);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (column + i < hidden) {
        out[column + i] = narrow<W>(sum[i]);
      }
    }
  }
}

}  // namespace fastenc::cuda
