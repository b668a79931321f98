// Products of one warp: 16 rows of the left operand, a tile in shared memory on the right, fp32
// accumulators in the layout of mma_m16n8k16: with group = lane / 4 and t = lane % 4, acc[n] holds
// (group, 8 n + 2 t), (group, 8 n + 2 t + 1) and the same of row group + 8.
//
// 16-bit types multiply on the tensor cores. float multiplies by FMA, one product after the other:
// as exact as any fp32 product, where TF32 would keep 11 bits; its left operand always lies in
// shared memory, since a thread needs whole rows of it.
#pragma once

#include "ldmatrix.cuh"
#include "mma.cuh"
#include "vectors.cuh"

namespace fastenc::cuda {

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int group_id() { return lane_id() / 4; }
__device__ __forceinline__ int pair_column() { return lane_id() % 4 * 2; }

// 16 rows (16, kDepth) of a tile in shared memory; kHeld keeps them in registers.
template <typename T, int kDepth, bool kHeld>
class LeftRows {
 public:
  __device__ __forceinline__ LeftRows(const T* rows, int pitch)
      : rows_(rows + lane_id() % 16 * pitch + lane_id() / 16 * 8) {
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        ldmatrix_x4<false>(held_[k], rows_ + k * 16);
      }
    }
  }
  __device__ __forceinline__ void fragment(int k, uint32_t (&a)[4]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = held_[k][i];
      }
    } else {
      ldmatrix_x4<false>(a, rows_ + k * 16);
    }
  }

 private:
  const T* rows_;
  uint32_t held_[kHeld ? kDepth / 16 : 1][4];
};

template <int kDepth, bool kHeld>
class LeftRows<float, kDepth, kHeld> {
 public:
  __device__ __forceinline__ LeftRows(const float* rows, int pitch)
      : upper_(rows + group_id() * pitch), lower_(upper_ + 8 * pitch) {}
  __device__ __forceinline__ void at(int k, float (&upper)[4], float (&lower)[4]) const {
    load<4>(upper_ + k, upper);
    load<4>(lower_ + k, lower);
  }

 private:
  const float *upper_, *lower_;
};

// acc (16, kColumns) += left (16, kDepth) right^T, right (kColumns, kDepth).
template <int kColumns, int kDepth, typename T, bool kHeld>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kColumns / 8][4],
                                                    const LeftRows<T, kDepth, kHeld>& left,
                                                    const T* right, int pitch) {
  if constexpr (sizeof(T) == 2) {
    const int matrix = lane_id() / 8;
    const T* row = right + (matrix / 2 * 8 + lane_id() % 8) * pitch + matrix % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[4];
      left.fragment(k, a);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4<false>(b, row + n * 16 * pitch + k * 16);
        mma_m16n8k16<T>(acc[2 * n], a, b[0], b[1]);
        mma_m16n8k16<T>(acc[2 * n + 1], a, b[2], b[3]);
      }
    }
  } else {
    const T* row = right + pair_column() * pitch;
#pragma unroll 2
    for (int k = 0; k < kDepth; k += 4) {
      float upper[4], lower[4];
      left.at(k, upper, lower);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        float first[4], second[4];
        load<4>(row + n * 8 * pitch + k, first);
        load<4>(row + (n * 8 + 1) * pitch + k, second);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[n][0] = fmaf(upper[i], first[i], acc[n][0]);
          acc[n][1] = fmaf(upper[i], second[i], acc[n][1]);
          acc[n][2] = fmaf(lower[i], first[i], acc[n][2]);
          acc[n][3] = fmaf(lower[i], second[i], acc[n][3]);
        }
      }
    }
  }
}

// acc (16, kColumns) += left (16, kDepth) right, right (kDepth, kColumns).
template <int kColumns, int kDepth, typename T, bool kHeld>
__device__ __forceinline__ void multiply_rows(float (&acc)[kColumns / 8][4],
                                              const LeftRows<T, kDepth, kHeld>& left,
                                              const T* right, int pitch) {
  if constexpr (sizeof(T) == 2) {
    const int matrix = lane_id() / 8;
    const T* row = right + (matrix % 2 * 8 + lane_id() % 8) * pitch + matrix / 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[4];
      left.fragment(k, a);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4<true>(b, row + k * 16 * pitch + n * 16);
        mma_m16n8k16<T>(acc[2 * n], a, b[0], b[1]);
        mma_m16n8k16<T>(acc[2 * n + 1], a, b[2], b[3]);
      }
    }
  } else {
    const T* column = right + pair_column();
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 4) {
      float upper[4], lower[4];
      left.at(k, upper, lower);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          const float2 b = *reinterpret_cast<const float2*>(column + (k + i) * pitch + n * 8);
          acc[n][0] = fmaf(upper[i], b.x, acc[n][0]);
          acc[n][1] = fmaf(upper[i], b.y, acc[n][1]);
          acc[n][2] = fmaf(lower[i], b.x, acc[n][2]);
          acc[n][3] = fmaf(lower[i], b.y, acc[n][3]);
        }
      }
    }
  }
}

