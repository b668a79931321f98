// Packed attention, forward; fastenc/ops/varlen_attention.py says what is computed.
//
// Lanes are queries: scores are kept transposed, (keys, queries), so that softmax needs no
// horizontal operation, only a window's edge rows are masked, and all matrix work is gemm_tile.h.
//
// Measured in fp32, head_dim 64, 12 heads, RoPE included, as a share of MKL's sgemm (2048x768x2304)
// timed in the same run, useful FLOPs only. Zen 4, one thread, best CPU time of each (the machine
// was shared), 2026-11-23. Prediction for a window of 64: a tile runs at 1.17 of sgemm, 129 of 144
// columns are useful, exp costs 8%, packing and rotation 10%: 0.87.
//
//                                                         window 64         no window
//   AVX-512                                            4x512   1x8192    4x512   1x2048
//   1  256 queries a task, online state for all         0.67     0.58     1.00     1.03
//   2  prefetch (a row is a page from the next), a
//      chunk's heads in turn: they share its pages      0.70     0.77 *
//   3  512 queries, a window's state for one block,
//      prefetch of the next block                       0.68     0.69     0.96     1.00
//   AVX2 (MKL held to AVX2 too)
//   1                                                   0.61     0.51     0.89     0.90
//   3                                                   0.68     0.69     0.92
//
// (*) Other work slowed sgemm more than this kernel in that run; row 3 was timed on a quieter
// machine than rows 1 and 2. What is left under the prediction is memory: each
// row of a head is a page of its own in a packed qkv. torch's sdpa with a mask takes 4x the time
// at 4x512, 70x at 1x8192.
//
// The whole grid on a quiet machine, medians of wall time (`python -m bench.attention_rate --rounds
// 5`, 2026-11-25, torch 2.13, MKL held to the same instruction set and threads); the goals are 0.60
// with the window and 0.65 without:
//
//                            window 64                       no window
//   sgemm GFLOP/s     8x128  4x512  1x2048  1x8192    8x128  4x512  1x2048  1x8192
//   AVX-512, 1   100   0.70   0.68    0.68    0.70     0.77   0.97    0.99    0.98
//   AVX-512, 2   176   0.72   0.71    0.68    0.91     0.94   1.11    1.26    1.39
//   AVX2, 1       97   0.67   0.71    0.66    0.69     0.79   0.92    0.92    0.87
//   AVX2, 2      168   0.67   0.83    0.72    0.73     0.88   0.93    1.02    0.99
//
// Zen 3 (AVX2 only), two threads, 2026-11-30, sgemm 136: 0.90, 0.68, 0.68, 0.72 and 0.78, 0.86,
// 0.98, 0.87. There, one thread, a block of 16 queries with a window of 64 takes 10 us: products
// 6.6 (0.90 of the peak), softmax 0.9, packing and writing 2.7 to 3.3, which is memory. Tried, no
// gain there: keys in a ring that stays in L2 with the next block's rows prefetched between the
// tiles of this one's products (the products lose what the packing wins), tasks of 128 and 256
// queries, rows packed without a loop (twice as fast from L1, not from memory), huge pages, the
// output stored past the caches (0 to 3% beside other work, none with the product that reads it).

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

template <int LD, int NV>
class ForwardChunk {
 public:
  static constexpr int64_t kQueries = NV * kLanes;

  ForwardChunk(const AttentionForward& call, const AttentionTask& task)
      : call_(call),
        p_(*call.problem),
        task_(task),
        scope_(make_scope(*call.problem, task.seq, task.head)) {
    single_pass_ = most_keys(scope_, kQueries) <= kSinglePass;
    blocks_ = (task.end - task.begin + kQueries - 1) / kQueries;
  }

  void run() {
    const int64_t keys_begin = round_down(std::max<int64_t>(0, task_.begin - scope_.left), 4);
    const int64_t keys_end = std::min(scope_.length, task_.end + scope_.right);
    const int64_t pack_rows_max = round_up(single_pass_ ? keys_end - keys_begin : kKeyPack, 4);
    const int64_t slots = single_pass_ ? 1 : blocks_;
    float* bias;
    carve_scratch({{&keys_, pack_rows_max * LD},
                   {&values_, pack_rows_max * LD},
                   {&queries_, slots * LD * kQueries},
                   {&outs_, slots * LD * kQueries},
                   {&tops_, slots * kQueries},
                   {&sums_, slots * kQueries},
                   {&scores_, kSinglePass * kQueries},
                   {&rows_, LD * kQueries},
                   {&factors_, kQueries},
                   {&bias, bias_size(p_, scope_)}});
    expand_bias(p_, &scope_, bias);
    if (single_pass_) {
      pack_keys(keys_begin, keys_end);
      for (int64_t block = 0; block < blocks_; ++block) {
        pack_queries(block);
        attend(block, keys_begin, keys_end);
        finish(block);
      }
      return;
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      pack_queries(block);
    }
    for (int64_t begin = keys_begin; begin < keys_end;) {
      const int64_t end = std::min(round_down(begin, kKeyPack) + kKeyPack, keys_end);
      pack_keys(begin, end);
      for (int64_t block = 0; block < blocks_; ++block) {
        attend(block, begin, end);
      }
      begin = end;
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      finish(block);
    }
  }

