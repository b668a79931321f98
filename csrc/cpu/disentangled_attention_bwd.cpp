// Disentangled attention, backward; fastenc/ops/disentangled_attention.py says what is computed.
//
// With P made again, D the dropout mask over 1 - p, delta = rowsum(out * dout), s the scale, and
// the position tables by distance c = i - j:
//
//   dv = (P D)^T dout      dS = P (D (dout v^T) - delta)
//   dq_i = s sum_j dS_ij (k_j + PK_{i-j})        dk_j = s sum_i dS_ij (q_i + PQ_{i-j})
//   dPK_c = s sum_i dS_{i,i-c} q_i               dPQ_c = s sum_j dS_{j+c,j} k_j
//
// dS is written a second time with rows shifted against each other by one column, so that equal
// distances lie in one column and every line above is a product; columns of one bucket are summed
// before those of the tables. A task is one head of a few
// sequences, one after the other; which they are depends on the problem alone, and their table
// gradients are summed in order.
//
// Floor: 22 L^2 head_dim FLOPs a head, at sgemm's rate. As in disentangled_attention.cpp, ms:
//   tokens                        128    384    668
//   v1 a column a distance        4.6   30.3   91.6
//   v2 a column a bucket          4.5   26.8   72.5   floor / measured 0.56, 0.85, 0.95
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/launch_counts.h"
#include "disentangled_problem.h"

#define FASTENC_KERNEL_FILE "../cpu/disentangled_attention_bwd.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "gemm_tile.h"

#include "attention_pack.h"
#include "attention_softmax.h"

#include "disentangled_positions.h"

#include "disentangled_head_bwd.h"

namespace fastenc::cpu::FASTENC_ISA {

void differentiate_head(const DisentangledBackward& call, const HeadTask& task, int64_t index) {
  const int64_t stride = disentangled_stride(call.problem->head_dim);
  stride == 32    ? DisentangledHead<32>(call, task, index).run()
  : stride == 64  ? DisentangledHead<64>(call, task, index).run()
  : stride == 128 ? DisentangledHead<128>(call, task, index).run()
                  : DisentangledHead<kMaxHeadDim>(call, task, index).run();
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

// At most this many tasks share a head, each with its own sum of both table gradients.
constexpr int64_t kSequenceGroups = 4;

std::vector<HeadTask> make_head_tasks(const DisentangledProblem& p) {
  double total = 0.0;
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    total += static_cast<double>(p.length(seq)) * p.length(seq);
  }
  std::vector<int64_t> edges{0};
  double seen = 0.0;
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    seen += static_cast<double>(p.length(seq)) * p.length(seq);
    const bool full = seen * kSequenceGroups >= total * static_cast<double>(edges.size());
    if (full || seq + 1 == p.num_seqs) {
      edges.push_back(seq + 1);
    }
  }
  std::vector<HeadTask> tasks;
  for (int64_t head = 0; head < p.heads; ++head) {
    for (size_t i = 0; i + 1 < edges.size(); ++i) {
      tasks.push_back({head, edges[i], edges[i + 1]});
    }
  }
  return tasks;
}

// (heads, size, head_dim): the sum of the head's tasks, in their order.
Tensor sum_tables(const std::optional<PositionTable>& table, const DisentangledProblem& p,
                  const std::vector<HeadTask>& tasks, const float* parts, const Tensor& like) {
  if (!table) {
    return torch::stable::new_empty(like, {0});
  }
  const int64_t each = table->size * p.head_dim;
  Tensor sums =
      torch::stable::new_zeros(like, {p.heads, table->size, p.head_dim}, ScalarType::Float);
  for (size_t i = 0; i < tasks.size(); ++i) {
    float* to = mutable_data<float>(sums) + tasks[i].head * each;
    const float* from = parts + static_cast<int64_t>(i) * each;
    for (int64_t e = 0; e < each; ++e) {
      to[e] += from[e];
    }
  }
  return torch::stable::to(sums, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> disentangled_attention_bwd(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> pos_key,
    std::optional<Tensor> pos_query, Tensor out, Tensor lse, Tensor rel_index, Tensor cu_seqlens,
    int64_t max_seqlen, double scale, double dropout_p, std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("disentangled_attention_bwd");
  DisentangledProblem p =
      make_disentangled_problem(q, k, v, pos_key, pos_query, rel_index, cu_seqlens,
                                {max_seqlen, -1, -1, scale, dropout_p, seed});
  check_shape("grad_out", grad_out, {p.total_tokens, p.heads, p.head_dim});
  check_dtype("grad_out", grad_out, p.q.dtype);
  check_shape("out", out, {p.total_tokens, p.heads, p.head_dim});
  check_dtype("out", out, p.q.dtype);
  check_shape("lse", lse, {p.heads, p.total_tokens});
  check_dtype("lse", lse, ScalarType::Float);
  const Tensor statistics = dense(lse);
  const auto like = [&](const Tensor& x) {
    return torch::stable::new_empty(x, {p.total_tokens, p.heads, p.head_dim});
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  const std::vector<HeadTask> tasks = make_head_tasks(p);
  const auto parts = [&](const std::optional<PositionTable>& t) {
    const int64_t floats = t ? static_cast<int64_t>(tasks.size()) * t->size * p.head_dim : 0;
    return std::unique_ptr<float[]>(new float[floats]);
  };
  const std::unique_ptr<float[]> dkey = parts(p.key), dquery = parts(p.query);
  DisentangledBackward call{&p,
                            input_rows("grad_out", grad_out, &p),
                            input_rows("out", out, &p),
                            rows_of("dq", dq),
                            rows_of("dk", dk),
                            rows_of("dv", dv),
                            data<float>(statistics),
                            dkey.get(),
                            dquery.get()};
  std::vector<int64_t> costs;
  for (const HeadTask& task : tasks) {
    costs.push_back(p.cu_seqlens[task.end] - p.cu_seqlens[task.begin]);
  }
  const auto run = FASTENC_FOR_ACTIVE_ISA(differentiate_head);
  run_tasks(costs, [&](int64_t i) { run(call, tasks[i], i); });
  return {dq, dk, dv, sum_tables(p.key, p, tasks, dkey.get(), q),
          sum_tables(p.query, p, tasks, dquery.get(), q)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("disentangled_attention_bwd", TORCH_BOX(&disentangled_attention_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("disentangled_attention_bwd", TORCH_BOX(&disentangled_attention_bwd));
}

}  // namespace fastenc::cpu
#endif
