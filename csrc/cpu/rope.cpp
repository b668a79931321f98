// RoPE on the CPU: rotate-half of (total_tokens, n, heads, head_dim) by each token's position.
//
// Floor: one read and one write of x at copy bandwidth; cos and sin are read once a token.
#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/checks.h"
#include "../common/launch_counts.h"
#include "../common/parallel.h"

#ifndef FASTENC_ROPE_ARGS
#define FASTENC_ROPE_ARGS
namespace fastenc::cpu {
struct RopeArgs {
  int64_t n, heads, half;
  int64_t stride_token, stride_n, stride_head;  // of x, in elements; the output is contiguous
  float sign;                                   // of sin: -1 rotates back
};
}  // namespace fastenc::cpu
#endif

#define FASTENC_KERNEL_FILE "../cpu/rope.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
namespace fastenc::cpu::FASTENC_ISA {

template <typename C>
void widen_row(const C* row, float* out, int64_t n, float sign) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = sign * to_float(row[i]);
  }
}

template <typename T>
void rotate_head(const T* x, T* y, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, half - i));
    if (n == kLanes) {
      const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
      store(y + i, fnma(b, s, a * c));
      store(y + half + i, fma(a, s, b * c));
    } else {
      const vf a = load_n(x + i, n), b = load_n(x + half + i, n);
      const vf c = load_n(cos + i, n), s = load_n(sin + i, n);
      store_n(y + i, fnma(b, s, a * c), n);
      store_n(y + half + i, fma(a, s, b * c), n);
    }
  }
}

template <typename T, typename C>
void rope_tokens(const T* x, T* y, const C* cos, const C* sin, const int64_t* positions,
                 const RopeArgs& args, int64_t begin, int64_t end) {
  std::vector<float> tables(2 * args.half);
  float* c = tables.data();
  float* s = c + args.half;
  T* out = y + begin * args.n * args.heads * 2 * args.half;
  for (int64_t token = begin; token < end; ++token) {
    widen_row(cos + positions[token] * args.half, c, args.half, 1.0f);
    widen_row(sin + positions[token] * args.half, s, args.half, args.sign);
    for (int64_t k = 0; k < args.n; ++k) {
      const T* row = x + token * args.stride_token + k * args.stride_n;
      for (int64_t h = 0; h < args.heads; ++h, out += 2 * args.half) {
        rotate_head(row + h * args.stride_head, out, c, s, args.half);
      }
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA
#else

namespace fastenc::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;

std::vector<int64_t> checked_positions(const Tensor& positions_in, int64_t total, int64_t rows) {
  const Tensor positions = dense(positions_in);
  check_numel("positions", positions, total);
  std::vector<int64_t> p(total);
  if (positions.scalar_type() == ScalarType::Int) {
    std::copy_n(data<int32_t>(positions), total, p.begin());
  } else {
    check_dtype("positions", positions, ScalarType::Long);
    std::copy_n(data<int64_t>(positions), total, p.begin());
  }
  for (int64_t position : p) {
    STD_TORCH_CHECK(position >= 0 && position < rows, "positions: expected 0 to ", rows - 1,
                    " (rows of cos), got ", position);
  }
  return p;
}

Tensor rotate(const Tensor& x_in, const Tensor& cos_in, const Tensor& sin_in,
              const Tensor& positions, float sign) {
  const Tensor x = dense_rows(x_in);
  const Tensor cos = dense(cos_in), sin = dense(sin_in);
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim == 3 || dim == 4, "x: expected 3 or 4 dimensions, got ", dim);
  const int64_t head_dim = x.size(dim - 1), total = x.size(0);
  STD_TORCH_CHECK(head_dim % 2 == 0, "x: expected an even head_dim, got ", head_dim);
  check_dim("cos", cos, 2);
  STD_TORCH_CHECK(cos.size(1) == head_dim / 2, "cos: expected head_dim / 2 columns");
  check_numel("sin", sin, cos.numel());
  check_dtype("sin", sin, cos.scalar_type());
  const RopeArgs args{dim == 4 ? x.size(1) : 1,   x.size(dim - 2),   head_dim / 2, x.stride(0),
                      dim == 4 ? x.stride(1) : 0, x.stride(dim - 2), sign};
  const std::vector<int64_t> p = checked_positions(positions, total, cos.size(0));
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const int64_t per_token = std::max<int64_t>(1, args.n * args.heads * head_dim);
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_dtype("cos", cos.scalar_type(), [&](auto table_tag) {
      using C = typename decltype(table_tag)::type;
      const auto kernel = FASTENC_FOR_ACTIVE_ISA(rope_tokens<T, C>);
      parallel_for(total, kGrainElements / per_token, [&](int64_t begin, int64_t end) {
        kernel(data<T>(x), mutable_data<T>(y), data<C>(cos), data<C>(sin), p.data(), args, begin,
               end);
      });
    });
  });
  return y;
}

Tensor rope_fwd(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  FASTENC_COUNT_LAUNCH("rope");
  return rotate(x, cos, sin, positions, 1.0f);
}

Tensor rope_bwd(const Tensor& grad, const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  FASTENC_COUNT_LAUNCH("rope_bwd");
  return rotate(grad, cos, sin, positions, -1.0f);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("rope_bwd", TORCH_BOX(&rope_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("rope_bwd", TORCH_BOX(&rope_bwd));
}

}  // namespace fastenc::cpu
#endif
