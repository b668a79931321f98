// Scores of spans against labels, forward. A block takes 64 spans of one sequence and up to 64
// labels; R passes in chunks of 64.
#pragma once

#include "span_rows.cuh"

namespace fastenc::cuda {

// Grid: (slots of span rows, label blocks).
template <typename T, int V, int kLabels>
__global__ __launch_bounds__(kSpanThreads, kSpanBlocks) void span_score_fwd_kernel(
    const __grid_constant__ SpanArgs args, T* __restrict__ out) {
  const AttentionTile tile =
      locate_tile(args.cu_words, args.num_seqs, blockIdx.x, kSpanRows, args.max_width);
  if (tile.first >= tile.length) {
    return;
  }
  const int first_label = blockIdx.y * kLabels;
  const float* logits = staged_logits<kLabels, V, T>(args, tile, first_label);
  const int64_t first_row = int64_t{tile.start} * args.max_width + tile.first;
  for (int i = threadIdx.x; i < kSpanRows * kLabels; i += kSpanThreads) {
    const int row = i / kLabels, label = i % kLabels;
    if (tile.first + row < tile.length && first_label + label < args.label_count) {
      const Span span = span_of_row(tile.first + row, tile.length, args.max_width);
      out[(first_row + row) * args.label_count + first_label + label] =
          narrow<T>(span.exists ? logits[row * kLogitPitch<kLabels> + label] : -INFINITY);
    }
  }
}

}  // namespace fastenc::cuda
