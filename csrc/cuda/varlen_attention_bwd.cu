// Packed attention on NVIDIA GPUs, backward: check, launch. The device code is in
// attention_dq.cuh and attention_dkdv.cuh, attention_bwd.cuh says what is where. Has not run on a
// GPU: tests/test_cuda_attention_model.py runs the same sources on the CPU.
#include <tuple>

#include "attention_bwd.cuh"
#include "attention_dq.cuh"
#include "attention_problem.cuh"
#include "attention_sm90.cuh"

namespace fastenc::cuda {
namespace {

// The tensors that only a backward has. out and lse come from the forward of any backend.
struct GradInputs {
  const Tensor& grad_out;
  const std::optional<Tensor>& grad_lse;
  const Tensor& out;
  const Tensor& lse;
};

void launch_dq(const Launcher& launcher, const char* op, const AttentionCall& call,
               const AttentionGradArgs& grads) {
  const AttentionArgs& a = grads.forward;
  dispatch_shape(call, [&](auto tag, auto width) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = decltype(width)::value;
    using Shape = AttentionShape<sizeof(T), kWidth>;
    const int bias = grads.bias_partials != nullptr ? Shape::bias_bytes(a.bias_radius) : 0;
    launch_tiles(launcher, op, varlen_attention_dq_kernel<T, kWidth>, call.slots() * a.heads,
                 Shape::dq_bytes() + bias, grads);
  });
}

void launch_backward(const Launcher& launcher, const char* op, const AttentionCall& call,
                     const AttentionGradArgs& grads) {
  launch_dq(launcher, op, call, grads);
  launch_dkdv(launcher, op, call, grads);
}

void launch_bias_grad(const Launcher& launcher, const Tensor& partials, const Tensor& out) {
  const int64_t entries = out.numel();
  dispatch_dtype("rel_bias", out.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kThreads = kWarp * kBiasSlices;
    bias_grad_kernel<T><<<static_cast<uint32_t>(ceil_div(entries, kWarp)), kThreads,
                          kThreads * sizeof(float), launcher.stream()>>>(
        data<float>(partials), mutable_data<T>(out), partials.size(0), entries);
    Launcher::check_launch("varlen_attention_bwd");
  });
}

// Gradients of q, k and v as (total_tokens, heads, head_dim) tensors, or parts of one `packed`.
void backward(const Launcher& launcher, const char* op, AttentionCall* call,
              const GradInputs& inputs, const Tensor& dq, const Tensor& dk, const Tensor& dv,
              const std::optional<Tensor>& dtable) {
  AttentionArgs& a = call->args;
  AttentionGradArgs grads{};
  const bool packed = dq.dim() == 4;
  grads.grad_out = head_rows(check_like_out(call, "grad_out", inputs.grad_out, dq));
  a.out = head_rows(check_like_out(call, "out", inputs.out, dq));
  a.lse = mutable_data<float>(check_stats(call, "lse", inputs.lse, dq));
  if (inputs.grad_lse.has_value()) {
    grads.grad_lse = data<float>(check_stats(call, "grad_lse", *inputs.grad_lse, dq));
  }
  if (call->empty()) {
    return;
  }
  grads.dq = head_rows(dq, 0);
  grads.dk = head_rows(dk, packed ? 1 : 0);
  grads.dv = head_rows(dv, packed ? 2 : 0);
  a.vectors = a.vectors && rows_keep_vectors(dq) && rows_keep_vectors(dk) && rows_keep_vectors(dv);
  const Tensor& delta =
      keep(call, torch::stable::new_empty(dq, {a.heads, a.total_tokens}, ScalarType::Float));
  grads.delta = mutable_data<float>(delta);
  grads.scale = static_cast<float>(call->options.scale);
  const AttentionKernel kernel = strides_fit_tma(grads.grad_out, a)
                                     ? choose_attention_bwd(attention_case(launcher, *call))
                                     : AttentionKernel::kGeneral;
  if (!dtable.has_value()) {
    grads.forward = a;
    switch (kernel) {
      case AttentionKernel::kLocalSm90:
        return local_attention_sm90_bwd(launcher, *call, grads);
      case AttentionKernel::kLocalStreamSm90:
        return local_attention_stream_sm90_bwd(launcher, *call, grads);
      case AttentionKernel::kGlobalSm90:
        return global_attention_sm90_bwd(launcher, *call, grads, dq);
      case AttentionKernel::kGeneral:
        return launch_backward(launcher, op, *call, grads);
    }
  }
  const Tensor partials =
      torch::stable::new_empty(dq, {call->slots(), dtable->numel()}, ScalarType::Float);
  grads.bias_partials = mutable_data<float>(partials);
  grads.forward = a;
  launch_backward(launcher, op, *call, grads);
  launch_bias_grad(launcher, partials, *dtable);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_bwd(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, Tensor cu_seqlens, int64_t max_seqlen, int64_t window_left, int64_t window_right,
    double scale, double dropout_p, std::optional<Tensor> seed, std::optional<Tensor> rel_bias) {
  FASTENC_COUNT_LAUNCH("varlen_attention_bwd");
  const Launcher launcher(grad_out);
  AttentionCall call =
      attention_call(q, k, v, cu_seqlens,
                     {max_seqlen, window_left, window_right, scale, dropout_p, seed}, rel_bias);
  const std::vector<int64_t> shape = shape_of(q);
  const Tensor dq = torch::stable::new_empty(q, shape), dk = torch::stable::new_empty(q, shape),
               dv = torch::stable::new_empty(q, shape);
  std::optional<Tensor> dtable;
  if (rel_bias.has_value()) {
    dtable = torch::stable::new_empty(*rel_bias, shape_of(*rel_bias));
    if (call.empty()) {
      torch::stable::zero_(*dtable);
    }
  }
  backward(launcher, "varlen_attention_bwd", &call, {grad_out, grad_lse, out, lse}, dq, dk, dv,
           dtable);
  return {dq, dk, dv, dtable.has_value() ? *dtable : torch::stable::new_empty(q, {0})};
}

Tensor rope_varlen_attention_bwd(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor qkv,
                                 Tensor cos, Tensor sin, Tensor out, Tensor lse, Tensor cu_seqlens,
                                 int64_t max_seqlen, int64_t window_left, int64_t window_right,
                                 double scale, double dropout_p, std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("rope_varlen_attention_bwd");
  const Launcher launcher(grad_out);
  AttentionCall call = rope_attention_call(
      qkv, cos, sin, cu_seqlens, {max_seqlen, window_left, window_right, scale, dropout_p, seed});
  const Tensor dqkv = torch::stable::new_empty(qkv, shape_of(qkv));
  backward(launcher, "rope_varlen_attention_bwd", &call, {grad_out, grad_lse, out, lse}, dqkv, dqkv,
           dqkv, std::nullopt);
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("varlen_attention_bwd", TORCH_BOX(&varlen_attention_bwd));
  m.impl("rope_varlen_attention_bwd", TORCH_BOX(&rope_varlen_attention_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("varlen_attention_bwd", TORCH_BOX(&varlen_attention_bwd));
  m.impl("rope_varlen_attention_bwd", TORCH_BOX(&rope_varlen_attention_bwd));
}

}  // namespace fastenc::cuda
