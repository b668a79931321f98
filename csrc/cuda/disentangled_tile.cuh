// The position terms of a tile of scores: x_r . table[d] for rows, y_c . table[d] for columns.
// ../common/disentangled_tiles.h says what a place, a band and its ring are.
#pragma once

#include "attention_tile.cuh"
#include "disentangled_args.cuh"

namespace fastenc::cuda {

// The table rows of the places [0, places) of a tile, into the band's ring.
template <int kWidth, typename T>
__device__ __forceinline__ void load_band(T* band, const HeadRows& table, int head, int places,
                                          int32_t base, int sign, int turn,
                                          const PositionArgs& positions, int head_dim,
                                          bool vectors) {
  using Shape = DisentangledShape<sizeof(T), kWidth>;
  constexpr int kStep = kVector<T>;
  constexpr int kChunks = kWidth / kStep;
#pragma unroll 2
  for (int i = threadIdx.x; i < places * kChunks; i += kAttentionThreads) {
    const int place = i / kChunks, column = i % kChunks * kStep;
    const int32_t distance = place_distance(base, sign, place, Shape::kColumns);
    const int32_t at = clamped_distance(0, distance, positions.radius) + positions.radius;
    const int32_t row = positions.index[at];
    const T* from = table.template at<T>(row < 0                 ? 0
                                         : row >= positions.size ? positions.size - 1
                                                                 : row,
                                         head);
    T* to = band + ring_row(place, turn, Shape::kBand) * Shape::kPitch + column;
    const bool inside = column < head_dim;
    if (vectors) {
      cp_async_16(to, inside ? from + column : from, inside);
    } else {
#pragma unroll 1
      for (int j = 0; j < kStep; ++j) {
        to[j] = column + j < head_dim ? from[column + j] : narrow<T>(0.0f);
      }
    }
  }
}

// acc (16, 16 kBlocks) = left (16, kWidth) band^T, from the place `first` on, a multiple of 16.
template <int kBlocks, int kWidth, typename T, bool kHeld>
__device__ __forceinline__ void multiply_band(float (&acc)[2 * kBlocks][4],
                                              const LeftRows<T, kWidth, kHeld>& left, const T* band,
                                              int first, int turn) {
  using Shape = DisentangledShape<sizeof(T), kWidth>;
  constexpr int kPitch = Shape::kPitch;
  const int matrix = lane_id() / 8;
  const int own = sizeof(T) == 2 ? (matrix / 2 * 8 + lane_id() % 8) * kPitch + matrix % 2 * 8
                                 : pair_column() * kPitch;
  const T* rows[kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    rows[b] = band + ring_row(first + b * kPlaceBlock, turn, Shape::kBand) * kPitch + own;
  }
  clear(acc);
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      uint32_t a[4];
      left.fragment(k, a);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        uint32_t b[4];
        ldmatrix_x4<false>(b, rows[n] + k * 16);
        mma_m16n8k16<T>(acc[2 * n], a, b[0], b[1]);
        mma_m16n8k16<T>(acc[2 * n + 1], a, b[2], b[3]);
      }
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < kWidth; k += 4) {
      float upper[4], lower[4];
      left.at(k, upper, lower);
#pragma unroll
      for (int n = 0; n < 2 * kBlocks; ++n) {
        float first_row[4], second_row[4];
        load<4>(rows[n / 2] + n % 2 * 8 * kPitch + k, first_row);
        load<4>(rows[n / 2] + (n % 2 * 8 + 1) * kPitch + k, second_row);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[n][0] = fmaf(upper[i], first_row[i], acc[n][0]);
          acc[n][1] = fmaf(upper[i], second_row[i], acc[n][1]);
          acc[n][2] = fmaf(lower[i], first_row[i], acc[n][2]);
          acc[n][3] = fmaf(lower[i], second_row[i], acc[n][3]);
        }
      }
    }
  }
}

// A scale that cannot wait for the exponential, since it is not positive.
template <int kTiles>
__device__ __forceinline__ void scale_all(float (&s)[kTiles][4], float factor) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] *= factor;
    }
  }
}

// s[r][c] += x_r . table[place(r, c)] for this warp's rows; `stage`: this warp's own.
template <int kWidth, typename T, bool kHeld, int kTiles>
__device__ __forceinline__ void add_row_term(float (&s)[kTiles][4],
                                             const LeftRows<T, kWidth, kHeld>& rows, const T* band,
                                             int turn, float* stage) {
  using Shape = DisentangledShape<sizeof(T), kWidth>;
  constexpr int kPitch = Shape::kRowPitch;
  float acc[2 * Shape::kRowBlocks][4];
  multiply_band<Shape::kRowBlocks, kWidth>(acc, rows, band, warp_id() * 16, turn);
  float* to = stage + group_id() * kPitch + pair_column();
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 2 * Shape::kRowBlocks; ++n) {
    *reinterpret_cast<float2*>(to + n * 8) = {acc[n][0], acc[n][1]};
    *reinterpret_cast<float2*>(to + 8 * kPitch + n * 8) = {acc[n][2], acc[n][3]};
  }
  __syncwarp();
  const float* from = stage + group_id() * (kPitch + 1) - pair_column() + Shape::kColumns - 1;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] += from[i / 2 * 8 * (kPitch + 1) - n * 8 - i % 2];
    }
  }
  __syncwarp();
}

// The products of the tile's columns with what they meet of the band, for add_column_term() after a
// barrier; the warps share them.
template <int kWidth, typename T>
__device__ __forceinline__ void stage_column_term(const T* columns, const T* band, int turn,
                                                  float* stage) {
  using Shape = DisentangledShape<sizeof(T), kWidth>;
  constexpr int kBlocks = Shape::kPartBlocks;
  const int group = warp_id() % Shape::kGroups, own = warp_id() / Shape::kGroups * kBlocks;
  if (own >= Shape::kColumnBlocks) {
    return;
  }
  // The last part begins earlier than its own, to be as long as the others.
  const int first = static_cast<int>(smaller(own, Shape::kColumnBlocks - kBlocks));
  const LeftRows<T, kWidth, false> left(columns + group * 16 * Shape::kPitch, Shape::kPitch);
  float acc[2 * kBlocks][4];
  multiply_band<kBlocks, kWidth>(acc, left, band,
                                 Shape::kColumns - 16 - 16 * group + first * kPlaceBlock, turn);
  float* to =
      stage + (group * 16 + group_id()) * Shape::kColumnPitch + first * kPlaceBlock + pair_column();
#pragma unroll
  for (int n = 0; n < 2 * kBlocks; ++n) {
    if (first + n / 2 >= own) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[i / 2 * 8 * Shape::kColumnPitch + n * 8 + i % 2] = acc[n][i];
      }
    }
  }
}

// s[r][c] += y_c . table[place(r, c)].
template <int kWidth, typename T, int kTiles>
__device__ __forceinline__ void add_column_term(float (&s)[kTiles][4], const float* stage) {
  constexpr int kPitch = DisentangledShape<sizeof(T), kWidth>::kColumnPitch;
  const float* from = stage + pair_column() * (kPitch - 1) + warp_id() * 16 + group_id() + 15;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Column 8 n + 2 t + i is number 8 (n % 2) + 2 t + i of its group.
      s[n][i] += from[(n * 8 + i % 2) * kPitch - n % 2 * 8 - i % 2 + i / 2 * 8];
    }
  }
}

}  // namespace fastenc::cuda
