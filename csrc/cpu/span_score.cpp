// Scores of all short spans against labels, forward; fastenc/ops/span_score.py says what is
// computed.
//
// A task is the spans of a few words. 48 rows relu(start_i + end_j) of 256 elements are made in
// scratch (52 KB), from rows that each serve max_width spans, and multiplied by the packed labels.
//
// Floor: 2 words K C R FLOPs at the rate of sgemm. One core of a Zen 4 that other work shared, CPU
// time, fp32, 384 words, D 512, R 2048, K 12, C 10 (10 labels fill 10 of 16 lanes): 4.3 ms, half of
// what torch's sgemm reached beside it (89 GFLOP/s). The whole head, with its projections: 66 ms,
// gliner's SpanMarkerV0 and einsum 450 ms, the folded head in plain torch 141 ms.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../common/launch_counts.h"
#include "span_problem.h"

#define FASTENC_KERNEL_FILE "../cpu/span_score.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "gemm_tile.h"
#include "span_rows.h"

namespace fastenc::cpu::FASTENC_ISA {

// One group of labels of a task: the sums with their bias, and -inf where there is no span.
template <typename T>
void write_scores(const SpanProblem& p, const SpanTask& task, int64_t label, int64_t count,
                  const float* bias, const float* sums, T* out) {
  const int64_t ld = round_up(count, kLanes);
  const vf none = set(-std::numeric_limits<float>::infinity());
  const int64_t n = p.length(task.seq);
  T* row = out + (p.cu_words[task.seq] + task.begin) * p.max_width * p.labels + label;
  for (int64_t i = task.begin; i < task.end; ++i) {
    const int64_t widths = p.widths(i, n);
    for (int64_t w = 0; w < p.max_width; ++w, row += p.labels) {
      for (int64_t c = 0; c < count; c += kLanes) {
        const vf x = w < widths ? load(sums + c) + load(bias + c) : none;
        store_up_to(row + c, x, lanes_of(count, c));
      }
      sums += w < widths ? ld : 0;
    }
  }
}

template <typename T>
void score_task(const SpanProblem& p, const SpanTask& task, T* out) {
  SpanScratch scratch;
  float *bias, *sums;
  carve_scratch({{&scratch.rows, kSpanRows * kSpanStride},
                 {&scratch.labels, kSpanChunk * kLabelGroup},
                 {&scratch.keep, kSpanChunk},
                 {&bias, kLabelGroup},
                 {&sums, span_sums(p, task)}});
  for (int64_t label = 0; label < p.labels; label += kLabelGroup) {
    const int64_t count = std::min(kLabelGroup, p.labels - label);
    if (p.label_bias != nullptr) {
      widen_row(static_cast<const T*>(p.label_bias) + task.seq * p.labels + label, count, bias);
    } else {
      clear_row(count, bias);
    }
    span_products<T>(p, task, label, count, scratch, sums);
    write_scores<T>(p, task, label, count, bias, sums, out);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

Tensor span_score_fwd(const Tensor& start, const Tensor& end, const Tensor& labels,
                      const Tensor& cu_words, int64_t max_width, std::optional<Tensor> label_bias,
                      double dropout_p, std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("span_score");
  SpanProblem p = make_span_problem(start, end, labels, cu_words, max_width, label_bias);
  set_dropout(&p, dropout_p, seed);
  Tensor out = torch::stable::new_empty(start, {p.words, p.max_width, p.labels});
  const std::vector<SpanTask> tasks = make_span_tasks(p);
  dispatch_dtype("start", p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = FASTENC_FOR_ACTIVE_ISA(score_task<T>);
    parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t stop) {
      for (int64_t i = begin; i < stop; ++i) {
        run(p, tasks[i], mutable_data<T>(out));
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("span_score_fwd", TORCH_BOX(&span_score_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) { m.impl("span_score_fwd", TORCH_BOX(&span_score_fwd)); }

}  // namespace fastenc::cpu
#endif
