// Packed attention, backward; fastenc/ops/varlen_attention.py says what is computed.
//
// With P = exp(S - lse) made again from the inputs, D the dropout mask over 1 - p, and
// delta = rowsum(out * dout) - dlse:
//
//   dv = (P D)^T dout    dP = D (dout v^T)    dS = P (dP - delta)    dq = s dS k    dk = s dS^T q
//
// Five products to the forward's two, on the same tile. In units of the forward's time, measured
// as the forward was (see its file): AVX-512 2.38 (4x512, window 64), 2.45 (1x2048), 2.38 (8x128);
// AVX2 2.36 (4x512, window 64). Taking a part's heads in turn, which share its pages, brought
// 1x2048 with window 64 from 2.8-3.2 to 2.4, 1x8192 from 3.56 to 3.28 (2026-11-25). What is left
// there is page faults, as dqkv, 75 MB, is fresh memory in every call: it is 2.51 where the
// allocator keeps its memory (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ above its size).
// Forward and backward of torch's sdpa together take 4.2x the time at 4x512 with window 64 (as a
// mask), 1.3x without a window.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/launch_counts.h"
#include "attention_backward.h"
#include "attention_problem.h"

#define FASTENC_KERNEL_FILE "../cpu/varlen_attention_bwd.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "attention_pack.h"
#include "gemm_tile.h"
#include "attention_softmax.h"
#include "attention_softmax_bwd.h"
#include "attention_part_bwd.h"

namespace fastenc::cpu::FASTENC_ISA {

template <int LD>
void backward_task_of(const AttentionBackward& call, const BackwardTask& task, float* bias) {
#if FASTENC_ISA_LEVEL == FASTENC_ISA_AVX512
  if (is_narrow(*call.problem, call.problem->length(task.seq))) {
    BackwardPart<LD, 1>(call, task).run(bias);
    return;
  }
#endif
  BackwardPart<LD, 2>(call, task).run(bias);
}

void backward_task(const AttentionBackward& call, const BackwardTask& task, float* bias) {
  const int64_t stride = scratch_stride(call.problem->head_dim);
  stride == 32    ? backward_task_of<32>(call, task, bias)
  : stride == 64  ? backward_task_of<64>(call, task, bias)
  : stride == 96  ? backward_task_of<96>(call, task, bias)
  : stride == 128 ? backward_task_of<128>(call, task, bias)
                  : backward_task_of<kMaxHeadDim>(call, task, bias);
}

template <int LD>
void reduce_task_of(const AttentionBackward& call, const ReduceTask& reduction) {
  const AttentionProblem& p = *call.problem;
  const BackwardTask* parts = call.plan->tasks.data() + reduction.first_task;
  float* sum;
  const int64_t rows = reduction.end - reduction.begin;
  carve_scratch({{&sum, rows * LD}});
  std::fill_n(sum, rows * LD, 0.0f);
  for (int64_t part = 0; part < reduction.parts; ++part) {
    const BackwardTask& task = parts[part * p.heads];
    const int64_t begin = std::max(reduction.begin, task.query_begin);
    const int64_t end = std::min(reduction.end, task.query_end);
    const float* from = call.partial_dq + task.partial + (begin - task.query_begin) * LD;
    float* to = sum + (begin - reduction.begin) * LD;
    for (int64_t i = 0; i < (end - begin) * LD; i += kLanes) {
      store(to + i, load(to + i) + load(from + i));
    }
  }
  unpack_rows<LD>(p, call.dq, true, p.cu_seqlens[parts->seq], parts->head, reduction.begin,
                  reduction.end, 1.0f, sum);
}

void reduce_task(const AttentionBackward& call, const ReduceTask& reduction) {
  const int64_t stride = scratch_stride(call.problem->head_dim);
  stride == 32    ? reduce_task_of<32>(call, reduction)
  : stride == 64  ? reduce_task_of<64>(call, reduction)
  : stride == 96  ? reduce_task_of<96>(call, reduction)
  : stride == 128 ? reduce_task_of<128>(call, reduction)
                  : reduce_task_of<kMaxHeadDim>(call, reduction);
}

template <typename T>
void delta_rows_of(const AttentionBackward& call, int64_t begin, int64_t end) {
  const AttentionProblem& p = *call.problem;
  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t i = begin; i < end; ++i) {
      const T* out = call.out.at<T>(i, head);
      const T* grad = call.grad_out.at<T>(i, head);
      vf total = zero();
      for (int64_t d = 0; d < p.head_dim; d += kLanes) {
        const int n = lanes_left(p.head_dim, d);
        total = fma(load_some(out + d, n), load_some(grad + d, n), total);
      }
      const int64_t at = head * p.total_tokens + i;
      call.delta[at] = sum(total);
    }
  }
}

