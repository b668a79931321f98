// Packed attention, backward; fastenc/ops/varlen_attention.py says what is computed.
//
// With P = exp(S - lse) made again from the inputs, D the dropout mask over 1 - p, and
// delta = rowsum(out * dout) - dlse:
//
//   dv = (P D)^T dout    dP = D (dout v^T)    dS = P (dP - delta)    dq = s dS k    dk = s dS^T q
//
// Five products to the forward's two, on the same tile. In units of the forward's time, measured
// as the forward was (see its file): AVX-512 2.38 (4x512, window 64), 2.45 (1x2048), 2.38 (8x128);
// AVX2 2.36 (4x512, window 64). At 1x8192 with window 64 it is 3.4; part of that is page faults, as
// dqkv, 75 MB, is fresh memory in every call. Forward and backward of torch's sdpa together take
// 4.2x the time at 4x512 with window 64 (as a mask), 1.3x without a window.

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

namespace fastenc::cpu::FASTENC_ISA {

// Without a narrow window, keys are packed and stepped over this many at a time.
constexpr int64_t kKeyChunk = 256;
constexpr int64_t kKeyStep = 128;

// C[m][d] += sum_q A[m][q] * B[q][d] over kQueries: the products whose vector axis is head_dim.
template <int LD, int kQueries>
FASTENC_INLINE void add_outer(int64_t m, int64_t head_dim, const float* a, const float* b,
                              float* c) {
  int64_t d = 0;
  for (; d + kLanes < head_dim; d += 2 * kLanes) {
    gemm<2, Into::kAdd>(m, kQueries, a, kQueries, 1, b + d, LD, c + d, LD);
  }
  if (d < head_dim) {
    gemm<1, Into::kAdd>(m, kQueries, a, kQueries, 1, b + d, LD, c + d, LD);
  }
}

template <int LD, int NV>
class BackwardPart {
 public:
  static constexpr int64_t kQueries = NV * kLanes;

  BackwardPart(const AttentionBackward& call, const BackwardTask& task)
      : call_(call),
        p_(*call.problem),
        task_(task),
        scope_(make_scope(*call.problem, task.seq, task.head)),
        narrow_(is_narrow(*call.problem, scope_.length)),
        one_key_(scope_.length == 1 || (scope_.left == 0 && scope_.right == 0)) {}

  void run(float* bias_partial) {
    const int64_t chunk = narrow_ ? round_up(task_.key_end - task_.key_begin, 4) : kKeyChunk;
    const int64_t dq_rows = task_.query_end - task_.query_begin;
    const bool keeps_dq = !narrow_ && task_.partial < 0;
    float* bias;
    carve_scratch({{&keys_, chunk * LD},
                   {&values_, chunk * LD},
                   {&dkeys_, chunk * LD},
                   {&dvalues_, chunk * LD},
                   {&query_rows_, kQueries * LD},
                   {&queries_, kQueries * LD},
                   {&grad_rows_, kQueries * LD},
                   {&grads_, kQueries * LD},
                   {&dqueries_, kQueries * LD},
                   {&dquery_rows_, kQueries * LD},
                   {&scores_, kSinglePass * kQueries},
                   {&dscores_, kSinglePass * kQueries},
                   {&rows_.lse_high, kQueries},
                   {&rows_.lse_low, kQueries},
                   {&rows_.delta, kQueries},
                   {&rows_.dlse, kQueries},
                   {&scales_, kQueries},
                   {&bias, bias_size(p_, scope_)},
                   {&bias_grad_, bias_size(p_, scope_)},
                   {&bias_total_, bias_size(p_, scope_)},
                   {&dq_, keeps_dq ? dq_rows * LD : 0}});
    expand_bias(p_, &scope_, bias);
    std::fill_n(bias_grad_, bias_size(p_, scope_), 0.0f);
    std::fill_n(bias_total_, bias_size(p_, scope_), 0.0f);
    std::fill_n(scales_, kQueries, p_.scale);
    if (task_.partial >= 0) {
      dq_ = call_.partial_dq + task_.partial;
    }
    if (!narrow_) {
      std::fill_n(dq_, dq_rows * LD, 0.0f);
    }
    for (int64_t begin = task_.key_begin; begin < task_.key_end; begin += chunk) {
      differentiate_keys(begin, std::min(begin + chunk, task_.key_end));
    }
    if (keeps_dq) {
      unpack_rows<LD>(p_, call_.dq, true, scope_.start, scope_.head, 0, scope_.length, 1.0f, dq_);
    }
    if (bias_partial != nullptr) {
      collapse_bias(bias_partial);
    }
  }

 private:
  void differentiate_keys(int64_t begin, int64_t end) {
    const int64_t padded = round_up(end - begin, 4);
    pack_rows<LD>(p_, p_.k, true, scope_.start, scope_.head, begin, end, padded, 1.0f, keys_);
    pack_rows<LD>(p_, p_.v, false, scope_.start, scope_.head, begin, end, padded, 1.0f, values_);
    std::fill_n(dkeys_, padded * LD, 0.0f);
    std::fill_n(dvalues_, padded * LD, 0.0f);
    const int64_t first = round_down(std::max<int64_t>(0, begin - scope_.right), kQueryGrid);
    const int64_t last = round_up(end + scope_.left, kQueryGrid);
    for (int64_t query = first; query < std::min(last, scope_.length); query += kQueries) {
      differentiate_queries(query, begin, begin + padded);
    }
    // Queries carry scale * log2 e, and probabilities lack dropout's 1 / (1 - p).
    unpack_rows<LD>(p_, call_.dk, true, scope_.start, scope_.head, begin, end, kLn2, dkeys_);
    unpack_rows<LD>(p_, call_.dv, false, scope_.start, scope_.head, begin, end,
                    p_.dropout.keep_scale, dvalues_);
  }

