// Spans whose probability for a label is above a threshold: counted, then written where the scan of
// the counts says, in the order of the spans and the labels.
#pragma once

#include "span_rows.cuh"

namespace fastenc::cuda {

struct CandidateOutputs {
  int32_t* counts;  // (words * max_width): of each span's row; then the first index of each
  int64_t *word, *width, *label;
  float* score;
  float threshold;
};

// One pass counts each row's candidates, the other writes them where the scan of the counts says;
// both make the same logits. Grid: slots of span rows.
template <typename T, int V, int kLabels, bool kWrite>
__global__ __launch_bounds__(kSpanThreads, kSpanBlocks) void span_candidates_kernel(
    const __grid_constant__ SpanArgs args, const __grid_constant__ CandidateOutputs outputs) {
  const AttentionTile tile =
      locate_tile(args.cu_words, args.num_seqs, blockIdx.x, kSpanRows, args.max_width);
  if (tile.first >= tile.length) {
    return;
  }
  const int row = threadIdx.x;
  const bool mine = row < kSpanRows && tile.first + row < tile.length;
  const Span span = span_of_row(tile.first + row, tile.length, args.max_width);
  const int64_t at = int64_t{tile.start} * args.max_width + tile.first + row;
  int32_t found = kWrite && mine ? outputs.counts[at] : 0;
  for (int first = 0; first < args.label_count; first += kLabels) {
    const float* logits = staged_logits<kLabels, V, T>(args, tile, first);
    const int labels = static_cast<int>(smaller(kLabels, args.label_count - first));
    for (int label = 0; mine && span.exists && label < labels; ++label) {
      const float score = 1.0f / (1.0f + expf(-logits[row * kLogitPitch<kLabels> + label]));
      if (score > outputs.threshold) {
        if constexpr (kWrite) {
          outputs.word[found] = tile.start + span.word;
          outputs.width[found] = span.width;
          outputs.label[found] = first + label;
          outputs.score[found] = score;
        }
        ++found;
      }
    }
    __syncthreads();
  }
  if (!kWrite && mine) {
    outputs.counts[at] = found;
  }
}

// Exclusive scan of `count` values in place by one block; the sum goes to *total.
constexpr int kScanThreads = 1024;

__global__ __launch_bounds__(kScanThreads) void scan_kernel(int32_t* values, int64_t count,
                                                            int64_t* total) {
  int64_t* sums = reinterpret_cast<int64_t*>(dynamic_shared());
  const int64_t each = ceil_div(count, kScanThreads);
  const int64_t begin = smaller(count, threadIdx.x * each), end = smaller(count, begin + each);
  int64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    sum += values[i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t running = 0;
    for (int i = 0; i < kScanThreads; ++i) {
      const int64_t here = sums[i];
      sums[i] = running;
      running += here;
    }
    *total = running;
  }
  __syncthreads();
  int64_t running = sums[threadIdx.x];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t here = values[i];
    values[i] = static_cast<int32_t>(running);
    running += here;
  }
}

}  // namespace fastenc::cuda
