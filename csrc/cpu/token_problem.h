// What a token-scoring call is, independent of the instruction set; fastenc/ops/token_score.py says
// what is computed. Every tensor is taken to fp32 first: the products, 8 D^2 FLOPs a pair, leave
// the conversions far behind.
//
// A pair is a word and a label of its sequence; pairs are counted in the order of the output, over
// all sequences, and a block is kTokenRows of them in turn. A pair's arithmetic does not depend on
// the block or the row that it falls into.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "span_problem.h"

namespace fastenc::cpu {

// The fourth Philox counter of token dropout; see fastenc/ops/token_score.py.
constexpr int32_t kTokenTag = 2;
constexpr int64_t kTokenOutputs = 3;
// Pairs in one product: a multiple of every tile's rows.
constexpr int64_t kTokenRows = 48;

struct TokenProblem {
  int64_t words = 0;
  int64_t num_seqs = 0;
  int64_t labels = 0;   // C, of each sequence
  int64_t size = 0;     // R
  int64_t factors = 0;  // D
  const int32_t* cu_words = nullptr;
  const float* token = nullptr;
  const float* label = nullptr;
  const float* token_factor = nullptr;
  const float* label_factor = nullptr;
  const float* weight = nullptr;
  const float* out_weight = nullptr;
  const float* out_bias = nullptr;  // or null
  Dropout dropout;
  ScalarType dtype = ScalarType::Float;
  std::vector<Tensor> tensors;  // what must stay alive

  int64_t pairs() const { return words * labels; }
  int64_t blocks() const { return (pairs() + kTokenRows - 1) / kTokenRows; }
};

struct TokenPair {
  int64_t word;   // packed row
  int64_t label;  // within its sequence
  int64_t label_row;
};

// Walks pairs in order. Empty sequences are stepped over.
class PairWalk {
 public:
  PairWalk(const TokenProblem& p, int64_t pair) : p_(p) {
    word_ = pair / p.labels;
    label_ = pair % p.labels;
    find_sequence();
  }
  TokenPair here() const { return {word_, label_, seq_ * p_.labels + label_}; }
  void advance() {
    if (++label_ == p_.labels) {
      label_ = 0;
      if (++word_ == p_.cu_words[seq_ + 1]) {
        find_sequence();
      }
    }
  }

 private:
  void find_sequence() {
    const int32_t* last = p_.cu_words + p_.num_seqs + 1;
    seq_ = std::upper_bound(p_.cu_words, last, static_cast<int32_t>(word_)) - p_.cu_words - 1;
  }
  const TokenProblem& p_;
  int64_t word_, label_, seq_ = 0;
};

inline Tensor widened(const Tensor& x) {
  return dense(x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float));
}

inline Tensor narrowed(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

inline TokenProblem make_token_problem(const Tensor& token, const Tensor& label,
                                       const Tensor& token_factor, const Tensor& label_factor,
                                       const Tensor& weight, const Tensor& out_weight,
                                       const Tensor& cu_words,
                                       const std::optional<Tensor>& out_bias) {
  TokenProblem p;
  check_dim("token", token, 2);
  check_dim("label", label, 3);
  check_dim("token_factor", token_factor, 2);
  p.words = token.size(0);
  p.size = token.size(1);
  p.labels = label.size(1);
  p.factors = token_factor.size(1);
  p.cu_words = check_cu_seqlens(cu_words, p.words);
  p.num_seqs = cu_words.size(0) - 1;
  p.dtype = token.scalar_type();
  STD_TORCH_CHECK(is_kernel_dtype(p.dtype), "token: expected float32, bfloat16 or float16, got ",
                  dtype_name(p.dtype));
  const auto take = [&](const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
    check_shape(name, x, shape);
    check_dtype(name, x, p.dtype);
    p.tensors.push_back(widened(x));
    return data<float>(p.tensors.back());
  };
  p.token = take("token", token, {p.words, p.size});
  p.label = take("label", label, {p.num_seqs, p.labels, p.size});
  p.token_factor = take("token_factor", token_factor, {p.words, p.factors});
  p.label_factor = take("label_factor", label_factor, {p.num_seqs, p.labels, p.factors});
  p.weight = take("weight", weight, {p.size, p.factors});
  p.out_weight = take("out_weight", out_weight, {kTokenOutputs, p.size});
  if (out_bias.has_value()) {
    p.out_bias = take("out_bias", *out_bias, {kTokenOutputs});
  }
  return p;
}

// The weight as panels of `width` columns of `depth` rows; `pack` is one of token_rows.h.
template <typename Pack>
Tensor pack_panels(const TokenProblem& p, int64_t columns, int64_t depth, const float* weight,
                   int64_t width, const Pack& pack) {
  const int64_t panels = p.pairs() > 0 ? (columns + width - 1) / width : 0;
  Tensor packed = torch::stable::new_empty(p.tensors[0], {panels, depth, width});
  parallel_for(panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack(weight, columns, depth, panel, mutable_data<float>(packed));
    }
  });
  return packed;
}

}  // namespace fastenc::cpu
