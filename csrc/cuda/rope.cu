// RoPE on NVIDIA GPUs (sm_80 and up), both directions: check, choose, launch. Device code:
// rope.cuh.
//
// Floor: one read and one write of x at copy bandwidth; cos and sin stay in cache. At 4.3 TB/s,
// bf16, 12 heads x 64, q and k: 1.4 ns a token. Prediction, H200: bandwidth-bound (680 instructions
// a warp for 8 KB moved, where the SMs can issue about 1760 in the time that copying takes), 93% of
// copy, and independent of num_seqs since the grid is linear in tokens. Has not run on a GPU:
// tests/test_cuda_row_model.py runs the sources on the CPU.
#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "rope.cuh"

namespace fastenc::cuda {
namespace {

bool strides_keep_vectors(const Tensor& x) {
  uint64_t bits = 0;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    bits |= static_cast<uint64_t>(x.size(d) > 1 ? x.stride(d) : 0);
  }
  return bits * x.element_size() % kAccessBytes == 0;
}

Tensor rotate(const char* op, const Tensor& x_in, const Tensor& cos_in, const Tensor& sin_in,
              const Tensor& positions_in, float sign) {
  const Launcher launcher(x_in);
  const Tensor x = dense_rows(x_in);
  const Tensor cos = dense(cos_in), sin = dense(sin_in), positions = dense(positions_in);
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim == 3 || dim == 4, "x: expected 3 or 4 dimensions, got ", dim);
  const int64_t tokens = x.size(0), n = dim == 4 ? x.size(1) : 1, heads = x.size(dim - 2);
  const int64_t head_dim = x.size(dim - 1), half = head_dim / 2;
  STD_TORCH_CHECK(head_dim % 2 == 0, "x: expected an even head_dim, got ", head_dim);
  check_cuda("cos", cos, x);
  check_cuda("sin", sin, x);
  check_cuda("positions", positions, x);
  check_dim("cos", cos, 2);
  STD_TORCH_CHECK(cos.size(1) == half, "cos: expected head_dim / 2 columns");
  check_numel("sin", sin, cos.numel());
  check_dtype("sin", sin, cos.scalar_type());
  check_numel("positions", positions, tokens);
  const bool wide_positions = positions.scalar_type() == ScalarType::Long;
  if (!wide_positions) {
    check_dtype("positions", positions, ScalarType::Int);
  }
  Tensor y = torch::stable::new_empty(x, x.sizes());
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors =
        vectors_fit(half, kVector<T>, address(x) | address(y) | address(cos) | address(sin)) &&
        strides_keep_vectors(x);
    dispatch_dtype("cos", cos.scalar_type(), [&](auto table_tag) {
      using C = typename decltype(table_tag)::type;
      dispatch_width<kVector<T>>(vectors, [&](auto width) {
        constexpr int V = decltype(width)::value;
        if (y.numel() == 0) {
          return;
        }
        STD_TORCH_CHECK(rope_tiles_fit(tokens, n, heads, half / V), op, ": ", tokens, " tokens x ",
                        n * heads, " heads x ", head_dim, " are more than one launch can cover");
        const RopeArgs args{make_rope_tiles(tokens, n, heads, half / V),
                            half,
                            x.stride(0),
                            dim == 4 ? x.stride(1) : 0,
                            x.stride(dim - 2),
                            positions.data_ptr(),
                            wide_positions,
                            sign};
        const FlatTiles& flat = args.tiles.flat;
        rope_kernel<T, C, V>
            <<<dim3(flat.blocks, flat.groups), FlatTiles::kThreads, 0, launcher.stream()>>>(
                data<T>(x), mutable_data<T>(y), data<C>(cos), data<C>(sin), args);
        Launcher::check_launch(op);
      });
    });
  });
  return y;
}

Tensor rope_fwd(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  FASTENC_COUNT_LAUNCH("rope");
  return rotate("rope", x, cos, sin, positions, 1.0f);
}

Tensor rope_bwd(const Tensor& grad, const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  FASTENC_COUNT_LAUNCH("rope_bwd");
  return rotate("rope_bwd", grad, cos, sin, positions, -1.0f);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("rope_bwd", TORCH_BOX(&rope_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("rope_bwd", TORCH_BOX(&rope_bwd));
}

}  // namespace fastenc::cuda
