// relu(start_i + end_j) of every short span, and its gradients. A block takes a word and walks over
// the columns; the word's own row is read once.
#pragma once

#include "span_rows.cuh"

namespace fastenc::cuda {

constexpr int kPoolThreads = 256;

struct WordPlace {
  int64_t begin, end;  // packed words of the sequence
};

__device__ __forceinline__ WordPlace place_word(const SpanArgs& args, int64_t word) {
  const int64_t seq = find_sequence(args.cu_words, args.num_seqs, word);
  return {args.cu_words[seq], args.cu_words[seq + 1]};
}

template <typename T, int V>
__global__ __launch_bounds__(kPoolThreads) void span_pool_fwd_kernel(
    const __grid_constant__ SpanArgs args, T* __restrict__ out) {
  const int64_t word = blockIdx.x;
  const WordPlace place = place_word(args, word);
  const T* start = static_cast<const T*>(args.start) + word * args.size;
  const T* end = static_cast<const T*>(args.end) + word * args.size;
  T* y = out + word * args.max_width * args.size;
  for (int column = threadIdx.x * V; column < args.size; column += kPoolThreads * V) {
    float a[V];
    load<V>(start + column, a);
#pragma unroll 4
    for (int width = 0; width < args.max_width; ++width) {
      float x[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x[i] = 0.0f;
      }
      if (word + width < place.end) {
        load<V>(end + static_cast<int64_t>(width) * args.size + column, x);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float sum = a[i] + x[i];
          x[i] = sum < 0.0f ? 0.0f : sum;
        }
      }
      store<V>(y + static_cast<int64_t>(width) * args.size + column, x);
    }
  }
}

// Both gradients of a word: as the start of spans, and as the end of others.
template <typename T, int V>
__global__ __launch_bounds__(kPoolThreads) void span_pool_bwd_kernel(
    const __grid_constant__ SpanArgs args, const T* __restrict__ grad, T* __restrict__ dstart,
    T* __restrict__ dend) {
  const int64_t word = blockIdx.x;
  const WordPlace place = place_word(args, word);
  const T* start = static_cast<const T*>(args.start);
  const T* end = static_cast<const T*>(args.end);
  for (int column = threadIdx.x * V; column < args.size; column += kPoolThreads * V) {
    float a[V], b[V], da[V], db[V];
    load<V>(start + word * args.size + column, a);
    load<V>(end + word * args.size + column, b);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      da[i] = db[i] = 0.0f;
    }
    for (int width = 0; width < args.max_width; ++width) {
      float x[V], g[V];
      if (word + width < place.end) {
        load<V>(end + (word + width) * args.size + column, x);
        load<V>(grad + (word * args.max_width + width) * args.size + column, g);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          da[i] += a[i] + x[i] > 0.0f ? g[i] : 0.0f;
        }
      }
      if (word - width >= place.begin) {
        load<V>(start + (word - width) * args.size + column, x);
        load<V>(grad + ((word - width) * args.max_width + width) * args.size + column, g);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          db[i] += x[i] + b[i] > 0.0f ? g[i] : 0.0f;
        }
      }
    }
    store<V>(dstart + word * args.size + column, da);
    store<V>(dend + word * args.size + column, db);
  }
}

}  // namespace fastenc::cuda
