// Packed attention on NVIDIA GPUs, forward: check, choose, launch. The device code is in
// attention_fwd.cuh; fastenc/ops/varlen_attention.py says what is computed. Has not run on a GPU:
// tests/test_cuda_attention_model.py runs the same sources on the CPU.
#include <tuple>

#include "attention_fwd.cuh"
#include "attention_problem.cuh"
#include "attention_sm90.cuh"

namespace fastenc::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(const Launcher& launcher, const char* op, AttentionCall call,
                                   const Tensor& like) {
  AttentionArgs& a = call.args;
  Tensor out = torch::stable::new_empty(like, {a.total_tokens, a.heads, a.head_dim});
  Tensor lse = torch::stable::new_empty(like, {a.heads, a.total_tokens}, ScalarType::Float);
  if (call.empty()) {
    return {out, lse};
  }
  a.out = head_rows(out);
  a.lse = mutable_data<float>(lse);
  a.vectors = a.vectors && rows_keep_vectors(out);
  switch (choose_attention(attention_case(launcher, call))) {
    case AttentionKernel::kLocalSm90:
      local_attention_sm90_fwd(launcher, call);
      return {out, lse};
    case AttentionKernel::kGlobalSm90:
      global_attention_sm90_fwd(launcher, call, like);
      return {out, lse};
    case AttentionKernel::kLocalStreamSm90:  // the backward's
    case AttentionKernel::kGeneral:
      break;
  }
  dispatch_shape(call, [&](auto tag, auto width) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = decltype(width)::value;
    launch_tiles(launcher, op, varlen_attention_fwd_kernel<T, kWidth>, call.slots() * a.heads,
                 AttentionShape<sizeof(T), kWidth>::forward_bytes(), a);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> varlen_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens,
                                                int64_t max_seqlen, int64_t window_left,
                                                int64_t window_right, double scale,
                                                double dropout_p, std::optional<Tensor> seed,
                                                std::optional<Tensor> rel_bias) {
  FASTENC_COUNT_LAUNCH("varlen_attention");
  const Launcher launcher(q);
  return forward(
      launcher, "varlen_attention",
      attention_call(q, k, v, cu_seqlens,
                     {max_seqlen, window_left, window_right, scale, dropout_p, seed}, rel_bias),
      q);
}

std::tuple<Tensor, Tensor> rope_varlen_attention_fwd(Tensor qkv, Tensor cos, Tensor sin,
                                                     Tensor cu_seqlens, int64_t max_seqlen,
                                                     int64_t window_left, int64_t window_right,
                                                     double scale, double dropout_p,
                                                     std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("rope_varlen_attention");
  const Launcher launcher(qkv);
  return forward(
      launcher, "rope_varlen_attention",
      rope_attention_call(qkv, cos, sin, cu_seqlens,
                          {max_seqlen, window_left, window_right, scale, dropout_p, seed}),
      qkv);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("varlen_attention_fwd", TORCH_BOX(&varlen_attention_fwd));
  m.impl("rope_varlen_attention_fwd", TORCH_BOX(&rope_varlen_attention_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("varlen_attention_fwd", TORCH_BOX(&varlen_attention_fwd));
  m.impl("rope_varlen_attention_fwd", TORCH_BOX(&rope_varlen_attention_fwd));
}

}  // namespace fastenc::cuda
