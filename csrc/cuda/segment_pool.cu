// Segment pooling on NVIDIA GPUs (sm_80 and up), both directions: check, choose, launch. Device
// code: segment_pool.cuh.
//
// Floor: forward one read of x, backward one write of dx, at the bandwidth of memory. Prediction,
// H200: backward near copy speed; forward likewise from some ten sequences up, but a single
// sequence of 768 columns keeps only 12 blocks busy, perhaps a tenth of the bandwidth: pooling is
// one pass at the end of a model, so it is not split further. Has not run on a GPU:
// tests/test_cuda_row_model.py runs the sources on the CPU.
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "segment_pool.cuh"

namespace fastenc::cuda {
namespace {

PoolMode parse_mode(const std::string& mode) {
  if (mode == "mean") {
    return PoolMode::kMean;
  }
  if (mode == "cls") {
    return PoolMode::kCls;
  }
  if (mode == "max") {
    return PoolMode::kMax;
  }
  STD_TORCH_CHECK(mode == "last", "mode: expected mean, cls, max or last, got ", mode);
  return PoolMode::kLast;
}

std::tuple<Tensor, Tensor> segment_pool_fwd(const Tensor& x_in, const Tensor& cu_seqlens,
                                            std::string mode_name) {
  FASTENC_COUNT_LAUNCH("segment_pool");
  const PoolMode mode = parse_mode(mode_name);
  const Launcher launcher(x_in);
  check_dim("x", x_in, 2);
  const Tensor x = dense(x_in);
  const int32_t* edges = cu_seqlens_data(cu_seqlens, x);
  const int64_t hidden = x.size(1), num_seqs = cu_seqlens.size(0) - 1;
  Tensor out = torch::stable::new_empty(x, {num_seqs, hidden});
  const std::vector<int64_t> index_shape =
      mode == PoolMode::kMax ? std::vector<int64_t>{num_seqs, hidden} : std::vector<int64_t>{0};
  Tensor index = torch::stable::new_empty(x, index_shape, ScalarType::Int);
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors =
        vectors_fit(hidden, kVector<T>, address(x) | address(out) | address(index));
    dispatch_width<kVector<T>>(vectors, [&](auto width) {
      constexpr int V = decltype(width)::value;
      const int64_t blocks = ceil_div(hidden, V * PoolTiles::kLanes);
      STD_TORCH_CHECK(blocks <= kInt32Max, "segment_pool: hidden is too large");
      if (blocks == 0) {
        return;
      }
      for (int64_t first = 0; first < num_seqs; first += kGridY) {
        const dim3 grid(static_cast<unsigned>(blocks),
                        static_cast<unsigned>(smaller(kGridY, num_seqs - first)));
        if (mode == PoolMode::kMax) {
          segment_pool_max_kernel<T, V><<<grid, PoolTiles::kThreads, 0, launcher.stream()>>>(
              data<T>(x), edges, mutable_data<T>(out), mutable_data<int32_t>(index), hidden, first);
        } else {
          segment_pool_mean_kernel<T, V><<<grid, PoolTiles::kThreads, 0, launcher.stream()>>>(
              data<T>(x), edges, mutable_data<T>(out), hidden, first, mode);
        }
        Launcher::check_launch("segment_pool");
      }
    });
  });
  return {out, index};
}

Tensor segment_pool_bwd(const Tensor& grad_in, const Tensor& index_in, const Tensor& cu_seqlens,
                        int64_t total_tokens, std::string mode_name) {
  FASTENC_COUNT_LAUNCH("segment_pool_bwd");
  const PoolMode mode = parse_mode(mode_name);
  const Launcher launcher(grad_in);
  check_dim("grad", grad_in, 2);
  const Tensor grad = dense(grad_in), index = dense(index_in);
  const int64_t hidden = grad.size(1), num_seqs = grad.size(0);
  const int32_t* edges = cu_seqlens_data(cu_seqlens, grad);
  check_numel("cu_seqlens", cu_seqlens, num_seqs + 1);
  STD_TORCH_CHECK(total_tokens >= 0 && (total_tokens == 0 || num_seqs > 0),
                  "total_tokens: expected 0 without sequences, got ", total_tokens);
  if (mode == PoolMode::kMax) {
    check_cuda("index", index, grad);
    check_dtype("index", index, ScalarType::Int);
    check_numel("index", index, grad.numel());
  }
  Tensor dx = torch::stable::new_empty(grad, {total_tokens, hidden});
  dispatch_dtype("grad", grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors =
        vectors_fit(hidden, kVector<T>, address(grad) | address(index) | address(dx));
    dispatch_width<kVector<T>>(vectors, [&](auto width) {
      constexpr int V = decltype(width)::value;
      if (dx.numel() == 0) {
        return;
      }
      const int64_t columns = hidden / V, blocks = ceil_div(total_tokens, PoolTiles::kTokens);
      STD_TORCH_CHECK(columns <= kInt32Max / (2 * PoolTiles::kTokens) && blocks <= kInt32Max,
                      "segment_pool_bwd: ", total_tokens, " tokens of ", hidden,
                      " columns are more than one launch can cover");
      segment_pool_bwd_kernel<T, V>
          <<<static_cast<unsigned>(blocks), PoolTiles::kThreads, 0, launcher.stream()>>>(
              data<T>(grad), data<int32_t>(index), edges, mutable_data<T>(dx), total_tokens, hidden,
              num_seqs, Divider(static_cast<uint32_t>(columns)), mode);
      Launcher::check_launch("segment_pool_bwd");
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("segment_pool_fwd", TORCH_BOX(&segment_pool_fwd));
  m.impl("segment_pool_bwd", TORCH_BOX(&segment_pool_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("segment_pool_fwd", TORCH_BOX(&segment_pool_fwd));
  m.impl("segment_pool_bwd", TORCH_BOX(&segment_pool_bwd));
}

}  // namespace fastenc::cuda
