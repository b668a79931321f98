// Residual add + LayerNorm on NVIDIA GPUs (sm_80 and up), backward: check, choose, launch. Device
// code: add_layer_norm_bwd.cuh.
//
// Floor: bytes at copy bandwidth, bf16 8 a column: grad_normed, grad_total, total -> dx. At 4.3
// TB/s, 768 columns: 1.4 ns a row. Prediction, H200: 80 to 88% of copy: the partial rows (6 MB at
// 132 SMs) stay in L2, but one barrier a row and a second launch are not hidden at 16k rows. Has
// not run on a GPU: tests/test_cuda_row_model.py runs the sources on the CPU.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "add_layer_norm_bwd.cuh"
#include "launch.cuh"

namespace fastenc::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const Tensor& grad_normed_in, std::optional<Tensor> grad_total_in, const Tensor& total_in,
    const Tensor& weight_in, const Tensor& mean_in, const Tensor& rstd_in, bool has_bias) {
  FASTENC_COUNT_LAUNCH("add_layer_norm_bwd");
  const Launcher launcher(total_in);
  const Tensor total = dense(total_in), grad_normed = dense(grad_normed_in);
  const Tensor weight = dense(weight_in), mean = dense(mean_in), rstd = dense(rstd_in);
  const bool has_grad_total = grad_total_in.has_value();
  const Tensor grad_total = has_grad_total ? dense(*grad_total_in) : grad_normed;
  STD_TORCH_CHECK(total.dim() >= 1 && total.size(total.dim() - 1) >= 1,
                  "total: expected (..., hidden >= 1)");
  const int64_t hidden = total.size(total.dim() - 1), rows = total.numel() / hidden;
  for (const Tensor* g : {&grad_normed, &grad_total}) {
    check_cuda("gradient", *g, total);
    check_dtype("gradient", *g, total.scalar_type());
    check_numel("gradient", *g, total.numel());
  }
  for (const Tensor* stat : {&mean, &rstd}) {
    check_cuda("mean or rstd", *stat, total);
    check_dtype("mean or rstd", *stat, ScalarType::Float);
    check_numel("mean or rstd", *stat, rows);
  }
  const Parameter w = parameter("weight", weight, hidden, total);
  Tensor dx = torch::stable::new_empty(total, total.sizes());
  Tensor dweight = torch::stable::new_empty(weight, {hidden});
  Tensor dbias = torch::stable::new_empty(weight, {has_bias ? hidden : 0});
  const int64_t pitch = PartialSums::pitch(hidden);
  const uint64_t bits =
      address(grad_normed) | address(grad_total) | address(total) | address(weight) | address(dx);
  dispatch_dtype("total", total.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const RowPlan plan = plan_layer_norm_bwd(rows, hidden, vectors_fit(hidden, kVector<T>, bits),
                                             launcher.sm_count());
    const Tensor partials =
        torch::stable::new_empty(total, {has_bias ? 2 : 1, plan.blocks, pitch}, ScalarType::Float);
    if (rows > 0) {
      const auto kernel = !plan.in_registers ? add_layer_norm_bwd_loop_kernel<T>
                          : plan.elements == kBackwardElements
                              ? add_layer_norm_bwd_kernel<T, kBackwardElements>
                              : add_layer_norm_bwd_kernel<T, kWideBackwardElements>;
      kernel<<<static_cast<unsigned>(plan.blocks), plan.threads_per_row, 0, launcher.stream()>>>(
          data<T>(grad_normed), has_grad_total ? data<T>(grad_total) : nullptr, data<T>(total), w,
          data<float>(mean), data<float>(rstd), mutable_data<T>(dx), mutable_data<float>(partials),
          has_bias, rows, hidden, pitch);
      Launcher::check_launch("add_layer_norm_bwd");
    }
    dispatch_dtype("weight", weight.scalar_type(), [&](auto weight_tag) {
      using W = typename decltype(weight_tag)::type;
      const dim3 grid(static_cast<unsigned>(ceil_div(pitch, PartialSums::kColumns)),
                      has_bias ? 2 : 1);
      add_layer_norm_sum_kernel<W>
          <<<grid, PartialSums::kLanes * PartialSums::kSlices, 0, launcher.stream()>>>(
              data<float>(partials), mutable_data<W>(dweight), mutable_data<W>(dbias), plan.blocks,
              hidden, pitch);
      Launcher::check_launch("add_layer_norm_bwd");
    });
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace fastenc::cuda
