// The backward pass as tasks. A task owns a part of the keys of one (sequence, head): dk and dv of
// these keys are complete in it, dq is not where other parts' keys are seen as well. How a sequence
// is split depends on its length and window alone, so gradients do not depend on the batch around
// it or on the number of threads.
#pragma once

#include <memory>
#include <vector>

#include "attention_problem.h"

namespace fastenc::cpu {

// Every block of queries begins at a multiple of its size, which divides this.
constexpr int64_t kQueryGrid = 32;

struct BackwardTask {
  int32_t seq;
  int32_t head;
  int64_t key_begin;
  int64_t key_end;
  int64_t query_begin;  // queries that see these keys, rounded to whole query blocks
  int64_t query_end;
  int64_t partial;  // where this part's dq lies in partial_dq; -1: it is the only part

  // Whether the block of kQueryGrid queries around `query` sees keys of this part only.
  bool completes(const AttentionProblem& p, int64_t query) const {
    const int64_t n = p.length(seq);
    const int64_t first = round_down(query, kQueryGrid);
    return key_begin <= std::max<int64_t>(0, first - p.left(n)) &&
           std::min(n, first + kQueryGrid + p.right(n)) <= key_end;
  }
};

// Sums the parts (every heads-th task from first_task on) into dq of queries [begin, end).
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

// All keys of a query block fit one step.
inline bool is_narrow(const AttentionProblem& p, int64_t n) {
  return std::min(n, p.left(n) + p.right(n) + kQueryGrid + 6) <= kSinglePass;
}

// Keys in a part. Narrow windows: few enough that keys, values and both gradients (512 KB at
// head_dim 64) stay in L2. Else at most four parts, as each has partial sums for all of dq.
inline int64_t keys_in_part(const AttentionProblem& p, int64_t n) {
  constexpr int64_t kNarrowPart = 512;
  constexpr int64_t kWidePart = 2048;
  return is_narrow(p, n) ? kNarrowPart : std::max(kWidePart, round_up((n + 3) / 4, 256));
}

// The queries of a split sequence and head whose dq none of the parts completes, in chunks.
inline void plan_reductions(const AttentionProblem& p, int64_t first_task, int64_t parts,
                            BackwardPlan* plan) {
  constexpr int64_t kReduceChunk = 256;
  const int64_t n = p.length(plan->tasks[first_task].seq);
  const auto complete = [&](int64_t query) {
    const int64_t part = query / (plan->tasks[first_task].key_end);
    return is_narrow(p, n) && plan->tasks[first_task + part * p.heads].completes(p, query);
  };
  for (int64_t begin = 0; begin < n; begin += kQueryGrid) {
    if (complete(begin)) {
      continue;
    }
    const int64_t end = std::min(begin + kQueryGrid, n);
    if (!plan->reductions.empty() && plan->reductions.back().first_task == first_task &&
        plan->reductions.back().end == begin && begin % kReduceChunk != 0) {
      plan->reductions.back().end = end;
    } else {
      plan->reductions.push_back({first_task, parts, begin, end});
    }
  }
}

inline BackwardPlan make_backward_plan(const AttentionProblem& p) {
  const int64_t stride = scratch_stride(p.head_dim);
  BackwardPlan plan;
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t n = p.length(seq);
    const int64_t size = keys_in_part(p, n);
    const int64_t keys_seen = std::min(n, p.left(n) + p.right(n) + 1);
    const int64_t first = static_cast<int64_t>(plan.tasks.size());
    // All heads of a part in turn: they share its pages.
    for (int64_t begin = 0; begin < n; begin += size) {
      const int64_t end = std::min(begin + size, n);
      for (int64_t head = 0; head < p.heads; ++head) {
        BackwardTask task{
            static_cast<int32_t>(seq), static_cast<int32_t>(head), begin, end, 0, 0, -1};
        task.query_begin = round_down(std::max<int64_t>(0, begin - p.right(n)), kQueryGrid);
        task.query_end = round_up(std::min(n, end + p.left(n)), kQueryGrid);
        if (n > size) {
          task.partial = plan.partial_floats;
          plan.partial_floats += (task.query_end - task.query_begin) * stride;
        }
        plan.tasks.push_back(task);
        plan.costs.push_back((end - begin) * keys_seen);
      }
    }
    for (int64_t head = 0; n > size && head < p.heads; ++head) {
      plan_reductions(p, first + head, (n + size - 1) / size, &plan);
    }
  }
  return plan;
}

}  // namespace fastenc::cpu
