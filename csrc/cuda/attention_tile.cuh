// What the attention kernels do to tiles: load, rotate, mask, drop, store.
#pragma once

#include "../common/attention_tiles.h"
#include "attention_args.cuh"
#include "cp_async.cuh"
#include "dropout.cuh"
#include "products.cuh"

namespace fastenc::cuda {

// kRows rows of `source` into shared memory, zeros past `rows` and past head_dim. Complete after
// cp_async_wait and __syncthreads.
template <int kRows, int kWidth, typename T>
__device__ __forceinline__ void load_tile(T* tile, const T* source, int64_t token_stride, int rows,
                                          int head_dim, bool vectors) {
  constexpr int kPitch = AttentionShape<sizeof(T), kWidth>::kPitch;
  if (vectors) {
    constexpr int kChunks = kWidth / kVector<T>;
#pragma unroll 2
    for (int i = threadIdx.x; i < kRows * kChunks; i += kAttentionThreads) {
      const int row = i / kChunks, column = i % kChunks * kVector<T>;
      const bool inside = row < rows && column < head_dim;
      cp_async_16(tile + row * kPitch + column,
                  inside ? source + row * token_stride + column : source, inside);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kWidth; i += kAttentionThreads) {
    const int row = i / kWidth, column = i % kWidth;
    const bool inside = row < rows && column < head_dim;
    tile[row * kPitch + column] = inside ? source[row * token_stride + column] : narrow<T>(0.0f);
  }
}

template <int kWidth, typename T>
__device__ __forceinline__ void store_tile(const T* tile, T* target, int64_t token_stride, int rows,
                                           int head_dim, bool vectors) {
  constexpr int kPitch = AttentionShape<sizeof(T), kWidth>::kPitch;
  if (vectors) {
    constexpr int kChunks = kWidth / kVector<T>;
#pragma unroll 2
    for (int i = threadIdx.x; i < kAttentionRows * kChunks; i += kAttentionThreads) {
      const int row = i / kChunks, column = i % kChunks * kVector<T>;
      if (row < rows && column < head_dim) {
        *reinterpret_cast<uint4*>(target + row * token_stride + column) =
            *reinterpret_cast<const uint4*>(tile + row * kPitch + column);
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kAttentionRows * kWidth; i += kAttentionThreads) {
    const int row = i / kWidth, column = i % kWidth;
    if (row < rows && column < head_dim) {
      target[row * token_stride + column] = tile[row * kPitch + column];
    }
  }
}

template <int kRows, int kWidth, int V, typename T>
__device__ __forceinline__ void rotate_by(T* tile, int first, int rows, const AttentionArgs& args,
                                          float sign) {
  constexpr int kPitch = AttentionShape<sizeof(T), kWidth>::kPitch;
  constexpr int kChunks = kWidth / 2 / V;
  const int half = args.head_dim / 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kChunks; i += kAttentionThreads) {
    const int row = i / kChunks, column = i % kChunks * V;
    if (row < rows && column < half) {
      float a[V], b[V], c[V], s[V], turned_a[V], turned_b[V];
      T* x = tile + row * kPitch + column;
      load<V>(x, a);
      load<V>(x + half, b);
      const int64_t at = static_cast<int64_t>(first + row) * half + column;
      load<V>(args.cos, at, c);
      load<V>(args.sin, at, s);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float signed_sin = sign * s[j];
        turned_a[j] = fmaf(-b[j], signed_sin, a[j] * c[j]);
        turned_b[j] = fmaf(a[j], signed_sin, b[j] * c[j]);
      }
      store<V, kShared>(x, turned_a);
      store<V, kShared>(x + half, turned_b);
    }
  }
}

// Rotates rows of a tile in shared memory, in place; `first` is the position of its first row.
// sign = -1 rotates back. The caller puts barriers around it.
template <int kRows, int kWidth, typename T>
__device__ __forceinline__ void rotate_tile(T* tile, int first, int rows, const AttentionArgs& args,
                                            float sign = 1.0f) {
  if (args.rotary_vectors) {
    rotate_by<kRows, kWidth, kVector<T>>(tile, first, rows, args, sign);
  } else {
    rotate_by<kRows, kWidth, 1>(tile, first, rows, args, sign);
  }
}

// A block of keys and values from `key` on, `rows` of which exist.
template <int kKeys, int kWidth, typename T>
__device__ __forceinline__ void load_keys(T* keys, T* values, const AttentionArgs& args,
                                          const AttentionTile& tile, int head, int key, int rows) {
  const int64_t first = tile.start + key;
  load_tile<kKeys, kWidth>(keys, args.k.template at<T>(first, head), args.k.token_stride, rows,
                           args.head_dim, args.vectors);
  load_tile<kKeys, kWidth>(values, args.v.template at<T>(first, head), args.v.token_stride, rows,
                           args.head_dim, args.vectors);
}

// A step of the walk over the other side, kBlock rows at a time: on return the block from `at` on
// is in stage `stage`, of two the other one is being filled. `fetch(at, stage)` starts a copy.
template <int kStages, int kBlock, typename Fetch>
__device__ __forceinline__ void await_block(int at, int end, int stage, const Fetch& fetch) {
  if constexpr (kStages == 1) {
    __syncthreads();
    fetch(at, 0);
    cp_async_commit();
  }
  cp_async_wait<0>();
  __syncthreads();
  if constexpr (kStages == 2) {
    if (at + kBlock < end) {
      fetch(at + kBlock, 1 - stage);
    }
    cp_async_commit();
  }
}

// RoPE of what await_block brought.
template <int kRows, int kWidth, typename T>
__device__ __forceinline__ void rotate_block(T* tile, int first, int rows,
                                             const AttentionArgs& args) {
  if (args.cos.data != nullptr) {
    rotate_tile<kRows, kWidth>(tile, first, rows, args);
    __syncthreads();
  }
}

// Rows of scores are queries (forward, dq), or keys (dk and dv, which keep them transposed).
enum class Across { kQueries, kKeys };

// Where a thread's scores lie in their sequence.
template <Across kRowsAre>
struct ScorePlace {
  int row, column;  // of the thread's first element

  __device__ __forceinline__ int query(int n, int i) const {
    return kRowsAre == Across::kQueries ? row + i / 2 * 8 : column + n * 8 + i % 2;
  }
  __device__ __forceinline__ int key(int n, int i) const {
    return kRowsAre == Across::kQueries ? column + n * 8 + i % 2 : row + i / 2 * 8;
  }
};

template <Across kRowsAre>
__device__ __forceinline__ ScorePlace<kRowsAre> place_scores(int first_row, int first_column) {
  return {first_row + warp_id() * 16 + group_id(), first_column + pair_column()};
}

// Scale and bias, where they cannot wait for the exponential.
template <Across kRowsAre, int kTiles>
__device__ __forceinline__ void prescale(float (&s)[kTiles][4], const ScorePlace<kRowsAre>& place,
                                         const AttentionArgs& args, int head) {
  constexpr float kLog2e = 1.44269504f;
  const int64_t middle = static_cast<int64_t>(head) * (2 * args.bias_radius + 1) + args.bias_radius;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float bias[1] = {0.0f};
      if (args.bias.data != nullptr) {
        load<1>(args.bias,
                middle + clamped_distance(place.query(n, i), place.key(n, i), args.bias_radius),
                bias);
      }
      s[n][i] = fmaf(s[n][i], args.scale_log2, bias[0] * kLog2e);
    }
  }
}

