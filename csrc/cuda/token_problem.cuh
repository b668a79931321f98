// From the tensors of a token-scoring call to the arguments of its kernels: the checks that memory
// safety rests on.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "token_rows.cuh"

namespace fastenc::cuda {

struct TokenCall {
  TokenArgs args{};
  ScalarType dtype = ScalarType::Float;
  bool vectors = true;  // 16-byte accesses are legal for every row
  std::vector<Tensor> tensors;

  int64_t pairs() const { return args.words * args.labels; }
  // One at least: a block without columns still has a bias to write.
  int64_t chunks() const { return larger(1, ceil_div(args.size, kTokenColumns)); }
};

inline TokenCall token_call(const Tensor& token, const Tensor& label, const Tensor& token_factor,
                            const Tensor& label_factor, const Tensor& weight,
                            const Tensor& out_weight, const Tensor& cu_words,
                            const std::optional<Tensor>& out_bias) {
  TokenCall call;
  call.dtype = token.scalar_type();
  dtype_of("token", token);
  check_dim("token", token, 2);
  check_dim("label", label, 3);
  check_dim("token_factor", token_factor, 2);
  TokenArgs& a = call.args;
  a.words = token.size(0);
  const int64_t size = token.size(1), labels = label.size(1), factors = token_factor.size(1);
  a.cu_words = cu_seqlens_data(cu_words, token);
  call.tensors.push_back(cu_words);
  const int64_t num_seqs = cu_words.size(0) - 1;
  STD_TORCH_CHECK(num_seqs >= 1 || a.words == 0, "cu_words: no sequence holds the ", a.words,
                  " words");
  const int64_t most = kInt32Max - kTokenRows;
  STD_TORCH_CHECK(size <= kGridY * kTokenColumns && factors <= kGridY * kTokenDepth,
                  "token: more columns than one launch can cover, got ", size, " and ", factors);
  STD_TORCH_CHECK(a.words <= most && labels <= most && num_seqs <= most / larger(1, labels) &&
                      a.words <= most * kTokenDepth / larger(1, labels),
                  a.words, " words and ", labels, " labels are more than one launch can cover");
  a.num_seqs = static_cast<int32_t>(num_seqs);
  a.labels = static_cast<int32_t>(labels);
  a.size = static_cast<int32_t>(size);
  a.factors = static_cast<int32_t>(factors);

  const int64_t item = token.element_size();
  uint64_t bits = static_cast<uint64_t>(size | factors) * item;
  const auto take = [&](const char* name, const Tensor& x, const std::vector<int64_t>& shape) {
    const Tensor rows = take_rows(&call.tensors, name, x, token, shape);
    bits |= address(rows);
    for (size_t d = 0; d + 1 < shape.size(); ++d) {
      bits |= static_cast<uint64_t>(shape[d] > 1 ? rows.stride(d) : 0) * item;
    }
    return rows;
  };
  const Tensor tokens = take("token", token, {a.words, size});
  const Tensor token_factors = take("token_factor", token_factor, {a.words, factors});
  const Tensor label_rows = take("label", label, {num_seqs, labels, size});
  const Tensor label_factors = take("label_factor", label_factor, {num_seqs, labels, factors});
  const Tensor weights = take("weight", weight, {size, factors});
  const Tensor outputs = dense(take("out_weight", out_weight, {kTokenOutputs, size}));
  call.tensors.push_back(outputs);
  bits |= address(outputs);
  a.token = tokens.data_ptr();
  a.token_stride = tokens.stride(0);
  a.token_factor = token_factors.data_ptr();
  a.token_factor_stride = token_factors.stride(0);
  a.label = label_rows.data_ptr();
  a.label_seq_stride = label_rows.stride(0);
  a.label_stride = label_rows.stride(1);
  a.label_factor = label_factors.data_ptr();
  a.label_factor_seq_stride = label_factors.stride(0);
  a.label_factor_stride = label_factors.stride(1);
  a.weight = weights.data_ptr();
  a.weight_stride = weights.stride(0);
  a.out_weight = outputs.data_ptr();
  if (out_bias.has_value()) {
    const Tensor bias =
        dense(take_rows(&call.tensors, "out_bias", *out_bias, token, {kTokenOutputs}));
    call.tensors.push_back(bias);
    a.out_bias = bias.data_ptr();
  }
  call.vectors = vectors_fit(0, 1, bits);
  return call;
}

// Calls f(Type<T>{}, Width<V>{}).
template <typename F>
void dispatch_tokens(const TokenCall& call, F&& f) {
  dispatch_dtype("token", call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_width<kVector<T>>(call.vectors, [&](auto width) { f(tag, width); });
  });
}

}  // namespace fastenc::cuda
