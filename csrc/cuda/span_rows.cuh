// Rows of spans, relu(start_i + end_j), made where they are multiplied; never in global memory.
#pragma once

#include "../common/attention_tiles.h"
#include "dropout.cuh"
#include "products.cuh"

namespace fastenc::cuda {

constexpr int kSpanRows = 64;   // spans of a tile, 16 a warp
constexpr int kSpanChunk = 64;  // elements of R in one step
constexpr int kSpanThreads = 128;
constexpr int kSpanBlocks = 4;    // a multiprocessor holds: 128 registers a thread
constexpr uint32_t kSpanTag = 1;  // fastenc/ops/span_score.py

struct SpanArgs {
  const void *start, *end;  // (words, size)
  const void* labels;       // (num_seqs, label_count, size), unit stride in the last
  const void* label_bias;   // (num_seqs, label_count), or null
  int64_t label_seq_stride, label_stride;
  const int32_t* cu_words;
  int32_t num_seqs, size, max_width, label_count;
  int64_t words;
  const int64_t* seed;
  uint32_t drop_below;  // as in AttentionArgs
  float keep_scale;
};

template <typename T>
constexpr int kSpanPitch = kSpanChunk + kVector<T>;

template <typename T>
__device__ __forceinline__ uint64_t span_seed(const SpanArgs& args) {
  return args.drop_below ? static_cast<uint64_t>(*args.seed) : 0;
}

// A span of a sequence: its first word (within the sequence) and how many words follow.
struct Span {
  int32_t word, width;
  bool exists;
};

// Row `row` of a sequence's (words, max_width) spans; `rows` = words * max_width.
__device__ __forceinline__ Span span_of_row(int32_t row, int32_t rows, int32_t max_width) {
  const int32_t word = row / max_width, width = row % max_width;
  return {word, width, row < rows && (word + width) * max_width < rows};
}

template <int V>
__device__ __forceinline__ void drop_elements(float (&x)[V], const SpanArgs& args, int column,
                                              int64_t packed_word, int width, uint64_t seed) {
#pragma unroll
  for (int group = 0; group < (V + 3) / 4; ++group) {
    const PhiloxWords words = philox_words(
        (column >> 2) + group, static_cast<uint32_t>(packed_word), width, kSpanTag, seed);
#pragma unroll
    for (int i = 0; i < (V < 4 ? V : 4); ++i) {
      uint32_t word = words.word[i];
      if constexpr (V == 1) {
        const int at = column & 3;
        word = at == 0   ? words.word[0]
               : at == 1 ? words.word[1]
               : at == 2 ? words.word[2]
                         : words.word[3];
      }
      x[group * 4 + i] = word >= args.drop_below ? x[group * 4 + i] : 0.0f;
    }
  }
}

// 64 rows of spans from `first` on, columns [chunk, chunk + 64), into shared memory; zeros where
// there is no span. Dropout zeros elements; what is kept is scaled after the product.
template <int V, typename T>
__device__ __forceinline__ void make_span_rows(T* rows, const SpanArgs& args,
                                               const AttentionTile& tile, int first, int chunk,
                                               uint64_t seed) {
  constexpr int kVectors = kSpanChunk / V;
  const T* start = static_cast<const T*>(args.start);
  const T* end = static_cast<const T*>(args.end);
#pragma unroll 2
  for (int i = threadIdx.x; i < kSpanRows * kVectors; i += kSpanThreads) {
    const int row = i / kVectors, local = i % kVectors * V, column = chunk + local;
    const Span span = span_of_row(first + row, tile.length, args.max_width);
    float x[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      x[j] = 0.0f;
    }
    if (span.exists && column < args.size) {
      const int64_t word = tile.start + span.word;
      float b[V];
      load<V>(start + word * args.size + column, x);
      load<V>(end + (word + span.width) * args.size + column, b);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float sum = x[j] + b[j];
        x[j] = sum < 0.0f ? 0.0f : sum;  // keeps NaN
      }
      if (args.drop_below) {
        drop_elements<V>(x, args, column, word, span.width, seed);
      }
    }
    store<V, kShared>(rows + row * kSpanPitch<T> + local, x);
  }
}

