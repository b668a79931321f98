// GeGLU on the CPU: act(x[:, :I]) * x[:, I:], forward and backward, over (rows, 2 I).
//
// Floor: 3 I elements read or written a row forward, 5 I backward, at copy bandwidth; the erf costs
// about as much as the memory traffic of one thread, so both run together.
#include <algorithm>
#include <cstdint>
#include <string>

#include <torch/csrc/stable/library.h>

#include "../common/activation.h"
#include "../common/checks.h"
#include "../common/launch_counts.h"
#include "../common/parallel.h"

#define FASTENC_KERNEL_FILE "../cpu/geglu.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "activations.h"

namespace fastenc::cpu::FASTENC_ISA {

template <typename T, Activation kActivation>
void geglu_rows(const T* x, T* y, int64_t inner, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* a = x + row * 2 * inner;
    gate_row<kActivation>(a, a + inner, y + row * inner, inner);
  }
}

template <typename T, Activation kActivation>
void geglu_bwd_rows(const T* grad, const T* x, T* dx, int64_t inner, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* g = grad + row * inner;
    const T* a = x + row * 2 * inner;
    T* da = dx + row * 2 * inner;
    for (int64_t i = 0; i < inner; i += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, inner - i));
      const bool whole = n == kLanes;
      const vf upstream = whole ? load(g + i) : load_n(g + i, n);
      const vf gate = whole ? load(a + inner + i) : load_n(a + inner + i, n);
      const auto f = activate_with_slope<kActivation>(whole ? load(a + i) : load_n(a + i, n));
      const vf to_input = upstream * gate * f.slope, to_gate = upstream * f.value;
      if (whole) {
        store(da + i, to_input);
        store(da + inner + i, to_gate);
      } else {
        store_n(da + i, to_input, n);
        store_n(da + inner + i, to_gate, n);
      }
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA
#else

namespace fastenc::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;

int64_t inner_size(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0,
                  "x: expected a last dimension of even size");
  return x.size(x.dim() - 1) / 2;
}

Tensor geglu_fwd(const Tensor& x_in, std::string activation) {
  FASTENC_COUNT_LAUNCH("geglu");
  const Tensor x = dense(x_in);
  const int64_t inner = inner_size(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = inner;
  Tensor y = torch::stable::new_empty(x, shape);
  const int64_t rows = inner == 0 ? 0 : y.numel() / inner;
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_activation(activation, [&](auto act) {
      const auto kernel = FASTENC_FOR_ACTIVE_ISA(geglu_rows<T, decltype(act)::value>);
      parallel_for(rows, kGrainElements / std::max<int64_t>(1, inner), [&](int64_t b, int64_t e) {
        kernel(data<T>(x), mutable_data<T>(y), inner, b, e);
      });
    });
  });
  return y;
}

Tensor geglu_bwd(const Tensor& grad_in, const Tensor& x_in, std::string activation) {
  FASTENC_COUNT_LAUNCH("geglu_bwd");
  const Tensor x = dense(x_in), grad = dense(grad_in);
  const int64_t inner = inner_size(x);
  check_dtype("grad", grad, x.scalar_type());
  check_numel("grad", grad, x.numel() / 2);
  Tensor dx = torch::stable::empty_like(x);
  const int64_t rows = inner == 0 ? 0 : grad.numel() / inner;
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_activation(activation, [&](auto act) {
      const auto kernel = FASTENC_FOR_ACTIVE_ISA(geglu_bwd_rows<T, decltype(act)::value>);
      parallel_for(rows, kGrainElements / std::max<int64_t>(1, inner), [&](int64_t b, int64_t e) {
        kernel(data<T>(grad), data<T>(x), mutable_data<T>(dx), inner, b, e);
      });
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("geglu_fwd", TORCH_BOX(&geglu_fwd));
  m.impl("geglu_bwd", TORCH_BOX(&geglu_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("geglu_fwd", TORCH_BOX(&geglu_fwd));
  m.impl("geglu_bwd", TORCH_BOX(&geglu_bwd));
}

}  // namespace fastenc::cpu
#endif
