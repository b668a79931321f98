// y = x w^T + bias in fp32 on the CPU: the linear layers and, on transposed views, their gradients.
//
// Floor: 2 m n k FLOPs at two FMA a cycle, and for few rows w once from memory. MKL keeps its best
// kernels for Intel's processors and oneDNN adds up all of k in one run, which doubles its error.
//
// EPYC (Zen 4, AVX-512), one core, 1008 x 768 x 768, GFLOP/s and rms error in 1e-7:
//   MKL 100.1, 2.52   oneDNN 109.6, 3.72   v1 panels 111.7, 2.52
// 8 x 768 x 768:  MKL 58, 2.52   oneDNN 59, 3.64   v1 dots 99, 1.33
// Xeon (Sapphire Rapids, AVX-512), one core, 2048 x 768 x 2304, share of MKL's rate:
//   v1 tile 8x2 0.90   v2 tile 9x3 0.96
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>

#include "../common/activation.h"
#include "../common/checks.h"
#include "../common/launch_counts.h"
#include "../common/parallel.h"
#include "linear_problem.h"
#include "scratch.h"

#define FASTENC_KERNEL_FILE "../cpu/linear.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "activations.h"
#include "linear_tiles.h"
#else

namespace fastenc::cpu {
namespace {

// Under so many multiplications one thread is done before the others have begun.
constexpr int64_t kOneThread = 262144;

bool unit_stride(const Tensor& x) { return x.stride(0) == 1 || x.stride(1) == 1; }

Tensor one_unit_stride(const Tensor& x) {
  return unit_stride(x) ? x : torch::stable::contiguous(x);
}

int64_t threads_for(const LinearProblem& p) {
  return p.m * p.n * p.k < kOneThread ? 1 : num_threads();
}

// Chosen once per process: by the processor, or what FASTENC_LINEAR_TILE (narrow, wide) asks for.
bool takes_wide_tile() {
  static const bool wide = [] {
    const char* given = std::getenv("FASTENC_LINEAR_TILE");
    const std::string asked = given == nullptr ? "" : given;
    STD_TORCH_CHECK(asked.empty() || asked == "narrow" || asked == "wide",
                    "FASTENC_LINEAR_TILE: expected narrow or wide, got '", asked, "'");
    return asked.empty() ? cpu_is_intel() : asked == "wide";
  }();
  return wide;
}

// A kernel over a grid of row tiles and of panels of `columns` columns.
template <typename Kernel>
void run_panels(const LinearProblem& p, int64_t columns, Kernel narrow, Kernel wide) {
  const bool is_wide = takes_wide_tile();
  const Kernel kernel = is_wide ? wide : narrow;
  const int64_t width = is_wide ? *FASTENC_FOR_ACTIVE_ISA(PanelTile<true>::kWidth)
                                : *FASTENC_FOR_ACTIVE_ISA(PanelTile<false>::kWidth);
  const int64_t height = is_wide ? *FASTENC_FOR_ACTIVE_ISA(PanelTile<true>::kRows)
                                 : *FASTENC_FOR_ACTIVE_ISA(PanelTile<false>::kRows);
  const int64_t panels = (columns + width - 1) / width, blocks = (p.m + height - 1) / height;
  const Grid grid = cut(blocks, height, panels, threads_for(p));
  parallel_for(grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / grid.columns, c = i % grid.columns;
      kernel(p, std::min(p.m, blocks * r / grid.rows * height),
             std::min(p.m, blocks * (r + 1) / grid.rows * height), panels * c / grid.columns,
             panels * (c + 1) / grid.columns);
    }
  });
}

void run(const LinearProblem& p) {
  if (p.m == 0 || p.n == 0) {
    return;
  }
  if (p.x_k == 1 && p.w_k == 1 && (p.m <= kFewRows || p.n <= kFewColumns)) {
    const auto kernel = FASTENC_FOR_ACTIVE_ISA(linear_dots);
    const int64_t threads = threads_for(p);
    if (p.n > kFewColumns) {
      parallel_for(p.n, (p.n + threads - 1) / threads,
                   [&](int64_t begin, int64_t end) { kernel(p, 0, p.m, begin, end); });
    } else {
      parallel_for(p.m, (p.m + threads - 1) / threads,
                   [&](int64_t begin, int64_t end) { kernel(p, begin, end, 0, p.n); });
    }
    return;
  }
  run_panels(p, p.n, FASTENC_FOR_ACTIVE_ISA(linear_panels<false>),
             FASTENC_FOR_ACTIVE_ISA(linear_panels<true>));
}

// Checked operands of y (m, n) = x w^T + bias, kept alive; `y` is to be filled in.
struct Operands {
  Tensor x, w;
  std::optional<Tensor> bias;

  Operands(const Tensor& x_in, const Tensor& w_in, const std::optional<Tensor>& bias_in)
      : x(x_in), w(w_in), bias(bias_in) {
    check_dim("x", x, 2);
    check_dim("weight", w, 2);
    check_dtype("x", x, ScalarType::Float);
    check_dtype("weight", w, ScalarType::Float);
    STD_TORCH_CHECK(x.size(1) == w.size(1), "weight: expected (out_features, ", x.size(1),
                    "), got (", w.size(0), ", ", w.size(1), ")");
    x = one_unit_stride(x);
    w = one_unit_stride(w);
    if (bias) {
      check_dtype("bias", *bias, ScalarType::Float);
      check_numel("bias", *bias, w.size(0));
      bias = dense(*bias);
    }
  }

  // `y`: (rows of x, columns), dense.
  LinearProblem problem(Tensor& y, int64_t columns) const {
    check_dim("y", y, 2);
    check_dtype("y", y, ScalarType::Float);
    STD_TORCH_CHECK(y.size(0) == x.size(0) && y.size(1) == columns && y.is_contiguous(),
                    "y: expected contiguous (", x.size(0), ", ", columns, "), got (", y.size(0),
                    ", ", y.size(1), ")");
    return {data<float>(x),
            x.stride(0),
            x.stride(1),
            data<float>(w),
            w.stride(0),
            w.stride(1),
            bias ? data<float>(*bias) : nullptr,
            mutable_data<float>(y),
            columns,
            x.size(0),
            w.size(0),
            x.size(1)};
  }
};

void linear_fwd(const Tensor& x, const Tensor& w, std::optional<Tensor> bias, Tensor y) {
  FASTENC_COUNT_LAUNCH("linear");
  const Operands operands(x, w, bias);
  run(operands.problem(y, w.size(0)));
}

void linear_geglu_fwd(const Tensor& x, const Tensor& w, std::optional<Tensor> bias,
                      std::string activation, Tensor y) {
  FASTENC_COUNT_LAUNCH("linear_geglu");
  Operands operands(x, w, bias);
  STD_TORCH_CHECK(w.size(0) % 2 == 0, "weight: expected an even number of rows, got ", w.size(0));
  if (operands.x.stride(1) != 1) {
    operands.x = torch::stable::contiguous(operands.x);
  }
  const LinearProblem p = operands.problem(y, w.size(0) / 2);
  dispatch_activation(activation, [&](auto act) {
    if (y.numel() != 0) {
      constexpr Activation kActivation = decltype(act)::value;
      run_panels(p, p.n / 2, FASTENC_FOR_ACTIVE_ISA(linear_geglu_panels<kActivation, false>),
                 FASTENC_FOR_ACTIVE_ISA(linear_geglu_panels<kActivation, true>));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_geglu_fwd", TORCH_BOX(&linear_geglu_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_geglu_fwd", TORCH_BOX(&linear_geglu_fwd));
}

}  // namespace fastenc::cpu
#endif
