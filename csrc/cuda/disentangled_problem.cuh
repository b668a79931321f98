// From the tensors of a disentangled attention call to the arguments of its kernels.
#pragma once

#include "attention_problem.cuh"
#include "disentangled_args.cuh"

namespace fastenc::cuda {

struct DisentangledCall {
  AttentionCall attention;
  PositionArgs positions{};
};

inline HeadRows position_rows(DisentangledCall* call, const char* name,
                              const std::optional<Tensor>& x, const Tensor& q) {
  if (!x.has_value()) {
    return {};
  }
  check_cuda(name, *x, q);
  check_dtype(name, *x, q.scalar_type());
  check_dim(name, *x, 3);
  STD_TORCH_CHECK(x->size(0) == q.size(1) && x->size(2) == q.size(2) && x->size(1) >= 1 &&
                      x->size(1) <= kUnlimited,
                  name, ": expected (heads = ", q.size(1), ", rows, head_dim = ", q.size(2), ")");
  const auto size = static_cast<int32_t>(x->size(1));
  STD_TORCH_CHECK(call->positions.size == 0 || call->positions.size == size, name, ": expected ",
                  call->positions.size, " rows, as pos_key has, got ", size);
  call->positions.size = size;
  const Tensor& rows = keep(&call->attention, dense_rows(*x));
  AttentionArgs& a = call->attention.args;
  a.vectors = a.vectors && rows_keep_vectors(rows);
  return {rows.data_ptr(), rows.stride(1), rows.stride(0)};
}

// Entries of rel_index lie in device memory: the kernels clamp them to the rows of a table.
inline DisentangledCall disentangled_call(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const std::optional<Tensor>& pos_key,
                                          const std::optional<Tensor>& pos_query,
                                          const Tensor& rel_index, const Tensor& cu_seqlens,
                                          int64_t max_seqlen, double scale, double dropout_p,
                                          const std::optional<Tensor>& seed) {
  DisentangledCall call{attention_call(q, k, v, cu_seqlens,
                                       {max_seqlen, -1, -1, scale, dropout_p, seed}, std::nullopt)};
  check_cuda("rel_index", rel_index, q);
  check_dtype("rel_index", rel_index, ScalarType::Int);
  check_dim("rel_index", rel_index, 1);
  STD_TORCH_CHECK(rel_index.size(0) % 2 == 1 && rel_index.size(0) < kUnlimited,
                  "rel_index: expected 2 R + 1 distances, got ", rel_index.size(0));
  call.positions.index = data<int32_t>(keep(&call.attention, dense(rel_index)));
  call.positions.radius = static_cast<int32_t>(rel_index.size(0) / 2);
  call.positions.key = position_rows(&call, "pos_key", pos_key, q);
  call.positions.query = position_rows(&call, "pos_query", pos_query, q);
  return call;
}

// Calls f(Width<64>{}) or f(Width<128>{}): DeBERTa's heads have 64, whatever its size.
template <typename F>
void dispatch_disentangled(int64_t head_dim, F&& f) {
  head_dim <= 64 ? f(Width<64>{}) : f(Width<128>{});
}

}  // namespace fastenc::cuda