// kRows label rows from `first` on, columns [chunk, chunk + 64); zeros past the last label and R.
template <int kRows, int V, typename T>
__device__ __forceinline__ void load_labels(T* rows, const SpanArgs& args, int32_t seq, int first,
                                            int chunk) {
  constexpr int kVectors = kSpanChunk / V;
  const T* labels = static_cast<const T*>(args.labels) + seq * args.label_seq_stride;
#pragma unroll 2
  for (int i = threadIdx.x; i < kRows * kVectors; i += kSpanThreads) {
    const int row = i / kVectors, local = i % kVectors * V;
    float x[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      x[j] = 0.0f;
    }
    if (first + row < args.label_count && chunk + local < args.size) {
      load<V>(labels + (first + row) * args.label_stride + chunk + local, x);
    }
    store<V, kShared>(rows + row * kSpanPitch<T> + local, x);
  }
}

// logits (16 of 64 spans, kLabels) of this warp, without bias; `memory`: kSpanRows + kLabels rows.
template <int kLabels, int V, typename T>
__device__ __forceinline__ void span_logits(float (&logits)[kLabels / 8][4], T* memory,
                                            const SpanArgs& args, const AttentionTile& tile,
                                            int first_label) {
  T* labels = memory + kSpanRows * kSpanPitch<T>;
  const uint64_t seed = span_seed<T>(args);
  clear(logits);
  for (int chunk = 0; chunk < args.size; chunk += kSpanChunk) {
    __syncthreads();
    make_span_rows<V>(memory, args, tile, tile.first, chunk, seed);
    load_labels<kLabels, V>(labels, args, tile.seq, first_label, chunk);
    __syncthreads();
    const LeftRows<T, kSpanChunk, false> rows(memory + warp_id() * 16 * kSpanPitch<T>,
                                              kSpanPitch<T>);
    multiply_transposed<kLabels, kSpanChunk>(logits, rows, labels, kSpanPitch<T>);
  }
}

template <int kLabels>
constexpr int kLogitPitch = kLabels + 1;

template <int kLabels, typename T>
constexpr int kSpanLogitBytes =
    (kSpanRows + kLabels) * kSpanPitch<T> * static_cast<int>(sizeof(T)) +
    kSpanRows * kLogitPitch<kLabels> * 4;

// The logits of a tile, scaled and with their bias, as (kSpanRows, kLabels) in shared memory.
template <int kLabels, int V, typename T>
__device__ __forceinline__ const float* staged_logits(const SpanArgs& args,
                                                      const AttentionTile& tile, int first_label) {
  T* memory = reinterpret_cast<T*>(dynamic_shared());
  float* staged = reinterpret_cast<float*>(memory + (kSpanRows + kLabels) * kSpanPitch<T>);
  float logits[kLabels / 8][4];
  span_logits<kLabels, V>(logits, memory, args, tile, first_label);
  const T* bias = static_cast<const T*>(args.label_bias);
  float* own = staged + (warp_id() * 16 + group_id()) * kLogitPitch<kLabels> + pair_column();
#pragma unroll
  for (int n = 0; n < kLabels / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int label = first_label + n * 8 + pair_column() + i % 2;
      const float shift =
          bias != nullptr && label < args.label_count
              ? widen<T>(bias[static_cast<int64_t>(tile.seq) * args.label_count + label])
              : 0.0f;
      own[i / 2 * 8 * kLogitPitch<kLabels> + n * 8 + i % 2] =
          fmaf(logits[n][i], args.keep_scale, shift);
    }
  }
  __syncthreads();
  return staged;
}

}  // namespace fastenc::cuda