template <Across kRowsAre, int kTiles>
__device__ __forceinline__ void mask(float (&s)[kTiles][4], const ScorePlace<kRowsAre>& place,
                                     const AttentionTile& tile, const AttentionArgs& args,
                                     float hidden) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!sees(place.query(n, i), place.key(n, i), tile.length, args.left, args.right)) {
        s[n][i] = hidden;
      }
    }
  }
}

// A step of the online softmax: scores to weights, base 2; `out` is what the keys before added up
// to.
template <int kTiles, int kColumns>
__device__ __forceinline__ void soften_rows(float (&s)[kTiles][4], float (&tops)[2],
                                            float (&sums)[2], float (&out)[kColumns][4],
                                            float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = tops[half];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    }
    top = row_max(top);
    // A row that has seen nothing yet: -inf - -inf would be NaN.
    const float base = top == -INFINITY ? 0.0f : top * factor;
    const float shrink = fast_exp2(fmaf(tops[half], factor, -base));
    tops[half] = top;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      s[n][2 * half] = fast_exp2(fmaf(s[n][2 * half], factor, -base));
      s[n][2 * half + 1] = fast_exp2(fmaf(s[n][2 * half + 1], factor, -base));
      sum += s[n][2 * half] + s[n][2 * half + 1];
    }
    sums[half] = fmaf(sums[half], shrink, sum);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      out[n][2 * half] *= shrink;
      out[n][2 * half + 1] *= shrink;
    }
  }
}