  // One block of queries against the packed keys [pack_begin, pack_end).
  void differentiate_queries(int64_t query, int64_t pack_begin, int64_t pack_end) {
    pack_queries(query);
    const int64_t first = std::max<int64_t>(0, query - scope_.left);
    const int64_t last = std::min(scope_.length, query + kQueries + scope_.right);
    const bool all_keys = narrow_ && task_.completes(p_, query);
    const int64_t begin = std::max(pack_begin, round_down(first, 4));
    const int64_t end = std::min(pack_end, round_up(last, 4));
    const int64_t width = round_up(p_.head_dim, 4);
    if (begin >= end) {  // in the grid's rounding only
      std::fill_n(dqueries_, width * kQueries, 0.0f);
    }
    for (int64_t j = begin; j < end;) {
      const int64_t next = narrow_ ? end : std::min(j + kKeyStep, end);
      const int64_t rows = next - j;
      const int64_t at = (j - pack_begin) * LD;
      scores_of<LD, NV>(rows, p_.head_dim, keys_ + at, queries_, scores_);
      if (one_key_) {  // dP - delta is 0, and not left to two roundings of the same number
        std::fill_n(dscores_, rows * kQueries, 0.0f);
      } else {
        scores_of<LD, NV>(rows, p_.head_dim, values_ + at, grads_, dscores_);
      }
      differentiate_block<NV>(scope_, all_keys, query, j, next, rows_, scores_, dscores_,
                              bias_grad_);
      if (j == begin) {
        gemm<NV, Into::kOverwrite>(width, rows, keys_ + at, 1, LD, dscores_, kQueries, dqueries_,
                                   kQueries);
      } else {
        gemm<NV, Into::kAdd>(width, rows, keys_ + at, 1, LD, dscores_, kQueries, dqueries_,
                             kQueries);
      }
      add_outer<LD, kQueries>(rows, p_.head_dim, scores_, grad_rows_, dvalues_ + at);
      add_outer<LD, kQueries>(rows, p_.head_dim, dscores_, query_rows_, dkeys_ + at);
      j = next;
    }
    finish_dq(query, all_keys);
    if (scope_.bias != nullptr && begin < end) {
      add_bias(bias_index(scope_, query, end), bias_index(scope_, query + kQueries, begin));
    }
  }

  void pack_queries(int64_t query) {
    const int64_t end = std::min<int64_t>(query + kQueries, scope_.length);
    pack_rows<LD>(p_, p_.q, true, scope_.start, scope_.head, query, end, kQueries,
                  p_.scale * kLog2e, query_rows_);
    transpose_in<LD, NV>(query_rows_, p_.head_dim, queries_);
    pack_rows<LD>(p_, call_.grad_out, false, scope_.start, scope_.head, query, end, kQueries, 1.0f,
                  grad_rows_);
    transpose_in<LD, NV>(grad_rows_, p_.head_dim, grads_);
    const int64_t row = scope_.head * p_.total_tokens + scope_.start + query;
    for (int v = 0; v < NV; ++v) {
      const int64_t i = v * kLanes;
      const int n = query + i < end ? lanes_left(end, query + i) : 0;
      const vf lse = load_n(call_.lse + row + i, n);
      // A row without a key has -inf; any finite value gives it P = 0.
      const vm empty = lse == set(-std::numeric_limits<float>::infinity());
      const vf finite = zero_unless(!empty, lse);
      const vf high = finite * set(kLog2e);
      store(rows_.lse_high + i, high);
      store(rows_.lse_low + i, fma(finite, set(kLog2eLow), fma(finite, set(kLog2e), -high)));
      store(rows_.delta + i, one_key_ ? zero() : load_n(call_.delta + row + i, n));
      store(rows_.dlse + i, call_.grad_lse ? load_n(call_.grad_lse + row + i, n) : zero());
    }
  }

  // With a narrow window, a part meets a block of queries once: its dq is final, or a partial sum.
  void finish_dq(int64_t query, bool all_keys) {
    transpose_out<LD, NV>(dqueries_, p_.head_dim, scales_, dquery_rows_);
    if (all_keys) {
      unpack_rows<LD>(p_, call_.dq, true, scope_.start, scope_.head, query,
                      std::min<int64_t>(query + kQueries, scope_.length), 1.0f, dquery_rows_);
      return;
    }
    float* to = dq_ + (query - task_.query_begin) * LD;
    for (int64_t i = 0; i < kQueries * LD; i += kLanes) {
      const vf x = load(dquery_rows_ + i);
      store(to + i, narrow_ ? x : load(to + i) + x);
    }
  }

  // Moves one block's sums to the total: long sums are sums of shorter ones.
  void add_bias(int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      bias_total_[t] += bias_grad_[t];
      bias_grad_[t] = 0.0f;
    }
  }

  void collapse_bias(float* partial) {
    const int64_t radius = p_.bias_radius;
    std::fill_n(partial, 2 * radius + 1, 0.0f);
    for (int64_t t = 0; t < bias_size(p_, scope_); ++t) {
      partial[bias_distance(scope_, t, radius) + radius] += bias_total_[t];
    }
  }

  const AttentionBackward& call_;
  const AttentionProblem& p_;
  const BackwardTask& task_;
  AttentionScope scope_;
  bool narrow_;
  bool one_key_;
  float *keys_, *values_, *dkeys_, *dvalues_, *query_rows_, *queries_, *grad_rows_, *grads_;
  float *dqueries_, *dquery_rows_, *scores_, *dscores_, *scales_;
  float *bias_grad_, *bias_total_, *dq_;
  RowStatistics rows_;
};

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
    const BackwardTask& task = parts[part];
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
