// Scores of words against labels, forward; fastenc/ops/token_score.py says what is computed.
//
// The weight is packed once a call. A task is 48 pairs: their factor rows are made in scratch, and
// 256 hidden elements of each at a time are multiplied out, activated and met by the three rows of
// out_weight while they are in L1.
//
// Floor: 2 pairs R D FLOPs at the rate of sgemm; packing adds a pass over the weight, which shows
// where a call has few pairs.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/launch_counts.h"
#include "token_problem.h"

#define FASTENC_KERNEL_FILE "../cpu/token_score.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "gemm_tile.h"
#include "span_rows.h"
#include "token_rows.h"

namespace fastenc::cpu::FASTENC_ISA {

// out (count, 3) of the pairs [first, first + count).
inline void score_pairs(const TokenProblem& p, const float* packed, int64_t first, int64_t count,
                        float* out) {
  const int64_t ldx = token_stride(p.factors);
  float *x, *h, *keep;
  carve_scratch({{&x, kTokenRows * ldx},
                 {&h, kTokenRows * kSpanStride},
                 {&keep, std::max<int64_t>(kSpanChunk, kLanes * kLanes)}});
  make_factors(p, first, count, ldx, x);
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t o = 0; o < kTokenOutputs; ++o) {
      out[s * kTokenOutputs + o] = p.out_bias == nullptr ? 0.0f : p.out_bias[o];
    }
  }
  for (int64_t r = 0; r < p.size; r += kSpanChunk) {
    const int64_t n = std::min(kSpanChunk, p.size - r);
    make_hidden(p, packed, first, count, r, n, x, ldx, keep, h);
    const float* weight = p.out_weight + r;
    for (int64_t s = 0; s < count; ++s) {
      vf sums[kTokenOutputs] = {zero(), zero(), zero()};
      for (int64_t i = 0; i < n; i += kLanes) {
        const vf y = load(h + s * kSpanStride + i);
        for (int64_t o = 0; o < kTokenOutputs; ++o) {
          sums[o] = fma(y, load_up_to(weight + o * p.size + i, lanes_of(n, i)), sums[o]);
        }
      }
      for (int64_t o = 0; o < kTokenOutputs; ++o) {
        out[s * kTokenOutputs + o] += sum(sums[o]);
      }
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

Tensor token_score_fwd(const Tensor& token, const Tensor& label, const Tensor& token_factor,
                       const Tensor& label_factor, const Tensor& weight, const Tensor& out_weight,
                       const Tensor& cu_words, std::optional<Tensor> out_bias, double dropout_p,
                       std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("token_score");
  TokenProblem p = make_token_problem(token, label, token_factor, label_factor, weight, out_weight,
                                      cu_words, out_bias);
  set_dropout(&p, dropout_p, seed);
  Tensor out = torch::stable::new_empty(p.tensors[0], {p.words, p.labels, kTokenOutputs});
  const Tensor packed =
      pack_panels(p, p.size, p.factors, p.weight, FASTENC_FOR_ACTIVE_ISA(panel_columns)(),
                  FASTENC_FOR_ACTIVE_ISA(pack_transposed));
  const auto run = FASTENC_FOR_ACTIVE_ISA(score_pairs);
  parallel_for(p.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kTokenRows;
      run(p, data<float>(packed), first, std::min(kTokenRows, p.pairs() - first),
          mutable_data<float>(out) + first * kTokenOutputs);
    }
  });
  return narrowed(out, p.dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("token_score_fwd", TORCH_BOX(&token_score_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("token_score_fwd", TORCH_BOX(&token_score_fwd));
}

}  // namespace fastenc::cpu
#endif
