// From the tensors of an attention call to the arguments of its kernels: the checks that memory
// safety rests on. What only device memory knows (the entries of cu_seqlens) is trusted here; the
// public functions check it under fastenc.debug_checks().
#pragma once

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/attention_tiles.h"
#include "../common/philox.h"
#include "attention_args.cuh"
#include "launch.cuh"

namespace fastenc::cuda {

constexpr int64_t kMaxHeadDim = 128;

// What every entry point ends with.
struct AttentionOptions {
  int64_t max_seqlen, left, right;
  double scale, dropout_p;
  std::optional<Tensor> seed;
};

// The arguments, and what must stay alive until the kernels are launched.
struct AttentionCall {
  AttentionArgs args{};
  AttentionOptions options;
  ScalarType dtype = ScalarType::Float;
  std::vector<Tensor> tensors;

  int64_t slots() const {
    return attention_slots(args.total_tokens, args.num_seqs, kAttentionRows);
  }
  bool empty() const { return args.total_tokens == 0 || args.heads == 0; }
};

inline bool rows_keep_vectors(const Tensor& x) {
  uint64_t bits = address(x);
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    bits |= static_cast<uint64_t>(x.size(d) > 1 ? x.stride(d) : 0) * x.element_size();
  }
  return vectors_fit(x.size(x.dim() - 1) * x.element_size(), kAccessBytes, bits);
}

// Rows of a (total_tokens, [3,] heads, head_dim) tensor with unit stride in its last dimension.
inline HeadRows head_rows(const Tensor& x, int64_t part = 0) {
  const auto* start = static_cast<const char*>(x.data_ptr());
  return {start + (x.dim() == 4 ? part * x.stride(1) * x.element_size() : 0), x.stride(0),
          x.stride(x.dim() - 2)};
}

inline const Tensor& keep(AttentionCall* call, Tensor x) {
  call->tensors.push_back(std::move(x));
  return call->tensors.back();
}

inline Tensor check_rows(AttentionCall* call, const char* name, const Tensor& x, const Tensor& like,
                         int64_t dims) {
  check_cuda(name, x, like);
  check_dtype(name, x, like.scalar_type());
  check_dim(name, x, dims);
  for (int64_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(x.size(d) == like.size(d), name, ": expected size ", like.size(d),
                    " in dimension ", d, ", got ", x.size(d));
  }
  const Tensor rows = dense_rows(x);
  call->args.vectors = call->args.vectors && rows_keep_vectors(rows);
  return keep(call, rows);
}

inline Parameter parameter_of(const char* name, const Tensor& x) {
  return {x.data_ptr(), dtype_of(name, x)};
}

inline int32_t window_side(int64_t side) {
  return static_cast<int32_t>(side < 0 ? kUnlimited : smaller(side, kUnlimited));
}

inline void set_options(AttentionCall* call, const Tensor& q, const Tensor& cu_seqlens,
                        bool biased) {
  AttentionArgs& a = call->args;
  const AttentionOptions& o = call->options;
  a.total_tokens = q.size(0);
  STD_TORCH_CHECK(a.total_tokens <= kInt32Max && o.max_seqlen < kUnlimited,
                  "expected fewer than 2^31 tokens and sequences under 2^30, got ", a.total_tokens,
                  " and max_seqlen ", o.max_seqlen);
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= kMaxHeadDim, "head_dim: expected 1 to ",
                  kMaxHeadDim, ", got ", a.head_dim);
  const Tensor& edges = keep(call, cu_seqlens);
  a.cu_seqlens = cu_seqlens_data(edges, q);
  a.num_seqs = static_cast<int32_t>(edges.size(0) - 1);
  STD_TORCH_CHECK(a.num_seqs >= 1 || a.total_tokens == 0, "cu_seqlens: no sequence holds the ",
                  a.total_tokens, " tokens");
  STD_TORCH_CHECK(call->slots() <= kInt32Max / larger(1, a.heads), a.heads, " heads of ",
                  a.total_tokens, " tokens are more than one launch can cover");
  a.left = window_side(o.left);
  a.right = window_side(o.right);
  a.scale_log2 = static_cast<float>(o.scale * 1.4426950408889634);
  a.prescale = biased || !(o.scale > 0.0);
  a.factor = a.prescale ? 1.0f : a.scale_log2;
  STD_TORCH_CHECK(o.dropout_p >= 0.0 && o.dropout_p < 1.0, "dropout_p: expected 0 <= p < 1, got ",
                  o.dropout_p);
  const Dropout dropout(o.dropout_p, 0);
  a.drop_below = dropout.threshold;
  a.keep_scale = dropout.keep_scale;
  if (dropout.active()) {
    STD_TORCH_CHECK(o.seed.has_value(), "seed: expected a tensor where dropout_p > 0");
    const Tensor& seed = keep(call, *o.seed);
    check_cuda("seed", seed, q);
    check_dtype("seed", seed, ScalarType::Long);
    check_numel("seed", seed, 1);
    a.seed = data<int64_t>(seed);
  }
}

