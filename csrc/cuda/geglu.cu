// GeGLU on NVIDIA GPUs (sm_80 and up), both directions: check, choose, launch. Device code:
// geglu.cuh.
//
// Floor: bytes at copy bandwidth; forward 3 I elements a row (6 I bytes in bf16), backward 5 I
// (10 I bytes). At 4.3 TB/s and I = 1152: 1.6 ns a row forward, 2.7 ns backward.
// Prediction, H200: issue-bound as much as memory-bound. In bf16 a warp moves 1536 bytes forward in
// 304 instructions (sm_90a; eight erf are most of them), where the SMs can issue about 330 in the
// time that copying takes; backward 432 for 2560 bytes, where they can issue 550. So 85 to 92% of
// copy forward, 90 to 95% backward; a shorter erf is the first thing to try. Has not run on a GPU:
// tests/test_cuda_row_model.py runs the sources on the CPU.
#include <string>

#include <torch/csrc/stable/library.h>

#include "../common/activation.h"
#include "geglu.cuh"
#include "launch.cuh"

namespace fastenc::cuda {
namespace {

FlatTiles choose(int64_t rows, int64_t inner, int width) {
  const int64_t columns = inner / width;
  STD_TORCH_CHECK(flat_tiles_fit(rows, columns), "geglu: ", rows, " rows of ", inner,
                  " columns are more than one launch can cover");
  return make_flat_tiles(rows, columns);
}

int64_t inner_size(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0,
                  "x: expected a last dimension of even size");
  return x.size(x.dim() - 1) / 2;
}

Tensor geglu_fwd(const Tensor& x_in, std::string activation) {
  FASTENC_COUNT_LAUNCH("geglu");
  const Launcher launcher(x_in);
  const Tensor x = dense(x_in);
  const int64_t inner = inner_size(x);
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = inner;
  Tensor y = torch::stable::new_empty(x, shape);
  const int64_t rows = inner == 0 ? 0 : y.numel() / inner;
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors = vectors_fit(inner, kVector<T>, address(x) | address(y));
    dispatch_width<kVector<T>>(vectors, [&](auto width) {
      constexpr int V = decltype(width)::value;
      dispatch_activation(activation, [&](auto act) {
        if (rows == 0) {
          return;
        }
        const FlatTiles tiles = choose(rows, inner, V);
        geglu_fwd_kernel<T, V, decltype(act)::value>
            <<<dim3(tiles.blocks, tiles.groups), FlatTiles::kThreads, 0, launcher.stream()>>>(
                data<T>(x), mutable_data<T>(y), tiles);
        Launcher::check_launch("geglu");
      });
    });
  });
  return y;
}

Tensor geglu_bwd(const Tensor& grad_in, const Tensor& x_in, std::string activation) {
  FASTENC_COUNT_LAUNCH("geglu_bwd");
  const Launcher launcher(x_in);
  const Tensor x = dense(x_in), grad = dense(grad_in);
  const int64_t inner = inner_size(x);
  check_cuda("grad", grad, x);
  check_dtype("grad", grad, x.scalar_type());
  check_numel("grad", grad, x.numel() / 2);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  const int64_t rows = inner == 0 ? 0 : grad.numel() / inner;
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors = vectors_fit(inner, kVector<T>, address(x) | address(grad) | address(dx));
    dispatch_width<kVector<T>>(vectors, [&](auto width) {
      constexpr int V = decltype(width)::value;
      dispatch_activation(activation, [&](auto act) {
        if (rows == 0) {
          return;
        }
        const FlatTiles tiles = choose(rows, inner, V);
        geglu_bwd_kernel<T, V, decltype(act)::value>
            <<<dim3(tiles.blocks, tiles.groups), FlatTiles::kThreads, 0, launcher.stream()>>>(
                data<T>(grad), data<T>(x), mutable_data<T>(dx), tiles);
        Launcher::check_launch("geglu_bwd");
      });
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("geglu_fwd", TORCH_BOX(&geglu_fwd));
  m.impl("geglu_bwd", TORCH_BOX(&geglu_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("geglu_fwd", TORCH_BOX(&geglu_fwd));
  m.impl("geglu_bwd", TORCH_BOX(&geglu_bwd));
}

}  // namespace fastenc::cuda
