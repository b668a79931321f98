// Disentangled attention, forward; fastenc/ops/disentangled_attention.py says what is computed.
//
// A task is 128 queries of one (sequence, head). For every 128 keys both position terms are made as
// products of at most 128 x 144, joined with the content term in the accumulators of its product,
// and met by the online softmax of varlen_attention.
//
// Floor: 8 L^2 head_dim FLOPs a head, at sgemm's rate; distances that share a bucket need fewer.
// One core of a Zen 4, CPU time, fp32, 12 heads of 64, one sequence, dropout 0.1, ms:
//   tokens                        128    384    668
//   v1 a column a distance        2.1   13.8   42.3
//   v2 a column a bucket          2.1   12.3   32.7   floor / measured 0.44, 0.68, 0.77
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/launch_counts.h"
#include "disentangled_problem.h"

#define FASTENC_KERNEL_FILE "../cpu/disentangled_attention.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "gemm_tile.h"

#include "attention_pack.h"
#include "attention_softmax.h"

#include "disentangled_positions.h"

namespace fastenc::cpu::FASTENC_ISA {

template <int LD>
class DisentangledChunk {
 public:
  static constexpr int NV = 2;
  static constexpr int64_t kQueries = NV * kLanes;
  static constexpr int64_t kBlocks = kPositionBlock / kQueries;

  DisentangledChunk(const DisentangledProblem& p, const PackedPositions& positions,
                    const AttentionForward& call, const AttentionTask& task)
      : p_(p), positions_(positions), call_(call), task_(task) {
    scope_ = make_scope(p, task.seq, task.head);
    blocks_ = (task.end - task.begin + kQueries - 1) / kQueries;
  }

  void run() {
    constexpr int64_t kRows = kPositionBlock * LD;
    carve_scratch({{&keys_, kRows},
                   {&values_, kRows},
                   {&query_rows_, kRows},
                   {&queries_, kBlocks * LD * kQueries},
                   {&outs_, kBlocks * LD * kQueries},
                   {&tops_, kPositionBlock},
                   {&sums_, kPositionBlock},
                   {&scores_, kPositionBlock * kQueries},
                   {&c2p_, kPositionBlock * kShearStride},
                   {&p2c_, kPositionBlock * kShearStride},
                   {&factors_, kQueries},
                   {&rows_, LD * kQueries}});
    pack_rows<LD>(p_, p_.q, false, scope_.start, scope_.head, task_.begin, task_.end,
                  kPositionBlock, query_scale(p_), query_rows_);
    for (int64_t block = 0; block < blocks_; ++block) {
      transpose_in<LD, NV>(query_rows_ + block * kQueries * LD, p_.head_dim,
                           queries_ + block * LD * kQueries);
    }
    for (int64_t key = 0; key < scope_.length; key += kPositionBlock) {
      attend(key, std::min(key + kPositionBlock, scope_.length));
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      finish(block);
    }
  }

 private:
  int64_t query_of(int64_t block) const { return task_.begin + block * kQueries; }

  void attend(int64_t begin, int64_t end) {
    pack_rows<LD>(p_, p_.k, false, scope_.start, scope_.head, begin, end, kPositionBlock, 1.0f,
                  keys_);
    const int64_t rows = round_up(end - begin, 4);
    pack_rows<LD>(p_, p_.v, false, scope_.start, scope_.head, begin, end, rows, 1.0f, values_);
    const int64_t keys = round_up(end - begin, kShear);
    const int64_t queries = blocks_ * kQueries;
    PositionBlock c2p{}, p2c{};
    if (p_.key) {
      c2p = {c2p_, p_.key->columns_of(task_.begin, begin)};
      position_products<LD>(query_rows_, queries, p_.head_dim, positions_.key_of(scope_.head),
                            p_.key->columns, c2p.columns, keys, c2p_);
    }
    if (p_.query) {
      p2c = {p2c_, p_.query->columns_of(begin, task_.begin)};
      position_products<LD>(keys_, keys, p_.head_dim, positions_.query_of(scope_.head),
                            p_.query->columns, p2c.columns, queries, p2c_);
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      for (int v = 0; v < NV; ++v) {
        join_positions<NV>(c2p, p2c, block * kQueries + v * kLanes, keys, scores_ + v * kLanes);
      }
      step(block, begin, begin + rows);
    }
  }

