// Scores of words against labels, backward; fastenc/ops/token_score.py says what is computed. With
// X = token_factor * label_factor and Y = the hidden rows, made again, and G the incoming gradient:
//
//   dY = G out_weight, where Y > 0, over 1 - p      dX = dY weight
//   dtoken_i = sum_c dY      dlabel_c = sum_i dY    dweight = dY^T X    dout_weight = G^T Y
//   dtoken_factor_i = sum_c dX label_factor_c       dlabel_factor_c = sum_i dX token_factor_i
//
// Pairs are taken 1536 at a time, whose X, dY and dX are kept (19 MB at D = 512). Each pass makes
// them block by block, then sums over pairs column by column: every sum has one order, and nothing
// depends on the number of threads.
//
// Floor: 6 pairs R D FLOPs at the rate of sgemm.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/launch_counts.h"
#include "token_problem.h"

#ifndef FASTENC_TOKEN_PASS
#define FASTENC_TOKEN_PASS
namespace fastenc::cpu {

constexpr int64_t kBlocksOfPass = 32;
// Columns of the weight in one task of sums over pairs.
constexpr int64_t kSumColumns = 64;

// The pairs [first, first + count), and what is kept of them. Rows past the last, up to a multiple
// of four, are zeros.
struct TokenPass {
  int64_t first = 0;
  int64_t count = 0;
  int64_t ldh, ldx;    // row strides
  float* dhidden;      // (pairs, R)
  float* factors;      // (pairs, D)
  float* dfactors;     // (pairs, D)
  float* dout_weight;  // (blocks, 3, R), a partial sum a block
  const float* grad;   // (all pairs, 3)
  const float* hidden_panels;
  const float* factor_panels;
};

struct TokenGradients {
  float* token;
  float* label;
  float* token_factor;
  float* label_factor;
  float* weight;  // rows of ldw, a multiple of four of them
  float* out_weight;
  int64_t ldw;
};

}  // namespace fastenc::cpu
#endif

#define FASTENC_KERNEL_FILE "../cpu/token_score_bwd.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "gemm_tile.h"
#include "span_rows.h"
#include "token_rows.h"

namespace fastenc::cpu::FASTENC_ISA {

FASTENC_INLINE void add_to(float* to, vf x, int some) {
  store_up_to(to, load_up_to(to, some) + x, some);
}

// Turns a row of Y into dY, and adds g Y to the block's part of dout_weight.
FASTENC_INLINE void differentiate_row(const TokenProblem& p, const float* g, int64_t r, int64_t n,
                                      float* part, float* y) {
  const vf scale = set(p.dropout.active() ? p.dropout.keep_scale : 1.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int some = lanes_of(n, i);
    const vf hidden = load(y + i);
    vf d = zero();
    for (int64_t o = 0; o < kTokenOutputs; ++o) {
      d = fma(set(g[o]), load_up_to(p.out_weight + o * p.size + r + i, some), d);
      add_to(part + o * p.size + i, set(g[o]) * hidden, some);
    }
    store(y + i, zero_unless(hidden > zero(), d * scale));
  }
}

// X, dY, dX and the part of dout_weight of one block of a pass.
inline void differentiate_block(const TokenProblem& p, const TokenPass& pass, int64_t block) {
  const int64_t at = block * kTokenRows;
  const int64_t count = std::min(kTokenRows, pass.count - at);
  const int64_t rows = round_up(count, 4);
  float *h, *keep;
  carve_scratch({{&h, kTokenRows * kSpanStride}, {&keep, kSpanChunk}});
  float* x = pass.factors + at * pass.ldx;
  float* dx = pass.dfactors + at * pass.ldx;
  float* part = pass.dout_weight + block * kTokenOutputs * p.size;
  std::fill_n(part, kTokenOutputs * p.size, 0.0f);
  make_factors(p, pass.first + at, count, pass.ldx, x);
  for (int64_t r = 0; r < p.size; r += kSpanChunk) {
    const int64_t n = std::min(kSpanChunk, p.size - r);
    make_hidden(p, pass.hidden_panels, pass.first + at, count, r, n, x, pass.ldx, keep, h);
    for (int64_t s = 0; s < rows; ++s) {
      float* y = h + s * kSpanStride;
      if (s < count) {
        differentiate_row(p, pass.grad + (pass.first + at + s) * kTokenOutputs, r, n, part + r, y);
      } else {
        clear_row(n, y);
      }
      float* to = pass.dhidden + (at + s) * pass.ldh + r;
      for (int64_t i = 0; i < n; i += kLanes) {
        store(to + i, load(y + i));
      }
    }
    const float* panels = pass.factor_panels + r * kPanel;
    if (r == 0) {
      multiply_panels<false>(rows, n, h, kSpanStride, 1, panels, p.size, p.factors, dx, pass.ldx);
    } else {
      multiply_panels<true>(rows, n, h, kSpanStride, 1, panels, p.size, p.factors, dx, pass.ldx);
    }
  }
}

// Columns [r, r + n) of R, summed over the pairs of a pass.
inline void sum_hidden(const TokenProblem& p, const TokenPass& pass, const TokenGradients& g,
                       int64_t r, int64_t n) {
  PairWalk walk(p, pass.first);
  for (int64_t s = 0; s < pass.count; ++s, walk.advance()) {
    const TokenPair pair = walk.here();
    const float* d = pass.dhidden + s * pass.ldh + r;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int some = lanes_of(n, i);
      add_to(g.token + pair.word * p.size + r + i, load(d + i), some);
      add_to(g.label + pair.label_row * p.size + r + i, load(d + i), some);
    }
  }
  for (int64_t block = 0; block * kTokenRows < pass.count; ++block) {
    for (int64_t o = 0; o < kTokenOutputs; ++o) {
      const float* part = pass.dout_weight + (block * kTokenOutputs + o) * p.size + r;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int some = lanes_of(n, i);
        add_to(g.out_weight + o * p.size + r + i, load_up_to(part + i, some), some);
      }
    }
  }
  // Rows of dY past R are zeros: dY^T X may be taken four rows at a time.
  const int64_t pairs = round_up(pass.count, 4);
  for (int64_t s = 0; s < pairs; s += kSpanChunk) {
    for (int64_t d = 0; d < p.factors; d += kPanel) {
      gemm<2, Into::kAdd>(
          round_up(n, 4), std::min(kSpanChunk, pairs - s), pass.dhidden + s * pass.ldh + r, 1,
          pass.ldh, pass.factors + s * pass.ldx + d, pass.ldx, g.weight + r * g.ldw + d, g.ldw);
    }
  }
}