void delta_rows(const AttentionBackward& call, int64_t begin, int64_t end) {
  call.out.dtype == ScalarType::Float      ? delta_rows_of<float>(call, begin, end)
  : call.out.dtype == ScalarType::BFloat16 ? delta_rows_of<bf16>(call, begin, end)
                                           : delta_rows_of<fp16>(call, begin, end);
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

// What the forward pass left, and the gradients that came in.
struct Saved {
  Tensor grad_out;
  std::optional<Tensor> grad_lse;
  Tensor out;
  Tensor lse;
};

const float* statistics(const char* name, const Tensor& x, OwnedProblem* p) {
  check_dtype(name, x, ScalarType::Float);
  check_shape(name, x, {p->heads, p->total_tokens});
  p->tensors.push_back(dense(x));
  return data<float>(p->tensors.back());
}

// Sums the tasks' tables in the order of the tasks.
Tensor reduce_bias(const AttentionProblem& p, const BackwardPlan& plan, const float* partial,
                   const Tensor& like) {
  const int64_t width = 2 * p.bias_radius + 1;
  Tensor table = torch::stable::new_zeros(like, {p.heads, width}, ScalarType::Float);
  float* sums = mutable_data<float>(table);
  for (size_t i = 0; i < plan.tasks.size(); ++i) {
    float* row = sums + plan.tasks[i].head * width;
    for (int64_t t = 0; t < width; ++t) {
      row[t] += partial[static_cast<int64_t>(i) * width + t];
    }
  }
  return torch::stable::to(table, like.scalar_type());
}

Tensor backward(OwnedProblem* p, const Saved& saved, const Tensor& dq, const Tensor& dk,
                const Tensor& dv, const std::optional<Tensor>& rel_bias) {
  check_shape("grad_out", saved.grad_out, {p->total_tokens, p->heads, p->head_dim});
  check_shape("out", saved.out, {p->total_tokens, p->heads, p->head_dim});
  check_dtype("grad_out", saved.grad_out, saved.out.scalar_type());
  const BackwardPlan plan = make_backward_plan(*p);
  const int64_t bias_width = 2 * p->bias_radius + 1;
  const int64_t bias_floats = rel_bias ? static_cast<int64_t>(plan.tasks.size()) * bias_width : 0;
  const std::unique_ptr<float[]> delta(new float[p->heads * p->total_tokens]);
  const std::unique_ptr<float[]> partial_dq(new float[plan.partial_floats]);
  const std::unique_ptr<float[]> partial_bias(new float[bias_floats]);
  AttentionBackward call{};
  call.problem = p;
  call.plan = &plan;
  call.grad_out = input_rows("grad_out", saved.grad_out, p);
  call.out = input_rows("out", saved.out, p);
  call.dq = rows_of("dq", dq);
  call.dk = rows_of("dk", dk);
  call.dv = rows_of("dv", dv);
  call.lse = statistics("lse", saved.lse, p);
  call.grad_lse = saved.grad_lse ? statistics("grad_lse", *saved.grad_lse, p) : nullptr;
  call.delta = delta.get();
  call.partial_dq = partial_dq.get();
  call.partial_bias = partial_bias.get();

  constexpr int64_t kDeltaGrain = 64;
  const auto make_delta = FASTENC_FOR_ACTIVE_ISA(delta_rows);
  const auto run = FASTENC_FOR_ACTIVE_ISA(backward_task);
  const auto reduce = FASTENC_FOR_ACTIVE_ISA(reduce_task);
  parallel_for(p->total_tokens, kDeltaGrain,
               [&](int64_t begin, int64_t end) { make_delta(call, begin, end); });
  run_tasks(plan.costs, [&](int64_t i) {
    run(call, plan.tasks[i], rel_bias ? call.partial_bias + i * bias_width : nullptr);
  });
  parallel_for(static_cast<int64_t>(plan.reductions.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      reduce(call, plan.reductions[i]);
    }
  });
  return rel_bias ? reduce_bias(*p, plan, call.partial_bias, *rel_bias)
                  : torch::stable::new_empty(dq, {0});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_bwd(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, Tensor cu_seqlens, int64_t max_seqlen, int64_t window_left, int64_t window_right,
    double scale, double dropout_p, std::optional<Tensor> seed, std::optional<Tensor> rel_bias) {
  FASTENC_COUNT_LAUNCH("varlen_attention_bwd");
  OwnedProblem p =
      make_problem(q, k, v, cu_seqlens,
                   {max_seqlen, window_left, window_right, scale, dropout_p, seed}, rel_bias);
  const auto like = [&](const Tensor& x) {
    return torch::stable::new_empty(x, {p.total_tokens, p.heads, p.head_dim});
  };
  Tensor dq = like(q);
  Tensor dk = like(k);
  Tensor dv = like(v);
  Tensor drel_bias = backward(&p, {grad_out, grad_lse, out, lse}, dq, dk, dv, rel_bias);
  return {dq, dk, dv, drel_bias};
}

Tensor rope_varlen_attention_bwd(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor qkv,
                                 Tensor cos, Tensor sin, Tensor out, Tensor lse, Tensor cu_seqlens,
                                 int64_t max_seqlen, int64_t window_left, int64_t window_right,
                                 double scale, double dropout_p, std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("rope_varlen_attention_bwd");
  OwnedProblem p = make_rope_problem(
      qkv, cos, sin, cu_seqlens, {max_seqlen, window_left, window_right, scale, dropout_p, seed});
  Tensor dqkv = torch::stable::new_empty(qkv, {p.total_tokens, 3, p.heads, p.head_dim});
  const auto part = [&](int64_t i) { return torch::stable::select(dqkv, 1, i); };
  backward(&p, {grad_out, grad_lse, out, lse}, part(0), part(1), part(2), std::nullopt);
  return dqkv;
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("varlen_attention_bwd", TORCH_BOX(&varlen_attention_bwd));
  m.impl("rope_varlen_attention_bwd", TORCH_BOX(&rope_varlen_attention_bwd));
}

}  // namespace
}  // namespace fastenc::cpu

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) { fastenc::cpu::register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) { fastenc::cpu::register_kernels(m); }

#endif