  void step(int64_t block, int64_t key, int64_t key_end) {
    const float* q = queries_ + block * LD * kQueries;
    float* out = outs_ + block * LD * kQueries;
    const int64_t rows = key_end - key;
    constexpr int64_t kPart = 128;  // the sum in parts for accuracy
    for (int64_t d = 0; d < p_.head_dim; d += kPart) {
      gemm<NV, Into::kAdd>(rows, std::min(kPart, p_.head_dim - d), keys_ + d, LD, 1,
                           q + d * kQueries, kQueries, scores_, kQueries);
    }
    softmax_block<NV>(scope_, query_of(block), key, key_end, key == 0, scores_,
                      {tops_ + block * kQueries, sums_ + block * kQueries, factors_});
    const int64_t width = round_up(p_.head_dim, 4);
    if (key == 0) {
      gemm<NV, Into::kOverwrite>(width, rows, values_, 1, LD, scores_, kQueries, out, kQueries);
    } else {
      gemm<NV, Into::kScaleAdd>(width, rows, values_, 1, LD, scores_, kQueries, out, kQueries,
                                factors_);
    }
  }

  void finish(int64_t block) {
    const int64_t begin = query_of(block);
    const int64_t end = std::min<int64_t>(begin + kQueries, task_.end);
    for (int v = 0; v < NV; ++v) {
      const int64_t at = block * kQueries + v * kLanes;
      const vf sum = load(sums_ + at);
      store(factors_ + v * kLanes, set(p_.dropout.keep_scale) / sum);
      const int64_t token = begin + v * kLanes;
      if (token < end) {
        const vf top = load(tops_ + at);
        const vf lse = fma(top, set(scope_.unit), log(sum));
        store_n(call_.lse + scope_.head * p_.total_tokens + scope_.start + token,
                select(is_nan(sum), sum, lse), lanes_left(end, token));
      }
    }
    transpose_out<LD, NV>(outs_ + block * LD * kQueries, p_.head_dim, factors_, rows_);
    unpack_rows<LD>(p_, call_.out, false, scope_.start, scope_.head, begin, end, 1.0f, rows_);
  }

  const DisentangledProblem& p_;
  const PackedPositions& positions_;
  const AttentionForward& call_;
  const AttentionTask& task_;
  AttentionScope scope_;
  int64_t blocks_;
  float *keys_, *values_, *query_rows_, *queries_, *outs_, *tops_, *sums_, *scores_, *c2p_, *p2c_;
  float *factors_, *rows_;
};

void disentangled_task(const DisentangledProblem& p, const PackedPositions& positions,
                       const AttentionForward& call, const AttentionTask& task) {
  const int64_t stride = disentangled_stride(p.head_dim);
  stride == 32    ? DisentangledChunk<32>(p, positions, call, task).run()
  : stride == 64  ? DisentangledChunk<64>(p, positions, call, task).run()
  : stride == 128 ? DisentangledChunk<128>(p, positions, call, task).run()
                  : DisentangledChunk<kMaxHeadDim>(p, positions, call, task).run();
}

// Query-position rows carry the scale that the packed queries carry.
void pack_head(const DisentangledProblem& p, int64_t head, const PackedPositions& to) {
  if (to.key) {
    pack_positions(*p.key, head, p.head_dim, 1.0f, to.key.get() + head * to.head_floats);
  }
  if (to.query) {
    pack_positions(*p.query, head, p.head_dim, query_scale(p),
                   to.query.get() + head * to.head_floats);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

std::tuple<Tensor, Tensor> disentangled_attention_fwd(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> pos_key, std::optional<Tensor> pos_query,
    Tensor rel_index, Tensor cu_seqlens, int64_t max_seqlen, double scale, double dropout_p,
    std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("disentangled_attention");
  const DisentangledProblem p =
      make_disentangled_problem(q, k, v, pos_key, pos_query, rel_index, cu_seqlens,
                                {max_seqlen, -1, -1, scale, dropout_p, seed});
  Tensor out = torch::stable::new_empty(q, {p.total_tokens, p.heads, p.head_dim});
  Tensor lse = torch::stable::new_empty(q, {p.heads, p.total_tokens}, ScalarType::Float);
  const AttentionForward call{&p, rows_of("out", out), mutable_data<float>(lse)};

  PackedPositions positions;
  positions.head_floats = p.packed_floats();
  if (p.key) {
    positions.key.reset(new float[p.heads * positions.head_floats]);
  }
  if (p.query) {
    positions.query.reset(new float[p.heads * positions.head_floats]);
  }
  const auto pack = FASTENC_FOR_ACTIVE_ISA(pack_head);
  parallel_for(p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      pack(p, head, positions);
    }
  });
  const std::vector<AttentionTask> tasks = make_tasks(p, kPositionBlock);
  const auto run = FASTENC_FOR_ACTIVE_ISA(disentangled_task);
  run_tasks(costs_of(p, tasks), [&](int64_t i) { run(p, positions, call, tasks[i]); });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("disentangled_attention_fwd", TORCH_BOX(&disentangled_attention_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("disentangled_attention_fwd", TORCH_BOX(&disentangled_attention_fwd));
}

}  // namespace fastenc::cpu
#endif