// Columns [d, d + n) of D, summed over the pairs of a pass.
inline void sum_factors(const TokenProblem& p, const TokenPass& pass, const TokenGradients& g,
                        int64_t d, int64_t n) {
  PairWalk walk(p, pass.first);
  for (int64_t s = 0; s < pass.count; ++s, walk.advance()) {
    const TokenPair pair = walk.here();
    const int64_t token = pair.word * p.factors + d, label = pair.label_row * p.factors + d;
    const float* dx = pass.dfactors + s * pass.ldx + d;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int some = lanes_of(n, i);
      add_to(g.token_factor + token + i,
             load(dx + i) * load_up_to(p.label_factor + label + i, some), some);
      add_to(g.label_factor + label + i,
             load(dx + i) * load_up_to(p.token_factor + token + i, some), some);
    }
  }
}

inline int64_t token_row_stride(int64_t n) { return token_stride(n); }

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

using TokenGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor sum_grads(const Tensor& grad, int64_t pairs) {
  double sums[kTokenOutputs] = {};
  const float* g = data<float>(grad);
  for (int64_t i = 0; i < pairs; ++i) {
    for (int64_t o = 0; o < kTokenOutputs; ++o) {
      sums[o] += g[i * kTokenOutputs + o];
    }
  }
  Tensor out = torch::stable::new_empty(grad, {kTokenOutputs});
  std::copy_n(sums, kTokenOutputs, mutable_data<float>(out));
  return out;
}

void run_pass(const TokenProblem& p, const TokenPass& pass, const TokenGradients& g) {
  const auto block = FASTENC_FOR_ACTIVE_ISA(differentiate_block);
  const auto hidden = FASTENC_FOR_ACTIVE_ISA(sum_hidden);
  const auto factors = FASTENC_FOR_ACTIVE_ISA(sum_factors);
  const int64_t blocks = (pass.count + kTokenRows - 1) / kTokenRows;
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      block(p, pass, i);
    }
  });
  const int64_t of_hidden = (p.size + kSumColumns - 1) / kSumColumns;
  // Without hidden elements there is no dX.
  const int64_t of_factors = p.size > 0 ? (p.factors + kSumColumns - 1) / kSumColumns : 0;
  std::vector<int64_t> costs(of_hidden + of_factors, 1);
  std::fill_n(costs.begin(), of_hidden, p.factors + 1);
  run_tasks(costs, [&](int64_t i) {
    const int64_t at = (i < of_hidden ? i : i - of_hidden) * kSumColumns;
    const int64_t n = std::min(kSumColumns, (i < of_hidden ? p.size : p.factors) - at);
    i < of_hidden ? hidden(p, pass, g, at, n) : factors(p, pass, g, at, n);
  });
}