// acc (16, kColumns) += left^T right; left (kDepth, 16 of its columns), right (kDepth, kColumns).
template <int kColumns, int kDepth, typename T>
__device__ __forceinline__ void multiply_columns(float (&acc)[kColumns / 8][4], const T* left,
                                                 const T* right, int left_pitch, int pitch) {
  const int matrix = lane_id() / 8, within = lane_id() % 8;
  if constexpr (sizeof(T) == 2) {
    const T* a_row = left + (matrix / 2 * 8 + within) * left_pitch + matrix % 2 * 8;
    const T* b_row = right + (matrix % 2 * 8 + within) * pitch + matrix / 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[4];
      ldmatrix_x4<true>(a, a_row + k * 16 * left_pitch);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4<true>(b, b_row + k * 16 * pitch + n * 16);
        mma_m16n8k16<T>(acc[2 * n], a, b[0], b[1]);
        mma_m16n8k16<T>(acc[2 * n + 1], a, b[2], b[3]);
      }
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < kDepth; ++k) {
      const float upper = left[k * left_pitch + group_id()];
      const float lower = left[k * left_pitch + group_id() + 8];
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const float2 b =
            *reinterpret_cast<const float2*>(right + k * pitch + n * 8 + pair_column());
        acc[n][0] = fmaf(upper, b.x, acc[n][0]);
        acc[n][1] = fmaf(upper, b.y, acc[n][1]);
        acc[n][2] = fmaf(lower, b.x, acc[n][2]);
        acc[n][3] = fmaf(lower, b.y, acc[n][3]);
      }
    }
  }
}

// acc (16, kColumns) += weights (16, kDepth) right, right (kDepth, kColumns); the weights are
// accumulators of an earlier product, rounded to T. `staging`: for float, 16 rows of shared memory
// of this warp's own.
template <int kColumns, int kDepth, typename T>
__device__ __forceinline__ void multiply(float (&acc)[kColumns / 8][4],
                                         const float (&weights)[kDepth / 8][4], const T* right,
                                         int pitch, float* staging) {
  if constexpr (sizeof(T) == 2) {
    const int matrix = lane_id() / 8;
    const T* row = right + (matrix % 2 * 8 + lane_id() % 8) * pitch + matrix / 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const float (&even)[4] = weights[2 * k];
      const float (&odd)[4] = weights[2 * k + 1];
      const uint32_t a[4] = {pack_pair<T>(even[0], even[1]), pack_pair<T>(even[2], even[3]),
                             pack_pair<T>(odd[0], odd[1]), pack_pair<T>(odd[2], odd[3])};
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4<true>(b, row + k * 16 * pitch + n * 16);
        mma_m16n8k16<T>(acc[2 * n], a, b[0], b[1]);
        mma_m16n8k16<T>(acc[2 * n + 1], a, b[2], b[3]);
      }
    }
  } else {
    constexpr int kStagingPitch = kDepth + 4;
    float* own = staging + group_id() * kStagingPitch + pair_column();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kDepth / 8; ++n) {
      own[n * 8] = weights[n][0];
      own[n * 8 + 1] = weights[n][1];
      own[8 * kStagingPitch + n * 8] = weights[n][2];
      own[8 * kStagingPitch + n * 8 + 1] = weights[n][3];
    }
    __syncwarp();
    multiply_rows<kColumns, kDepth>(acc, LeftRows<float, kDepth, false>(staging, kStagingPitch),
                                    right, pitch);
  }
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&acc)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc[n][i] = 0.0f;
    }
  }
}

// This warp's 16 rows of accumulators as T into shared memory, row r scaled by scale[r / 8].
template <int kColumns, typename T>
__device__ __forceinline__ void stage_rows(T* rows, int pitch, const float (&acc)[kColumns / 8][4],
                                           float upper, float lower) {
  T* own = rows + group_id() * pitch + pair_column();
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    const float x[4] = {acc[n][0] * upper, acc[n][1] * upper, acc[n][2] * lower, acc[n][3] * lower};
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(own + n * 8) = pack_pair<T>(x[0], x[1]);
      *reinterpret_cast<uint32_t*>(own + 8 * pitch + n * 8) = pack_pair<T>(x[2], x[3]);
    } else {
      *reinterpret_cast<float2*>(own + n * 8) = {x[0], x[1]};
      *reinterpret_cast<float2*>(own + 8 * pitch + n * 8) = {x[2], x[3]};
    }
  }
}

// Sum and maximum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace fastenc::cuda
