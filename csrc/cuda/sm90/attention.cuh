// What the Hopper attention kernels do to tiles: load by boxes, rotate, clear, softmax, store.
#pragma once

#include "../../common/hopper_tiles.h"
#include "../attention_args.cuh"
#include "../mma.cuh"
#include "swizzle.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Device bodies are compiled for sm_90a only; elsewhere the kernels are empty and never chosen.
#if defined(FASTENC_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTENC_SM90
#endif

namespace fastenc::cuda::sm90 {

__device__ __forceinline__ unsigned char* aligned_shared() {
#ifdef FASTENC_EMULATE
  return ::emulator::machine().shared;
#else
  extern __shared__ __align__(kHopperAlignment) unsigned char hopper_memory[];
  return hopper_memory;
#endif
}

// A value that the compiler must not take out of the loop around it: what follows from it is the
// same for every head, and would not fit into the registers.
__device__ __forceinline__ int opaque(int x) {
#ifndef FASTENC_EMULATE
  asm volatile("" : "+r"(x));
#endif
  return x;
}

__device__ __forceinline__ int thread_id() { return opaque(static_cast<int>(threadIdx.x)); }

// Row (0 .. 63) and first column of this thread's accumulators within its warpgroup.
__device__ __forceinline__ int group_row() {
  const int thread = threadIdx.x;
  return thread % kGroupThreads / 32 * 16 + thread % 32 / 4;
}
__device__ __forceinline__ int pair_of_lane() { return thread_id() % 4 * 2; }

// Of the block; the same in all threads of a warpgroup, and the compiler knows.
__device__ __forceinline__ int group_id() {
  const int group = thread_id() / kGroupThreads;
#ifdef FASTENC_EMULATE
  return group;
#else
  return __shfl_sync(0xffffffffu, group, 0);
#endif
}

// A block's tile in shared memory, for kernels whose registers are full.
struct KeptTile {
  int start, length, first, last_head;
};

__device__ __forceinline__ AttentionTile reread(const volatile KeptTile& kept) {
  return {0, kept.start, kept.length, kept.first};
}
__device__ __forceinline__ int last(const volatile KeptTile& kept) { return kept.last_head; }

template <int kFirst, int kCount, int kTiles>
__device__ __forceinline__ float (&part(float (&d)[kTiles][4])) [kCount][4] {
  static_assert(kFirst + kCount <= kTiles);
  return reinterpret_cast<float (&)[kCount][4]>(d[kFirst]);
}

// ---- loads --------------------------------------------------------------------------------------

template <int kRows>
__device__ __forceinline__ int boxes_inside(int first, int length) {
  int count = 0;
#pragma unroll
  for (int box = 0; box < kRows / kBoxRows; ++box) {
    count += box_is_inside(first, box, length);
  }
  return count;
}

// By one thread: the boxes of a tile, from row `first` of the sequence on, that hold any of its
// rows. What they hold of other sequences is for the caller to mask.
template <typename Tile>
__device__ __forceinline__ void load_rows(unsigned char* tile, const TensorMap& map,
                                          uint64_t* barrier, int head, const AttentionTile& where,
                                          int first) {
#pragma unroll
  for (int box = 0; box < Tile::kRowCount / kBoxRows; ++box) {
    if (box_is_inside(first, box, where.length)) {
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        tma_load(tile + panel * Tile::kPanelBytes + box * kBoxRows * Tile::kRowBytes, map, barrier,
                 panel * Tile::kRowBytes / 2, head, where.start + first + box * kBoxRows);
      }
    }
  }
}

// cos and sin of positions first .. first + kRows - 1, in spread_row order: what `rotate` reads.
template <int kHeadDim, int kRows, int kThreads, typename T>
__device__ __forceinline__ void stage_rotation(T* cos, T* sin, const AttentionArgs& args, int first,
                                               int length) {
  constexpr int kChunks = kHeadDim / 16;
#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int position = first + spread_row(i / kChunks);
    if (position >= 0 && position < length) {
      const int64_t at = static_cast<int64_t>(position) * kChunks + i % kChunks;
      reinterpret_cast<uint4*>(cos)[i] = static_cast<const uint4*>(args.cos.data)[at];
      reinterpret_cast<uint4*>(sin)[i] = static_cast<const uint4*>(args.sin.data)[at];
    }
  }
}