TokenGrads token_score_bwd(const Tensor& grad_in, const Tensor& token, const Tensor& label,
                           const Tensor& token_factor, const Tensor& label_factor,
                           const Tensor& weight, const Tensor& out_weight, const Tensor& cu_words,
                           double dropout_p, std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("token_score_bwd");
  TokenProblem p = make_token_problem(token, label, token_factor, label_factor, weight, out_weight,
                                      cu_words, std::nullopt);
  set_dropout(&p, dropout_p, seed);
  check_shape("grad", grad_in, {p.words, p.labels, kTokenOutputs});
  check_dtype("grad", grad_in, p.dtype);
  const Tensor grad = widened(grad_in);
  const int64_t width = FASTENC_FOR_ACTIVE_ISA(panel_columns)();
  const int64_t ldh = FASTENC_FOR_ACTIVE_ISA(token_row_stride)(p.size);
  const int64_t ldx = FASTENC_FOR_ACTIVE_ISA(token_row_stride)(p.factors);
  const int64_t most = std::min(kBlocksOfPass, p.blocks());

  const Tensor& like = p.tensors[0];
  std::vector<Tensor> sums;
  const auto zeros = [&](std::initializer_list<int64_t> shape) {
    sums.push_back(torch::stable::new_zeros(like, shape));
    return mutable_data<float>(sums.back());
  };
  TokenGradients g;
  g.token = zeros({p.words, p.size});
  g.label = zeros({p.num_seqs, p.labels, p.size});
  g.token_factor = zeros({p.words, p.factors});
  g.label_factor = zeros({p.num_seqs, p.labels, p.factors});
  g.ldw = ldx;
  g.weight = zeros({(p.size + 3) / 4 * 4, ldx});
  g.out_weight = zeros({kTokenOutputs, p.size});

  const auto empty = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(like, shape);
  };
  const Tensor dhidden = empty({most * kTokenRows, ldh}), factors = empty({most * kTokenRows, ldx});
  const Tensor dfactors = empty({most * kTokenRows, ldx});
  const Tensor parts = empty({most, kTokenOutputs, p.size});
  const Tensor hidden_panels =
      pack_panels(p, p.size, p.factors, p.weight, width, FASTENC_FOR_ACTIVE_ISA(pack_transposed));
  const Tensor factor_panels =
      pack_panels(p, p.factors, p.size, p.weight, width, FASTENC_FOR_ACTIVE_ISA(pack_columns));
  TokenPass pass{.ldh = ldh,
                 .ldx = ldx,
                 .dhidden = mutable_data<float>(dhidden),
                 .factors = mutable_data<float>(factors),
                 .dfactors = mutable_data<float>(dfactors),
                 .dout_weight = mutable_data<float>(parts),
                 .grad = data<float>(grad),
                 .hidden_panels = data<float>(hidden_panels),
                 .factor_panels = data<float>(factor_panels)};
  for (; pass.first < p.pairs(); pass.first += pass.count) {
    pass.count = std::min(kBlocksOfPass * kTokenRows, p.pairs() - pass.first);
    run_pass(p, pass, g);
  }
  Tensor dweight = torch::stable::new_empty(like, {p.size, p.factors});
  for (int64_t r = 0; r < p.size; ++r) {
    std::copy_n(g.weight + r * g.ldw, p.factors, mutable_data<float>(dweight) + r * p.factors);
  }
  const auto out = [&](const Tensor& x) { return narrowed(x, p.dtype); };
  return {out(sums[0]),
          out(sums[1]),
          out(sums[2]),
          out(sums[3]),
          out(dweight),
          out(sums[5]),
          out(sum_grads(grad, p.pairs()))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("token_score_bwd", TORCH_BOX(&token_score_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("token_score_bwd", TORCH_BOX(&token_score_bwd));
}

}  // namespace fastenc::cpu
#endif
