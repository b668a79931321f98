// The backward pass as tasks. A task owns a part of the keys of one (sequence, head): dk and dv of
// these keys are complete in it, dq is not where other parts' keys are seen as well. How a sequence
// is split depends on its length and window alone, so gradients do not depend on the batch around
// it or on the number of threads.
#pragma once

#include <memory>
#include <vector>

#include "attention_problem.h"

namespace fastenc::cpu {

struct BackwardTask {
  int32_t seq;
  int32_t head;
  int64_t key_begin;
  int64_t key_end;
  int64_t query_begin;  // queries that see these keys, rounded to whole query blocks
  int64_t query_end;
  int64_t partial;  // where this part's dq lies in partial_dq; -1: it is the only part
};

// Sums the parts [first_task, first_task + parts) into dq of queries [begin, end).
struct ReduceTask {
  int64_t first_task;
  int64_t parts;
  int64_t begin;
  int64_t end;
};

struct BackwardPlan {
  std::vector<BackwardTask> tasks;
  std::vector<ReduceTask> reductions;
  std::vector<int64_t> costs;
  int64_t partial_floats = 0;
};

struct AttentionBackward {
  const AttentionProblem* problem;
  const BackwardPlan* plan;
  Rows grad_out, out, dq, dk, dv;
  const float* lse;       // (heads, total_tokens)
  const float* grad_lse;  // the same, or null
  float* delta;           // (heads, total_tokens): out . grad_out
  float* partial_dq;
  float* partial_bias;  // (tasks, 2 * bias_radius + 1)
};

// Every block of queries begins at a multiple of its size, which divides this.
constexpr int64_t kQueryGrid = 32;

// All keys of a query block fit one step.
inline bool is_narrow(const AttentionProblem& p, int64_t n) {
  return std::min(n, p.left(n) + p.right(n) + kQueryGrid + 6) <= kSinglePass;
}

// Keys in a part. Narrow windows: few enough that keys, values and both gradients (1 MB at
// head_dim 64) stay near. Else at most four parts, as each has partial sums for all of dq.
inline int64_t keys_in_part(const AttentionProblem& p, int64_t n) {
  constexpr int64_t kNarrowPart = 1024;
  constexpr int64_t kWidePart = 2048;
  return is_narrow(p, n) ? kNarrowPart : std::max(kWidePart, round_up((n + 3) / 4, 256));
}

inline BackwardPlan make_backward_plan(const AttentionProblem& p) {
  constexpr int64_t kReduceChunk = 256;
  const int64_t stride = scratch_stride(p.head_dim);
  BackwardPlan plan;
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t n = p.length(seq);
    const int64_t size = keys_in_part(p, n);
    const int64_t parts = (n + size - 1) / size;
    const int64_t keys_seen = std::min(n, p.left(n) + p.right(n) + 1);
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t first = static_cast<int64_t>(plan.tasks.size());
      for (int64_t begin = 0; begin < n; begin += size) {
        const int64_t end = std::min(begin + size, n);
        BackwardTask task{static_cast<int32_t>(seq), static_cast<int32_t>(head), begin, end, 0, 0,
                          -1};
        task.query_begin = round_down(std::max<int64_t>(0, begin - p.right(n)), kQueryGrid);
        task.query_end = round_up(std::min(n, end + p.left(n)), kQueryGrid);
        if (parts > 1) {
          task.partial = plan.partial_floats;
          plan.partial_floats += (task.query_end - task.query_begin) * stride;
        }
        plan.tasks.push_back(task);
        plan.costs.push_back((end - begin) * keys_seen);
      }
      for (int64_t begin = 0; parts > 1 && begin < n; begin += kReduceChunk) {
        plan.reductions.push_back({first, parts, begin, std::min(begin + kReduceChunk, n)});
      }
    }
  }
  return plan;
}

}  // namespace fastenc::cpu
