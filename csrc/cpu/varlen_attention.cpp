// Packed attention, forward; fastenc/ops/varlen_attention.py says what is computed.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/launch_counts.h"
#include "attention_problem.h"

#define FASTENC_KERNEL_FILE "../cpu/varlen_attention.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "attention_pack.h"
#include "gemm_tile.h"
#include "attention_softmax.h"

namespace fastenc::cpu::FASTENC_ISA {

// Keys and values are packed this many at a time; boundaries lie at its multiples (so that results
// do not depend on how queries are split into tasks), unless a narrow window needs one pack only.
constexpr int64_t kKeyPack = 512;
// One step of the online softmax.
constexpr int64_t kKeyBlock = 128;
// A query block that sees at most this many keys takes them in one step.
constexpr int64_t kSinglePass = 320;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t round_down(int64_t n, int64_t to) { return n / to * to; }

template <int LD, int NV>
class ForwardChunk {
 public:
  static constexpr int64_t kQueries = NV * kLanes;

  ForwardChunk(const AttentionForward& call, const AttentionTask& task)
      : call_(call), p_(*call.problem), task_(task) {
    const int64_t n = p_.length(task.seq);
    scope_ = {p_.cu_seqlens[task.seq], n, task.head, p_.left(n), p_.right(n), nullptr,
              &p_.dropout};
    // Rounding both ends of a window to multiples of 4 adds at most 6 keys.
    single_pass_ = std::min(n, scope_.left + scope_.right + kQueries + 6) <= kSinglePass;
    blocks_ = (task.end - task.begin + kQueries - 1) / kQueries;
  }

  void run() {
    const int64_t keys_begin = round_down(std::max<int64_t>(0, task_.begin - scope_.left), 4);
    const int64_t keys_end = std::min(scope_.length, task_.end + scope_.right);
    const int64_t pack_rows_max = round_up(single_pass_ ? keys_end - keys_begin : kKeyPack, 4);
    const int64_t bias_size = p_.bias_table ? 2 * scope_.length + kQueries : 0;
    float* bias;
    carve_scratch({{&keys_, pack_rows_max * LD},
                   {&values_, pack_rows_max * LD},
                   {&queries_, blocks_ * LD * kQueries},
                   {&outs_, blocks_ * LD * kQueries},
                   {&tops_, blocks_ * kQueries},
                   {&sums_, blocks_ * kQueries},
                   {&scores_, kSinglePass * kQueries},
                   {&rows_, LD * kQueries},
                   {&factors_, kQueries},
                   {&bias, bias_size}});
    expand_bias(bias);
    pack_queries();
    for (int64_t begin = keys_begin; begin < keys_end;) {
      const int64_t end =
          single_pass_ ? keys_end : std::min(round_down(begin, kKeyPack) + kKeyPack, keys_end);
      attend(begin, end);
      begin = end;
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      finish(block);
    }
  }

 private:
  int64_t query_of(int64_t block) const { return task_.begin + block * kQueries; }

  void expand_bias(float* bias) {
    if (p_.bias_table == nullptr) {
      return;
    }
    const int64_t radius = p_.bias_radius;
    const float* table = p_.bias_table + task_.head * (2 * radius + 1) + radius;
    for (int64_t t = 0; t < 2 * scope_.length + kQueries; ++t) {
      const int64_t distance = scope_.length - t;  // j - i
      bias[t] = table[std::clamp(distance, -radius, radius)] * kLog2e;
    }
    scope_.bias = bias;
  }

  void pack_queries() {
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t begin = query_of(block);
      const int64_t end = std::min<int64_t>(begin + kQueries, task_.end);
      pack_rows<LD>(p_, p_.q, true, scope_.start, scope_.head, begin, end, kQueries,
                    p_.scale * kLog2e, rows_);
      transpose_in<LD, NV>(rows_, p_.head_dim, queries_ + block * LD * kQueries);
    }
  }