// 8 elements of the first half of a row and the same ones of the second.
template <Space kTo = kShared, typename T>
__device__ __forceinline__ void rotate_chunk(const T* low, const T* high, T* to_low, T* to_high,
                                             const T* cos, const T* sin) {
  float a[8], b[8], c[8], s[8], turned_a[8], turned_b[8];
  load<8>(low, a);
  load<8>(high, b);
  load<8>(cos, c);
  load<8>(sin, s);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    turned_a[j] = fmaf(-b[j], s[j], a[j] * c[j]);
    turned_b[j] = fmaf(a[j], s[j], b[j] * c[j]);
  }
  store<8, kTo>(to_low, turned_a);
  store<8, kTo>(to_high, turned_b);
}

// Rotates the rows of a tile in place; its row 0 is row `first` of the sequence and row `offset` of
// the tables (a multiple of 8). sign = -1 rotates back.
template <typename T, typename Tile, int kThreads>
__device__ __forceinline__ void rotate(unsigned char* tile, const T* cos, const T* sin, int offset,
                                       int first, int length) {
  constexpr int kChunks = Tile::kChunks / 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kRowCount * kChunks; i += kThreads) {
    const int slot = i / kChunks, chunk = i % kChunks;
    const int row = spread_row(slot);
    if (first + row < 0 || first + row >= length) {
      continue;
    }
    T* low = reinterpret_cast<T*>(tile + Tile::chunk_offset(row, chunk));
    T* high = reinterpret_cast<T*>(tile + Tile::chunk_offset(row, chunk + kChunks));
    const int at = ((offset + slot) * kChunks + chunk) * 8;
    rotate_chunk(low, high, low, high, cos + at, sin + at);
  }
}

// A warpgroup's own 64 rows from tile row `own` on, tables from global memory.
template <typename T, typename Tile>
__device__ __forceinline__ void rotate_own_rows(unsigned char* tile, int own,
                                                const AttentionArgs& args, int first, int length) {
  constexpr int kChunks = Tile::kChunks / 2;
#pragma unroll 1
  for (int i = threadIdx.x % kGroupThreads; i < kGroupRows * kChunks; i += kGroupThreads) {
    const int row = own + spread_row(i / kChunks), chunk = i % kChunks;
    if (first + row < length) {
      T* low = reinterpret_cast<T*>(tile + Tile::chunk_offset(row, chunk));
      T* high = reinterpret_cast<T*>(tile + Tile::chunk_offset(row, chunk + kChunks));
      const int64_t at = static_cast<int64_t>(first + row) * (kChunks * 8) + chunk * 8;
      rotate_chunk(low, high, low, high, static_cast<const T*>(args.cos.data) + at,
                   static_cast<const T*>(args.sin.data) + at);
    }
  }
}

// Zeros the rows outside of the sequence: a weight of 0 does not undo another sequence's NaN.
template <typename Tile, int kThreads>
__device__ __forceinline__ void clear_outside(unsigned char* tile, int first, int length,
                                              int thread = threadIdx.x) {
#pragma unroll 1
  for (int i = thread; i < Tile::kRowCount * Tile::kChunks; i += kThreads) {
    const int row = first + i / Tile::kChunks;
    if (row < 0 || row >= length) {
      void* at = tile + Tile::chunk_offset(i / Tile::kChunks, i % Tile::kChunks);
      store_word<kShared>(static_cast<uint4*>(at), uint4{0, 0, 0, 0});
    }
  }
}

// ---- softmax ------------------------------------------------------------------------------------

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Of rows group_row() and group_row() + 8: the largest score times scale_log2, and the sum of
// 2^(score scale_log2 - largest). A row that sees nothing has sum 0.
struct RowStatistics {
  float largest[2], sum[2];
};