 private:
  int64_t query_of(int64_t block) const { return task_.begin + block * kQueries; }

  // Where the state of a block is kept: all blocks' between packs, else one's.
  int64_t slot(int64_t block) const { return single_pass_ ? 0 : block; }

  void pack_queries(int64_t block) {
    const int64_t begin = query_of(block);
    const int64_t end = std::min<int64_t>(begin + kQueries, task_.end);
    pack_rows<LD>(p_, p_.q, true, scope_.start, scope_.head, begin, end, kQueries, query_scale(p_),
                  rows_);
    transpose_in<LD, NV>(rows_, p_.head_dim, queries_ + slot(block) * LD * kQueries);
  }

  void pack_keys(int64_t begin, int64_t end) {
    const int64_t padded = round_up(end - begin, 4);
    pack_rows<LD>(p_, p_.k, true, scope_.start, scope_.head, begin, end, padded, 1.0f, keys_);
    pack_rows<LD>(p_, p_.v, false, scope_.start, scope_.head, begin, end, padded, 1.0f, values_);
  }

  // One block of queries against the packed keys [begin, end).
  void attend(int64_t block, int64_t begin, int64_t end) {
    const int64_t query = query_of(block);
    const int64_t first_key = round_down(std::max<int64_t>(0, query - scope_.left), 4);
    const int64_t lo = std::max(begin, first_key);
    const int64_t hi =
        std::min(begin + round_up(end - begin, 4), round_up(query + kQueries + scope_.right, 4));
    for (int64_t j = lo; j < hi;) {
      const int64_t next = single_pass_ ? hi : std::min(round_down(j, kKeyBlock) + kKeyBlock, hi);
      step(block, j, next, j == first_key, begin);
      j = next;
    }
  }

  void step(int64_t block, int64_t key, int64_t key_end, bool first, int64_t pack_begin) {
    const float* k = keys_ + (key - pack_begin) * LD;
    const float* v = values_ + (key - pack_begin) * LD;
    const float* q = queries_ + slot(block) * LD * kQueries;
    float* out = outs_ + slot(block) * LD * kQueries;
    const int64_t rows = key_end - key;
    scores_of<LD, NV>(rows, p_.head_dim, k, q, scores_);
    softmax_block<NV>(scope_, query_of(block), key, key_end, first, scores_,
                      {tops_ + slot(block) * kQueries, sums_ + slot(block) * kQueries, factors_});
    // Long sums are sums of parts, for accuracy: see scores_of.
    constexpr int64_t kPart = FASTENC_ISA_LEVEL == FASTENC_ISA_PORTABLE ? 16 : 128;
    const int64_t width = round_up(p_.head_dim, 4);
    for (int64_t j = 0; j < rows; j += kPart) {
      const int64_t count = std::min(kPart, rows - j);
      const float* from = v + j * LD;
      const float* weights = scores_ + j * kQueries;
      if (j > 0) {
        gemm<NV, Into::kAdd>(width, count, from, 1, LD, weights, kQueries, out, kQueries);
      } else if (first) {
        gemm<NV, Into::kOverwrite>(width, count, from, 1, LD, weights, kQueries, out, kQueries);
      } else {
        gemm<NV, Into::kScaleAdd>(width, count, from, 1, LD, weights, kQueries, out, kQueries,
                                  factors_);
      }
    }
  }

