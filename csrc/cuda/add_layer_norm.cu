// Residual add + LayerNorm on NVIDIA GPUs (sm_80 and up), forward: check, choose, launch. Device
// code: add_layer_norm.cuh.
//
// Floor: bytes at copy bandwidth, bf16 8 a column: x, residual -> normed, total. At 4.3 TB/s, 768
// columns: 1.4 ns a row. Prediction, H200: 90 to 95% of copy. Has not run on a GPU:
// tests/test_cuda_row_model.py runs the sources on the CPU.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "add_layer_norm.cuh"
#include "launch.cuh"

namespace fastenc::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x_in,
                                                              std::optional<Tensor> residual_in,
                                                              const Tensor& weight_in,
                                                              std::optional<Tensor> bias_in,
                                                              double eps) {
  FASTENC_COUNT_LAUNCH("add_layer_norm");
  const Launcher launcher(x_in);
  const Tensor x = dense(x_in), weight = dense(weight_in);
  const bool has_residual = residual_in.has_value();
  const Tensor residual = has_residual ? dense(*residual_in) : x;
  const Tensor bias = bias_in ? dense(*bias_in) : weight;
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x: expected (..., hidden >= 1)");
  const int64_t hidden = x.size(x.dim() - 1), rows = x.numel() / hidden;
  check_cuda("residual", residual, x);
  check_numel("residual", residual, x.numel());
  const Parameter w = parameter("weight", weight, hidden, x);
  Parameter b = parameter("bias", bias, hidden, x);
  const ScalarType dtype = promoted(x.scalar_type(), residual.scalar_type());
  const std::vector<int64_t> stats_shape(x.sizes().begin(), x.sizes().end() - 1);
  Tensor normed = torch::stable::new_empty(x, x.sizes(), dtype);
  Tensor total =
      torch::stable::new_empty(x, has_residual ? shape_of(x) : std::vector<int64_t>{0}, dtype);
  Tensor mean = torch::stable::new_empty(x, stats_shape, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, stats_shape, ScalarType::Float);
  const uint64_t bits = address(x) | address(residual) | address(weight) | address(bias) |
                        address(normed) | address(total);
  if (!bias_in) {
    b.data = nullptr;
  }
  dispatch_dtype("x", x.scalar_type(), [&](auto x_tag) {
    using X = typename decltype(x_tag)::type;
    dispatch_dtype("residual", residual.scalar_type(), [&](auto r_tag) {
      using R = typename decltype(r_tag)::type;
      using T = Promoted<X, R>;
      constexpr int V = kPairVector<X, R>;
      const RowPlan plan = plan_layer_norm(rows, hidden, vectors_fit(hidden, V, bits));
      STD_TORCH_CHECK(plan.blocks <= kInt32Max, "add_layer_norm: too many rows, ", rows);
      if (rows == 0) {
        return;
      }
      const R* added = has_residual ? data<R>(residual) : nullptr;
      const auto blocks = static_cast<unsigned>(plan.blocks);
      if (plan.in_registers) {
        add_layer_norm_fwd_kernel<X, R, V>
            <<<blocks, plan.threads_per_row * plan.rows_per_block, 0, launcher.stream()>>>(
                data<X>(x), added, w, b, mutable_data<T>(normed), mutable_data<T>(total),
                mutable_data<float>(mean), mutable_data<float>(rstd), rows, hidden,
                plan.threads_per_row, static_cast<float>(eps));
      } else {
        add_layer_norm_fwd_loop_kernel<X, R><<<blocks, kLoopThreads, 0, launcher.stream()>>>(
            data<X>(x), added, w, b, mutable_data<T>(normed), mutable_data<T>(total),
            mutable_data<float>(mean), mutable_data<float>(rstd), hidden, static_cast<float>(eps));
      }
      Launcher::check_launch("add_layer_norm");
    });
  });
  return {normed, total, mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
}

}  // namespace fastenc::cuda