  // All queries of the chunk against keys [begin, end).
  void attend(int64_t begin, int64_t end) {
    const int64_t padded = round_up(end - begin, 4);
    pack_rows<LD>(p_, p_.k, true, scope_.start, scope_.head, begin, end, padded, 1.0f, keys_);
    pack_rows<LD>(p_, p_.v, false, scope_.start, scope_.head, begin, end, padded, 1.0f, values_);
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t query = query_of(block);
      const int64_t first_key = round_down(std::max<int64_t>(0, query - scope_.left), 4);
      const int64_t lo = std::max(begin, first_key);
      const int64_t hi = std::min(begin + padded,
                                  round_up(query + kQueries + scope_.right, 4));
      for (int64_t j = lo; j < hi;) {
        const int64_t next = single_pass_ ? hi : std::min(round_down(j, kKeyBlock) + kKeyBlock, hi);
        step(block, j, next, j == first_key, begin);
        j = next;
      }
    }
  }

  void step(int64_t block, int64_t key, int64_t key_end, bool first, int64_t pack_begin) {
    const float* k = keys_ + (key - pack_begin) * LD;
    const float* v = values_ + (key - pack_begin) * LD;
    const float* q = queries_ + block * LD * kQueries;
    float* out = outs_ + block * LD * kQueries;
    const int64_t rows = key_end - key;
    scores_of<LD, NV>(rows, p_.head_dim, k, q, scores_);
    softmax_block<NV>(scope_, query_of(block), key, key_end, first, scores_,
                      {tops_ + block * kQueries, sums_ + block * kQueries, factors_});
    const int64_t width = round_up(p_.head_dim, 4);
    if (first) {
      gemm<NV, Into::kOverwrite>(width, rows, v, 1, LD, scores_, kQueries, out, kQueries);
    } else {
      gemm<NV, Into::kScaleAdd>(width, rows, v, 1, LD, scores_, kQueries, out, kQueries, factors_);
    }
  }

  void finish(int64_t block) {
    const int64_t begin = query_of(block);
    const int64_t end = std::min<int64_t>(begin + kQueries, task_.end);
    const vf keep = set(p_.dropout.keep_scale);
    for (int v = 0; v < NV; ++v) {
      const int64_t at = block * kQueries + v * kLanes;
      const vf sum = load(sums_ + at);
      const vm empty = sum == zero();
      store(factors_ + v * kLanes, zero_unless(!empty, keep / sum));
      const vf lse = fma(load(tops_ + at), set(kLn2), log(sum));
      const vf defined = select(is_nan(sum), sum, lse);
      const vf minus_infinity = set(-std::numeric_limits<float>::infinity());
      const int64_t token = begin + v * kLanes;
      if (token < end) {
        store_n(call_.lse + scope_.head * p_.total_tokens + scope_.start + token,
                select(empty, minus_infinity, defined), lanes_left(end, token));
      }
    }
    transpose_out<LD, NV>(outs_ + block * LD * kQueries, p_.head_dim, factors_, rows_);
    unpack_rows<LD>(p_, call_.out, false, scope_.start, scope_.head, begin, end, 1.0f, rows_);
  }

  const AttentionForward& call_;
  const AttentionProblem& p_;
  const AttentionTask& task_;
  AttentionScope scope_;
  bool single_pass_;
  int64_t blocks_;
  float *keys_, *values_, *queries_, *outs_, *tops_, *sums_, *scores_, *rows_, *factors_;
};

// A window is served with as few queries a block as the registers allow, so that few of the
// columns computed are masked; long sequences with two vectors a block.
template <int LD>
void forward_task_of(const AttentionForward& call, const AttentionTask& task) {
#if FASTENC_ISA_LEVEL == FASTENC_ISA_AVX512
  const AttentionProblem& p = *call.problem;
  const int64_t n = p.length(task.seq);
  if (std::min(n, p.left(n) + p.right(n) + 1) <= kSinglePass - 2 * kLanes) {
    ForwardChunk<LD, 1>(call, task).run();
    return;
  }
#endif
  ForwardChunk<LD, 2>(call, task).run();
}

void forward_task(const AttentionForward& call, const AttentionTask& task) {
  const int64_t d = call.problem->head_dim;
  d <= 32    ? forward_task_of<32>(call, task)
  : d <= 64  ? forward_task_of<64>(call, task)
  : d <= 96  ? forward_task_of<96>(call, task)
  : d <= 128 ? forward_task_of<128>(call, task)
             : forward_task_of<kMaxHeadDim>(call, task);
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

// A task is a chunk of queries: 256 of them with the keys and values of a window, twice
// 96 KB at head_dim 64, fit the L2 caches of today.
constexpr int64_t kForwardChunk = 256;

std::tuple<Tensor, Tensor> forward(const AttentionProblem& p, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {p.total_tokens, p.heads, p.head_dim});
  Tensor lse = torch::stable::new_empty(like, {p.heads, p.total_tokens}, ScalarType::Float);
  const AttentionForward call{&p, rows_of("out", out), mutable_data<float>(lse)};
  const std::vector<AttentionTask> tasks = make_tasks(p, kForwardChunk);
  const auto run = FASTENC_FOR_ACTIVE_ISA(forward_task);
  run_tasks(costs_of(p, tasks), [&](int64_t i) { run(call, tasks[i]); });
  return {out, lse};
}

std::tuple<Tensor, Tensor> varlen_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens,
                                                int64_t max_seqlen, int64_t window_left,
                                                int64_t window_right, double scale,
                                                double dropout_p, std::optional<Tensor> seed,
                                                std::optional<Tensor> rel_bias) {
  FASTENC_COUNT_LAUNCH("varlen_attention");
  return forward(make_problem(q, k, v, cu_seqlens,
                              {max_seqlen, window_left, window_right, scale, dropout_p, seed},
                              rel_bias),
                 q);
}

std::tuple<Tensor, Tensor> rope_varlen_attention_fwd(Tensor qkv, Tensor cos, Tensor sin,
                                                     Tensor cu_seqlens, int64_t max_seqlen,
                                                     int64_t window_left, int64_t window_right,
                                                     double scale, double dropout_p,
                                                     std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("rope_varlen_attention");
  return forward(
      make_rope_problem(qkv, cos, sin, cu_seqlens,
                        {max_seqlen, window_left, window_right, scale, dropout_p, seed}),
      qkv);
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("varlen_attention_fwd", TORCH_BOX(&varlen_attention_fwd));
  m.impl("rope_varlen_attention_fwd", TORCH_BOX(&rope_varlen_attention_fwd));
}

}  // namespace
}  // namespace fastenc::cpu

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) { fastenc::cpu::register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) { fastenc::cpu::register_kernels(m); }

#endif