inline AttentionCall attention_call(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& cu_seqlens, AttentionOptions options,
                                    const std::optional<Tensor>& rel_bias) {
  AttentionCall call{.options = std::move(options), .dtype = q.scalar_type()};
  call.args.vectors = true;
  dtype_of("q", q);
  call.args.q = head_rows(check_rows(&call, "q", q, q, 3));
  call.args.k = head_rows(check_rows(&call, "k", k, q, 3));
  call.args.v = head_rows(check_rows(&call, "v", v, q, 3));
  call.args.heads = static_cast<int32_t>(q.size(1));
  call.args.head_dim = static_cast<int32_t>(q.size(2));
  if (rel_bias.has_value()) {
    const Tensor& bias = keep(&call, dense(*rel_bias));
    check_cuda("rel_bias", bias, q);
    check_dim("rel_bias", bias, 2);
    STD_TORCH_CHECK(bias.size(0) == q.size(1) && bias.size(1) % 2 == 1 && bias.size(1) <= 4097,
                    "rel_bias: expected (heads = ", q.size(1),
                    ", 2 R + 1) with R of at most 2048, got (", bias.size(0), ", ", bias.size(1),
                    ")");
    call.args.bias = parameter_of("rel_bias", bias);
    call.args.bias_radius = static_cast<int32_t>(bias.size(1) / 2);
  }
  set_options(&call, q, cu_seqlens, rel_bias.has_value());
  return call;
}

inline AttentionCall rope_attention_call(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                                         const Tensor& cu_seqlens, AttentionOptions options) {
  AttentionCall call{.options = std::move(options), .dtype = qkv.scalar_type()};
  AttentionArgs& a = call.args;
  a.vectors = true;
  dtype_of("qkv", qkv);
  check_dim("qkv", qkv, 4);
  STD_TORCH_CHECK(qkv.size(1) == 3 && qkv.size(3) % 2 == 0,
                  "qkv: expected (total_tokens, 3, heads, even head_dim)");
  const Tensor& rows = check_rows(&call, "qkv", qkv, qkv, 4);
  a.q = head_rows(rows, 0);
  a.k = head_rows(rows, 1);
  a.v = head_rows(rows, 2);
  a.heads = static_cast<int32_t>(qkv.size(2));
  a.head_dim = static_cast<int32_t>(qkv.size(3));
  for (const auto& [name, table] : {std::pair{"cos", &cos}, std::pair{"sin", &sin}}) {
    check_cuda(name, *table, qkv);
    check_dim(name, *table, 2);
    STD_TORCH_CHECK(table->size(1) == a.head_dim / 2 && table->size(0) >= call.options.max_seqlen,
                    name, ": expected at least ", call.options.max_seqlen, " rows of ",
                    a.head_dim / 2, ", got (", table->size(0), ", ", table->size(1), ")");
  }
  const Tensor kept_cos = keep(&call, dense(cos)), kept_sin = keep(&call, dense(sin));
  a.cos = parameter_of("cos", kept_cos);
  a.sin = parameter_of("sin", kept_sin);
  a.rotary_vectors = a.head_dim / 2 * qkv.element_size() % kAccessBytes == 0 &&
                     (address(kept_cos) | address(kept_sin)) % kAccessBytes == 0;
  set_options(&call, qkv, cu_seqlens, false);
  return call;
}

// (heads, total_tokens) fp32: lse and its gradient.
inline Tensor check_stats(AttentionCall* call, const char* name, const Tensor& x,
                          const Tensor& like) {
  check_cuda(name, x, like);
  check_dtype(name, x, ScalarType::Float);
  check_numel(name, x, call->args.heads * call->args.total_tokens);
  return keep(call, dense(x));
}

inline Tensor check_like_out(AttentionCall* call, const char* name, const Tensor& x,
                             const Tensor& like) {
  check_cuda(name, x, like);
  check_dtype(name, x, like.scalar_type());
  check_dim(name, x, 3);
  STD_TORCH_CHECK(x.size(0) == call->args.total_tokens && x.size(1) == call->args.heads &&
                      x.size(2) == call->args.head_dim,
                  name, ": expected (total_tokens, heads, head_dim)");
  const Tensor rows = dense_rows(x);
  call->args.vectors = call->args.vectors && rows_keep_vectors(rows);
  return keep(call, rows);
}

// Calls f(Width<32>{}) .. f(Width<128>{}): the head_dim that a kernel is padded to.
template <typename F>
void dispatch_head_dim(int64_t head_dim, F&& f) {
  head_dim <= 32   ? f(Width<32>{})
  : head_dim <= 64 ? f(Width<64>{})
  : head_dim <= 96 ? f(Width<96>{})
                   : f(Width<128>{});
}

// Calls f(dtype's tag, Width) for the kernel that serves the call.
template <typename F>
void dispatch_shape(const AttentionCall& call, F&& f) {
  dispatch_dtype("q", call.dtype, [&](auto tag) {
    dispatch_head_dim(call.args.head_dim, [&](auto width) { f(tag, width); });
  });
}

template <typename Args>
void launch_tiles(const Launcher& launcher, const char* op, void (*kernel)(Args), int64_t blocks,
                  int bytes, const Args& args) {
  launch_kernel(launcher, op, kernel, static_cast<uint32_t>(blocks), kAttentionThreads, bytes,
                args);
}

}  // namespace fastenc::cuda
