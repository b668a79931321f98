// What the device code of both directions of add_layer_norm shares.
#pragma once

#include "vectors.cuh"

namespace fastenc::cuda {

constexpr int kMaxWarps = kMaxRowThreads / kWarp;

// The sum over a block, on every thread, warps added in order.
__device__ __forceinline__ float block_sum(float x, float (&partial)[kMaxWarps]) {
  x = warp_sum(x);
  __syncthreads();  // the last use of partial is over
  if (threadIdx.x % kWarp == 0) {
    partial[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < blockDim.x / kWarp; ++w) {
    sum += partial[w];
  }
  return sum;
}

}  // namespace fastenc::cuda