// Scores to weights 2^(score scale_log2 - largest), rounded, as the left operands of the products
// that follow, 16 columns each. Whole rows, so that nothing is rescaled later. From step kFirst to
// the last, then from there down to the first: weights then take registers of scores that are gone,
// and 128 are enough (ptxas 13.0 spills in most other orders).
template <typename T, int kFirst, int kTiles>
__device__ __forceinline__ RowStatistics softmax(uint32_t (&p)[kTiles / 2][4],
                                                 float (&s)[kTiles][4], float scale_log2) {
  RowStatistics rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = s[0][half * 2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      largest = fmaxf(largest, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    }
    largest = quad_max(largest);
    rows.largest[half] = largest == -INFINITY ? 0.0f : largest * scale_log2;
    rows.sum[half] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kTiles / 2; ++step) {
    const int k = step < kTiles / 2 - kFirst ? step + kFirst : kTiles / 2 - 1 - step;
#pragma unroll
    for (int n = 2 * k; n < 2 * k + 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = fast_exp2(fmaf(s[n][half * 2], scale_log2, -rows.largest[half]));
        const float high = fast_exp2(fmaf(s[n][half * 2 + 1], scale_log2, -rows.largest[half]));
        rows.sum[half] += low + high;
        p[k][n % 2 * 2 + half] = pack_pair<T>(low, high);
      }
    }
  }
  rows.sum[0] = quad_sum(rows.sum[0]);
  rows.sum[1] = quad_sum(rows.sum[1]);
  return rows;
}

// Accumulators, rounded, as the left operands of the products that follow.
template <typename T, int kTiles>
__device__ __forceinline__ void pack_left(uint32_t (&p)[kTiles / 2][4],
                                          const float (&s)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      p[n / 2][n % 2 * 2 + half] = pack_pair<T>(s[n][half * 2], s[n][half * 2 + 1]);
    }
  }
}

// ---- stores -------------------------------------------------------------------------------------

// The four lanes of a quad hold word `lane` of each of four 16-byte chunks: afterwards lane i holds
// chunk i.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if ((j & step) == 0) {
        const uint32_t sent = upper ? x[j] : x[j + step];
        const uint32_t came = __shfl_xor_sync(0xffffffffu, sent, step);
        x[j] = upper ? came : x[j];
        x[j + step] = upper ? x[j + step] : came;
      }
    }
  }
}

// Accumulators (64, head_dim) times factor[half] to rows first .. of a sequence, those before
// `last` only; 16 bytes a thread, 64 a quad.
template <typename T, int kTiles>
__device__ __forceinline__ void store_accumulators(const float (&o)[kTiles][4],
                                                   const float (&factor)[2], const HeadRows& to,
                                                   int head, int start, int first, int last) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + group_row() + half * 8;
#pragma unroll
    for (int n = 0; n < kTiles; n += 4) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[j] =
            pack_pair<T>(o[n + j][half * 2] * factor[half], o[n + j][half * 2 + 1] * factor[half]);
      }
      transpose_quad(x);
      if (row < last) {
        T* at = to.at<T>(static_cast<int64_t>(start) + row, head) + (n + threadIdx.x % 4) * 8;
        __stwb(reinterpret_cast<uint4*>(at), uint4{x[0], x[1], x[2], x[3]});
      }
    }
  }
}

// Back through the rotation, in registers. row_at(half): where the tables of row
// group_row() + 8 half begin.
template <typename T, int kTiles, typename RowAt>
__device__ __forceinline__ void rotate_back(float (&d)[kTiles][4], const T* cos, const T* sin,
                                            const RowAt& row_at) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto row = row_at(half);
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      const auto at = row + n * 8 + pair_of_lane();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float c = widen<T>(cos[at + i]), s = widen<T>(sin[at + i]);
        const float a = d[n][half * 2 + i], b = d[n + kTiles / 2][half * 2 + i];
        d[n][half * 2 + i] = fmaf(b, s, a * c);
        d[n + kTiles / 2][half * 2 + i] = fmaf(-a, s, b * c);
      }
    }
  }
}

// Output and log-sum-exp (natural) of a warpgroup's rows.
template <typename T, int kTiles>
__device__ __forceinline__ void store_rows(const float (&o)[kTiles][4], const RowStatistics& rows,
                                           const AttentionArgs& args, int head,
                                           const AttentionTile& tile, int first_query) {
  constexpr float kLn2 = 0.693147181f;
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_query + group_row() + half * 8;
    factor[half] = rows.sum[half] == 0.0f ? 0.0f : 1.0f / rows.sum[half];
    if (threadIdx.x % 4 == 0 && row < tile.length) {
      args.lse[head * args.total_tokens + tile.start + row] =
          rows.sum[half] == 0.0f ? -INFINITY : (rows.largest[half] + log2f(rows.sum[half])) * kLn2;
    }
  }
  store_accumulators<T>(o, factor, args.out, head, tile.start, first_query, tile.length);
}

}  // namespace fastenc::cuda::sm90
