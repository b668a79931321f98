// Gradients of span_score. Both kernels make again what they need of the spans, and each gradient
// is the sum of one block, always in the same order.
//
//   words    d(i, j, r) = (sum_c g(i, j, c) label(c, r)) keep (start_i + end_j > 0), summed over
//            the spans that begin (dstart) or end (dend) at a word: a block takes as many words as
//            fill 64 rows, and 64 elements of R;
//   labels   dlabel(c, r) = sum_spans g(span, c) row(span, r): a block takes a sequence, 64 labels
//            and 64 elements of R, and walks over the sequence's spans.
#pragma once

#include "span_rows.cuh"

namespace fastenc::cuda {

// kRows gradient rows, 64 labels from `first_label` on. span(row): the span of a row, and the
// packed row of its word.
template <typename T, typename F>
__device__ __forceinline__ void load_logit_grads(T* tile_rows, const T* grad, const SpanArgs& args,
                                                 int32_t start, int first_label, F&& span_of) {
  for (int i = threadIdx.x; i < kSpanRows * kSpanChunk; i += kSpanThreads) {
    const int row = i / kSpanChunk, label = i % kSpanChunk;
    const Span span = span_of(row);
    const bool inside = span.exists && first_label + label < args.label_count;
    const int64_t at = (int64_t{start} + span.word) * args.max_width + span.width;
    tile_rows[row * kSpanPitch<T> + label] =
        inside ? grad[at * args.label_count + first_label + label] : narrow<T>(0.0f);
  }
}

constexpr int words_of_tile(int max_width) {
  return max_width >= kSpanRows ? 1 : kSpanRows / max_width;
}

template <typename T>
constexpr int kSpanWordBytes =
    2 * kSpanRows * kSpanPitch<T> * static_cast<int>(sizeof(T)) + kSpanRows * (kSpanChunk + 2) * 4;

// Grid: (slots of `words_of_tile` words, chunks of R). kEnds: dend, else dstart.
template <typename T, int V, bool kEnds>
__global__ __launch_bounds__(kSpanThreads) void span_words_bwd_kernel(
    const __grid_constant__ SpanArgs args, const T* __restrict__ grad, T* __restrict__ out,
    int words) {
  const AttentionTile tile = locate_tile(args.cu_words, args.num_seqs, blockIdx.x, words);
  if (tile.first >= tile.length) {
    return;
  }
  T* grads = reinterpret_cast<T*>(dynamic_shared());
  T* labels = grads + kSpanRows * kSpanPitch<T>;
  float* products = reinterpret_cast<float*>(labels + kSpanRows * kSpanPitch<T>);
  constexpr int kProductPitch = kSpanChunk + 2;
  const int chunk = blockIdx.y * kSpanChunk;
  const int depth = static_cast<int>(smaller(kSpanRows, args.max_width));  // rows of a word
  const uint64_t seed = span_seed<T>(args);
  float carried = 0.0f;  // from one step of widths to the next; a tile of several words has one
  for (int first_width = 0; first_width < args.max_width; first_width += kSpanRows) {
    const auto span_of = [&](int row) -> Span {
      const int anchor = tile.first + row / depth, width = first_width + row % depth;
      const int word = kEnds ? anchor - width : anchor;
      return {word, width,
              row < words * depth && anchor < tile.length && width < args.max_width && word >= 0 &&
                  word + width < tile.length};
    };
    float acc[kSpanChunk / 8][4];
    clear(acc);
    for (int first = 0; first < args.label_count; first += kSpanChunk) {
      __syncthreads();
      load_logit_grads(grads, grad, args, tile.start, first, span_of);
      load_labels<kSpanRows, V>(labels, args, tile.seq, first, chunk);
      __syncthreads();
      const LeftRows<T, kSpanChunk, false> rows(grads + warp_id() * 16 * kSpanPitch<T>,
                                                kSpanPitch<T>);
      multiply_rows<kSpanChunk, kSpanChunk>(acc, rows, labels, kSpanPitch<T>);
    }
    stage_rows<kSpanChunk>(products + warp_id() * 16 * kProductPitch, kProductPitch, acc, 1.0f,
                           1.0f);
    __syncthreads();
    const bool last = first_width + kSpanRows >= args.max_width;
#pragma unroll 1
    for (int item = threadIdx.x; item < words * kSpanChunk; item += kSpanThreads) {
      const int word = item / kSpanChunk, local = item % kSpanChunk, column = chunk + local;
      if (tile.first + word >= tile.length || column >= args.size) {
        continue;
      }
      float sum = carried;
#pragma unroll 1
      for (int row = word * depth; row < (word + 1) * depth; ++row) {
        const Span span = span_of(row);
        if (!span.exists) {
          continue;
        }
        const int64_t from = tile.start + span.word;
        float a[1], b[1];
        load<1>(static_cast<const T*>(args.start) + from * args.size + column, a);
        load<1>(static_cast<const T*>(args.end) + (from + span.width) * args.size + column, b);
        float kept[1] = {a[0] + b[0] > 0.0f ? products[row * kProductPitch + local] : 0.0f};
        if (args.drop_below) {
          drop_elements<1>(kept, args, column, from, span.width, seed);
        }
        sum += kept[0];
      }
      if (last) {
        out[(int64_t{tile.start} + tile.first + word) * args.size + column] =
            narrow<T>(sum * args.keep_scale);
      } else {
        carried = sum;
      }
    }
    __syncthreads();
  }
}

template <typename T>
constexpr int kSpanLabelBytes = 2 * kSpanRows * kSpanPitch<T> * static_cast<int>(sizeof(T));

// Grid: (sequences, chunks of R, blocks of 64 labels).
template <typename T, int V>
__global__ __launch_bounds__(kSpanThreads) void span_labels_bwd_kernel(
    const __grid_constant__ SpanArgs args, const T* __restrict__ grad, T* __restrict__ dlabels,
    T* __restrict__ dbias) {
  T* grads = reinterpret_cast<T*>(dynamic_shared());
  T* rows = grads + kSpanRows * kSpanPitch<T>;
  const int32_t seq = blockIdx.x, start = args.cu_words[seq];
  const int32_t length = (args.cu_words[seq + 1] - start) * args.max_width;
  const int chunk = blockIdx.y * kSpanChunk, first_label = blockIdx.z * kSpanRows;
  const uint64_t seed = span_seed<T>(args);
  float acc[kSpanChunk / 8][4], bias = 0.0f;
  clear(acc);
  for (int first = 0; first < length; first += kSpanRows) {
    __syncthreads();
    load_logit_grads(grads, grad, args, start, first_label,
                     [&](int row) { return span_of_row(first + row, length, args.max_width); });
    make_span_rows<V>(rows, args, AttentionTile{seq, start, length, first}, first, chunk, seed);
    __syncthreads();
    multiply_columns<kSpanChunk, kSpanRows>(acc, grads + warp_id() * 16, rows, kSpanPitch<T>,
                                            kSpanPitch<T>);
    if (chunk == 0 && threadIdx.x < kSpanRows) {
      for (int row = 0; row < kSpanRows; ++row) {
        bias += widen<T>(grads[row * kSpanPitch<T> + threadIdx.x]);
      }
    }
  }
  const int64_t base = static_cast<int64_t>(seq) * args.label_count;
#pragma unroll
  for (int n = 0; n < kSpanChunk / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int label = first_label + warp_id() * 16 + group_id() + i / 2 * 8;
      const int column = chunk + n * 8 + pair_column() + i % 2;
      if (label < args.label_count && column < args.size) {
        dlabels[(base + label) * args.size + column] = narrow<T>(acc[n][i] * args.keep_scale);
      }
    }
  }
  if (chunk == 0 && threadIdx.x < kSpanRows && first_label + threadIdx.x < args.label_count) {
    dbias[base + first_label + threadIdx.x] = narrow<T>(bias);
  }
}

}  // namespace fastenc::cuda
