// The gradients of disentangled attention's position tables, from what disentangled_bwd.cuh adds up
// by distance.
#pragma once

#include "disentangled_tile.cuh"

namespace fastenc::cuda {

// The gradient of one row of a position table, from the sums by distance: block (row, head), a lane
// for every 32nd column, eight warps for every eighth distance; always in the same order.
constexpr int kTableSlices = 8;

template <typename T, int kWidth>
__global__ __launch_bounds__(kWarp* kTableSlices) void disentangled_table_kernel(
    const float* __restrict__ partials, T* __restrict__ out,
    const __grid_constant__ DisentangledGradArgs call) {
  const AttentionArgs& args = call.grads.forward;
  const PositionArgs& positions = call.positions;
  const int head = blockIdx.x % args.heads, row = blockIdx.x / args.heads;
  const int count = call.rows.count();
  const int64_t stride = int64_t{args.heads} * count * kWidth;
  float sums[kWidth / kWarp];
#pragma unroll
  for (int c = 0; c < kWidth / kWarp; ++c) {
    sums[c] = 0.0f;
  }
  for (int at = warp_id(); at < count; at += kTableSlices) {
    const int32_t entry =
        positions.index[clamped_distance(0, call.rows.distance(at), positions.radius) +
                        positions.radius];
    if ((entry < 0 ? 0 : entry >= positions.size ? positions.size - 1 : entry) != row) {
      continue;
    }
    const float* from = partials + (int64_t{head} * count + at) * kWidth + lane_id();
    for (int split = 0; split < call.splits; ++split, from += stride) {
#pragma unroll
      for (int c = 0; c < kWidth / kWarp; ++c) {
        sums[c] += from[c * kWarp];
      }
    }
  }
  float* shared = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int c = 0; c < kWidth / kWarp; ++c) {
    shared[warp_id() * kWidth + c * kWarp + lane_id()] = sums[c];
  }
  __syncthreads();
  for (int column = threadIdx.x; column < args.head_dim; column += kWarp * kTableSlices) {
    float sum = 0.0f;
    for (int slice = 0; slice < kTableSlices; ++slice) {
      sum += shared[slice * kWidth + column];
    }
    out[(int64_t{head} * positions.size + row) * args.head_dim + column] =
        narrow<T>(sum * call.grads.scale);
  }
}

}  // namespace fastenc::cuda