  void finish(int64_t block) {
    const int64_t begin = query_of(block);
    const int64_t end = std::min<int64_t>(begin + kQueries, task_.end);
    const vf keep = set(p_.dropout.keep_scale);
    for (int v = 0; v < NV; ++v) {
      const int64_t at = slot(block) * kQueries + v * kLanes;
      const vf sum = load(sums_ + at);
      const vm empty = sum == zero();
      store(factors_ + v * kLanes, zero_unless(!empty, keep / sum));
      const int64_t token = begin + v * kLanes;
      if (call_.lse != nullptr && token < end) {
        const vf lse = fma(load(tops_ + at), set(scope_.unit), log(sum));
        const vf defined = select(is_nan(sum), sum, lse);
        const vf minus_infinity = set(-std::numeric_limits<float>::infinity());
        store_n(call_.lse + scope_.head * p_.total_tokens + scope_.start + token,
                select(empty, minus_infinity, defined), lanes_left(end, token));
      }
    }
    transpose_out<LD, NV>(outs_ + slot(block) * LD * kQueries, p_.head_dim, factors_, rows_);
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
  if (most_keys(make_scope(*call.problem, task.seq, task.head), kLanes) <= kSinglePass) {
    ForwardChunk<LD, 1>(call, task).run();
    return;
  }
#endif
  ForwardChunk<LD, 2>(call, task).run();
}

void forward_task(const AttentionForward& call, const AttentionTask& task) {
  const int64_t stride = scratch_stride(call.problem->head_dim);
  stride == 32    ? forward_task_of<32>(call, task)
  : stride == 64  ? forward_task_of<64>(call, task)
  : stride == 96  ? forward_task_of<96>(call, task)
  : stride == 128 ? forward_task_of<128>(call, task)
                  : forward_task_of<kMaxHeadDim>(call, task);
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

// Queries in a task: a window of 128 makes 5/4 of them keys to pack, 320 KB at head_dim 64.
constexpr int64_t kForwardChunk = 512;

void run(const AttentionProblem& p, const Tensor& out, float* lse) {
  const AttentionForward call{&p, rows_of("out", out), lse};
  const std::vector<AttentionTask> tasks = make_tasks(p, kForwardChunk);
  const auto kernel = FASTENC_FOR_ACTIVE_ISA(forward_task);
  run_tasks(costs_of(p, tasks), [&](int64_t i) { kernel(call, tasks[i]); });
}

std::tuple<Tensor, Tensor> forward(const AttentionProblem& p, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {p.total_tokens, p.heads, p.head_dim});
  Tensor lse = torch::stable::new_empty(like, {p.heads, p.total_tokens}, ScalarType::Float);
  run(p, out, mutable_data<float>(lse));
  return {out, lse};
}

std::tuple<Tensor, Tensor> varlen_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens,
                                                int64_t max_seqlen, int64_t window_left,
                                                int64_t window_right, double scale,
                                                double dropout_p, std::optional<Tensor> seed,
                                                std::optional<Tensor> rel_bias) {
  FASTENC_COUNT_LAUNCH("varlen_attention");
  return forward(
      make_problem(q, k, v, cu_seqlens,
                   {max_seqlen, window_left, window_right, scale, dropout_p, seed}, rel_bias),
      q);
}

std::tuple<Tensor, Tensor> rope_varlen_attention_fwd(Tensor qkv, Tensor cos, Tensor sin,
                                                     Tensor cu_seqlens, int64_t max_seqlen,
                                                     int64_t window_left, int64_t window_right,
                                                     double scale, double dropout_p,
                                                     std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("rope_varlen_attention");
  return forward(make_rope_problem(qkv, cos, sin, cu_seqlens,
                                   {max_seqlen, window_left, window_right, scale, dropout_p, seed}),
                 qkv);
}

void rope_varlen_attention_into_fwd(Tensor qkv, Tensor cos, Tensor sin, Tensor cu_seqlens,
                                    int64_t max_seqlen, int64_t window_left, int64_t window_right,
                                    double scale, Tensor out) {
  FASTENC_COUNT_LAUNCH("rope_varlen_attention");
  const OwnedProblem p = make_rope_problem(
      qkv, cos, sin, cu_seqlens, {max_seqlen, window_left, window_right, scale, 0.0, std::nullopt});
  check_dtype("out", out, qkv.scalar_type());
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == p.total_tokens && out.size(1) == p.heads &&
                      out.size(2) == p.head_dim && out.is_contiguous(),
                  "out: expected contiguous (", p.total_tokens, ", ", p.heads, ", ", p.head_dim,
                  ")");
  run(p, out, nullptr);
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("varlen_attention_fwd", TORCH_BOX(&varlen_attention_fwd));
  m.impl("rope_varlen_attention_fwd", TORCH_BOX(&rope_varlen_attention_fwd));
  m.impl("rope_varlen_attention_into_fwd", TORCH_BOX(&rope_varlen_attention_into_fwd));
}

}  // namespace
}  // namespace fastenc::cpu

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) { fastenc::cpu::register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) { fastenc::cpu::register_kernels(m); }

#endif
