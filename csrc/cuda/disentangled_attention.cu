// Disentangled attention on NVIDIA GPUs, forward: check, launch. The device code is in
// disentangled_fwd.cuh. Has not run on a GPU: tests/test_cuda_disentangled_model.py runs the same
// sources on the CPU.
#include <tuple>

#include "disentangled_fwd.cuh"
#include "disentangled_problem.cuh"

namespace fastenc::cuda {
namespace {

std::tuple<Tensor, Tensor> disentangled_attention_fwd(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> pos_key, std::optional<Tensor> pos_query,
    Tensor rel_index, Tensor cu_seqlens, int64_t max_seqlen, double scale, double dropout_p,
    std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("disentangled_attention");
  const Launcher launcher(q);
  DisentangledCall call = disentangled_call(q, k, v, pos_key, pos_query, rel_index, cu_seqlens,
                                            max_seqlen, scale, dropout_p, seed);
  AttentionArgs& a = call.attention.args;
  Tensor out = torch::stable::new_empty(q, {a.total_tokens, a.heads, a.head_dim});
  Tensor lse = torch::stable::new_empty(q, {a.heads, a.total_tokens}, ScalarType::Float);
  if (call.attention.empty()) {
    return {out, lse};
  }
  a.out = head_rows(out);
  a.lse = mutable_data<float>(lse);
  a.vectors = a.vectors && rows_keep_vectors(out);
  const DisentangledArgs args{a, call.positions};
  dispatch_dtype("q", call.attention.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_disentangled(a.head_dim, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch_tiles(launcher, "disentangled_attention", disentangled_attention_fwd_kernel<T, kWidth>,
                   call.attention.slots() * a.heads,
                   DisentangledShape<sizeof(T), kWidth>::forward_bytes(), args);
    });
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("disentangled_attention_fwd", TORCH_BOX(&disentangled_attention_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("disentangled_attention_fwd", TORCH_BOX(&disentangled_attention_fwd));
}

}  // namespace fastenc::cuda
