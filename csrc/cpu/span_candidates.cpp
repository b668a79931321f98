// The spans and labels that pass a threshold; fastenc/ops/span_candidates.py says what is computed.
//
// The product is span_score's. A task's sums stay in its scratch; what passes is appended to the
// task's list, and the lists are joined in the order of the tasks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/launch_counts.h"
#include "span_problem.h"

#ifndef FASTENC_SPAN_CANDIDATE
#define FASTENC_SPAN_CANDIDATE
namespace fastenc::cpu {

struct SpanCandidate {
  int64_t word;
  int64_t width;
  int64_t label;
  float score;
};

// sigmoid(x) > threshold; `least` spares the exponential of most, and is a little under the logit.
struct SpanThreshold {
  float probability;
  float least;

  explicit SpanThreshold(double p) : probability(static_cast<float>(p)) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const double logit = std::log(p) - std::log1p(-p);
    least = p <= 0.0   ? -kInfinity
            : p >= 1.0 ? kInfinity
                       : static_cast<float>(logit - 1e-3 * (1.0 + std::abs(logit)));
  }
};

inline float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }

}  // namespace fastenc::cpu
#endif

#define FASTENC_KERNEL_FILE "../cpu/span_candidates.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "gemm_tile.h"
#include "span_rows.h"

namespace fastenc::cpu::FASTENC_ISA {

template <typename T>
void candidates_task(const SpanProblem& p, const SpanTask& task, const SpanThreshold& threshold,
                     std::vector<SpanCandidate>* found) {
  SpanScratch scratch;
  float *bias, *sums;
  carve_scratch({{&scratch.rows, kSpanRows * kSpanStride},
                 {&scratch.labels, kSpanChunk * kLabelGroup},
                 {&scratch.keep, kSpanChunk},
                 {&bias, kLabelGroup},
                 {&sums, span_sums(p, task)}});
  for (int64_t label = 0; label < p.labels; label += kLabelGroup) {
    const int64_t count = std::min(kLabelGroup, p.labels - label);
    const int64_t ld = round_up(count, kLanes);
    if (p.label_bias != nullptr) {
      widen_row(static_cast<const T*>(p.label_bias) + task.seq * p.labels + label, count, bias);
    } else {
      clear_row(count, bias);
    }
    span_products<T>(p, task, label, count, scratch, sums);
    SpanWalk walk{p, p.length(task.seq), task.begin, task.end};
    for (const float* row = sums; !walk.done(); walk.advance(), row += ld) {
      for (int64_t c = 0; c < count; ++c) {
        const float logit = row[c] + bias[c];
        if (logit > threshold.least) {
          const float score = sigmoid_of(logit);
          if (score > threshold.probability) {
            found->push_back({p.cu_words[task.seq] + walk.word, walk.width, label + c, score});
          }
        }
      }
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

using Candidates = std::vector<SpanCandidate>;

// Several groups of labels come one after the other: back into the order of (word, width, label).
void sort_candidates(Candidates* found) {
  std::sort(found->begin(), found->end(), [](const SpanCandidate& a, const SpanCandidate& b) {
    return std::tie(a.word, a.width, a.label) < std::tie(b.word, b.width, b.label);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> join(const std::vector<Candidates>& lists,
                                                const Tensor& like) {
  int64_t count = 0;
  for (const Candidates& list : lists) {
    count += static_cast<int64_t>(list.size());
  }
  Tensor word = torch::stable::new_empty(like, {count}, ScalarType::Long);
  Tensor width = torch::stable::new_empty(like, {count}, ScalarType::Long);
  Tensor label = torch::stable::new_empty(like, {count}, ScalarType::Long);
  Tensor score = torch::stable::new_empty(like, {count}, ScalarType::Float);
  int64_t at = 0;
  for (const Candidates& list : lists) {
    for (const SpanCandidate& candidate : list) {
      mutable_data<int64_t>(word)[at] = candidate.word;
      mutable_data<int64_t>(width)[at] = candidate.width;
      mutable_data<int64_t>(label)[at] = candidate.label;
      mutable_data<float>(score)[at++] = candidate.score;
    }
  }
  return {word, width, label, score};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> span_candidates_fwd(
    const Tensor& start, const Tensor& end, const Tensor& labels, const Tensor& cu_words,
    int64_t max_width, double probability, std::optional<Tensor> label_bias) {
  FASTENC_COUNT_LAUNCH("span_candidates");
  const SpanProblem p = make_span_problem(start, end, labels, cu_words, max_width, label_bias);
  const SpanThreshold threshold(probability);
  const std::vector<SpanTask> tasks = make_span_tasks(p);
  std::vector<Candidates> lists(tasks.size());
  dispatch_dtype("start", p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = FASTENC_FOR_ACTIVE_ISA(candidates_task<T>);
    parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t stop) {
      for (int64_t i = begin; i < stop; ++i) {
        run(p, tasks[i], threshold, &lists[i]);
        if (p.labels > kLabelGroup) {
          sort_candidates(&lists[i]);
        }
      }
    });
  });
  return join(lists, start);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("span_candidates_fwd", TORCH_BOX(&span_candidates_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("span_candidates_fwd", TORCH_BOX(&span_candidates_fwd));
}

}  // namespace fastenc::cpu
#endif
