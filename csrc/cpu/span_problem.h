// What a span-scoring call is, independent of the instruction set: its tensors as pointers and
// strides, the checks that memory safety rests on, and its split into tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/checks.h"
#include "../common/parallel.h"
#include "../common/philox.h"
#include "attention_problem.h"

namespace fastenc::cpu {

// The fourth Philox counter of span dropout; see fastenc/ops/span_score.py.
constexpr int32_t kSpanTag = 1;
// Elements of R in one step; the sums over R are sums of sums of this many.
constexpr int64_t kSpanChunk = 256;
// Row stride of span scratch: off the power of two, so that rows do not share cache sets.
constexpr int64_t kSpanStride = kSpanChunk + 16;
// Spans in one product: a multiple of every tile's rows (16, 12, 8, 6).
constexpr int64_t kSpanRows = 48;
// Labels in one product: with 384 spans, 192 KB of sums.
constexpr int64_t kLabelGroup = 128;

struct SpanProblem {
  int64_t words = 0;
  int64_t num_seqs = 0;
  int64_t max_width = 0;
  int64_t size = 0;    // R
  int64_t labels = 0;  // C, of each sequence
  int64_t label_seq_stride = 0;
  int64_t label_stride = 0;
  const int32_t* cu_words = nullptr;
  const void* start = nullptr;
  const void* end = nullptr;
  const void* label_rows = nullptr;
  const void* label_bias = nullptr;  // (num_seqs, C) contiguous, or null
  Dropout dropout;
  ScalarType dtype = ScalarType::Float;
  std::vector<Tensor> tensors;  // what must stay alive

  int64_t length(int64_t seq) const { return cu_words[seq + 1] - cu_words[seq]; }
  // Spans that begin at word i of a sequence of n words.
  int64_t widths(int64_t i, int64_t n) const { return std::min(max_width, n - i); }

  template <typename T>
  const T* label_row(int64_t seq, int64_t label) const {
    return static_cast<const T*>(label_rows) + seq * label_seq_stride + label * label_stride;
  }
};

inline SpanProblem make_span_problem(const Tensor& start, const Tensor& end, const Tensor& labels,
                                     const Tensor& cu_words, int64_t max_width,
                                     const std::optional<Tensor>& label_bias) {
  SpanProblem p;
  check_dim("start", start, 2);
  p.words = start.size(0);
  p.size = start.size(1);
  p.dtype = start.scalar_type();
  check_shape("end", end, {p.words, p.size});
  check_dtype("end", end, p.dtype);
  p.cu_words = check_cu_seqlens(cu_words, p.words);
  p.num_seqs = cu_words.size(0) - 1;
  STD_TORCH_CHECK(max_width >= 1, "max_width: expected at least 1, got ", max_width);
  p.max_width = max_width;
  check_dim("labels", labels, 3);
  p.labels = labels.size(1);
  check_shape("labels", labels, {p.num_seqs, p.labels, p.size});
  check_dtype("labels", labels, p.dtype);
  const Tensor rows = dense_rows(labels);  // keeps an expanded label set one set
  p.label_seq_stride = rows.stride(0);
  p.label_stride = rows.stride(1);
  p.tensors = {dense(start), dense(end), rows};
  if (label_bias.has_value()) {
    check_shape("label_bias", *label_bias, {p.num_seqs, p.labels});
    check_dtype("label_bias", *label_bias, p.dtype);
    p.tensors.push_back(dense(*label_bias));
    p.label_bias = p.tensors.back().data_ptr();
  }
  p.start = p.tensors[0].data_ptr();
  p.end = p.tensors[1].data_ptr();
  p.label_rows = p.tensors[2].data_ptr();
  return p;
}

template <typename Problem>
inline void set_dropout(Problem* p, double dropout_p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p: expected 0 <= p < 1, got ",
                  dropout_p);
  if (dropout_p > 0.0) {
    STD_TORCH_CHECK(seed.has_value(), "seed: expected a tensor where dropout_p > 0");
    check_dtype("seed", *seed, ScalarType::Long);
    check_numel("seed", *seed, 1);
    p->dropout = Dropout(dropout_p, static_cast<uint64_t>(*data<int64_t>(*seed)));
  }
}

// The spans that begin at words [begin, end) of a sequence.
struct SpanTask {
  int64_t seq;
  int64_t begin;
  int64_t end;
};

// About 384 spans a task, so that its labels are packed once for many; a quarter of that where
// there would be fewer than four tasks a thread.
inline std::vector<SpanTask> make_span_tasks(const SpanProblem& p) {
  constexpr int64_t kSpans = 384;
  std::vector<SpanTask> tasks;
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t n = p.length(seq);
    const int64_t most = kSpans / std::clamp<int64_t>(p.widths(0, n), 1, kSpans);
    const int64_t block =
        p.words < most * 4 * num_threads() ? std::max<int64_t>(1, most / 4) : most;
    for (int64_t begin = 0; begin < n; begin += block) {
      tasks.push_back({seq, begin, std::min(begin + block, n)});
    }
  }
  return tasks;
}

}  // namespace fastenc::cpu