// Its end: what the rows are multiplied by, and their lse.
__device__ __forceinline__ void finish_rows(float (&scale)[2], const float (&tops)[2],
                                            const float (&sums)[2], const AttentionArgs& args,
                                            const AttentionTile& tile, int head) {
  constexpr float kLn2 = 0.693147182f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = row_sum(sums[half]);
    scale[half] = sum == 0.0f ? 0.0f : args.keep_scale / sum;
    const int row = tile.first + warp_id() * 16 + group_id() + half * 8;
    if (lane_id() % 4 == 0 && row < tile.length) {
      // log(sum) by the exact function: this value outlives the kernel.
      const float lse = sum == 0.0f ? -INFINITY : fmaf(tops[half] * args.factor, kLn2, logf(sum));
      args.lse[head * args.total_tokens + tile.start + row] = lse;
    }
  }
}

// The end of a forward tile: its lse and its output, `rows` rows, by way of `stage` (the rows of
// the queries), which is free once every warp is here.
template <int kWidth, typename T>
__device__ __forceinline__ void finish_tile(T* stage, int rows, const float (&out)[kWidth / 8][4],
                                            const float (&tops)[2], const float (&sums)[2],
                                            const AttentionArgs& args, const AttentionTile& tile,
                                            int head) {
  constexpr int kPitch = AttentionShape<sizeof(T), kWidth>::kPitch;
  float scale[2];
  finish_rows(scale, tops, sums, args, tile, head);
  __syncthreads();
  stage_rows<kWidth>(stage + warp_id() * 16 * kPitch, kPitch, out, scale[0], scale[1]);
  __syncthreads();
  store_tile<kWidth>(stage, args.out.at<T>(tile.start + tile.first, head), args.out.token_stride,
                     rows, args.head_dim, args.vectors);
}

// Zeros what dropout drops; what is kept is scaled later. Two neighbouring keys share a counter.
template <int kTiles>
__device__ __forceinline__ void drop(float (&p)[kTiles][4],
                                     const ScorePlace<Across::kQueries>& place, int start, int head,
                                     uint64_t seed, uint32_t drop_below) {
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = start + place.row + half * 8;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int key = place.key(n, 0);
      const PhiloxWords words = philox_words(key >> 2, row, head, 0, seed);
      const bool high = key & 2;
      const bool keep0 = (high ? words.word[2] : words.word[0]) >= drop_below;
      const bool keep1 = (high ? words.word[3] : words.word[1]) >= drop_below;
      // Both halves are written, one of them as it was: an index that is not constant would put
      // the scores into local memory.
      p[n][0] = half == 0 && !keep0 ? 0.0f : p[n][0];
      p[n][1] = half == 0 && !keep1 ? 0.0f : p[n][1];
      p[n][2] = half == 1 && !keep0 ? 0.0f : p[n][2];
      p[n][3] = half == 1 && !keep1 ? 0.0f : p[n][3];
    }
  }
}

// Which of a thread's transposed scores dropout keeps, as bits. Four lanes of one column hold the
// four keys of a counter: each makes the words of one element, and they exchange them.
template <int kTiles>
__device__ __forceinline__ void kept_transposed(uint32_t (&kept)[kTiles],
                                                const ScorePlace<Across::kKeys>& place, int start,
                                                int head, uint64_t seed, uint32_t drop_below) {
  const int mine = group_id() % 4;  // the element whose words this lane makes
  const int word = place.row % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int key = place.row + mine / 2 * 8, query = place.column + n * 8 + mine % 2;
    const PhiloxWords words = philox_words(key >> 2, start + query, head, 0, seed);
    kept[n] = 0;
    uint32_t mask = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      mask |= static_cast<uint32_t>(words.word[w] >= drop_below) << w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int source = (lane_id() & 0x13) | i << 2;  // same column, same four keys, element i
      kept[n] |= (__shfl_sync(0xffffffffu, mask, source) >> word & 1u) << i;
    }
  }
}

}  // namespace fastenc::cuda
