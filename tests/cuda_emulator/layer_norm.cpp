// The kernels of add_layer_norm, for every dtype, behind plain C functions. Which of them runs, on
// how many blocks, is for csrc/common/row_tiles.h to say, as on a GPU.
#include "csrc/cuda/add_layer_norm.cuh"
#include "csrc/cuda/add_layer_norm_bwd.cuh"
#include "rows.h"

using namespace fastenc;
using namespace fastenc::cuda;

namespace {

// A workspace of NaN, and what must stay as it is behind it.
struct Workspace {
  std::vector<float> memory;

  explicit Workspace(size_t size) : memory(size, std::nanf("")) { memory.resize(size + 64, -7.0f); }
  ~Workspace() {
    if (!std::all_of(memory.end() - 64, memory.end(), [](float x) { return x == -7.0f; })) {
      emulator::fail("a kernel wrote behind its workspace");
    }
  }
};

}  // namespace

// Both return the elements that a thread moves at once.
extern "C" {

// Without a residual: residual, total null, and its dtype that of x.
int add_layer_norm_fwd(int x_dtype, int residual_dtype, const void* x, const void* residual,
                       const Parameter* weight, const Parameter* bias, void* normed, void* total,
                       float* mean, float* rstd, int64_t rows, int64_t hidden, float eps,
                       int backwards) {
  int used = 0;
  const uint64_t bits = address(x, residual, weight->data, bias->data, normed, total);
  dispatch(x_dtype, [&](auto x_tag) {
    using X = decltype(x_tag);
    dispatch(residual_dtype, [&](auto r_tag) {
      using R = decltype(r_tag);
      using T = Promoted<X, R>;
      constexpr int V = kPairVector<X, R>;
      const RowPlan plan = plan_layer_norm(rows, hidden, vectors_fit(hidden, V, bits));
      used = plan.in_registers ? V : 1;
      const X* from = static_cast<const X*>(x);
      const R* added = static_cast<const R*>(residual);
      T* to = static_cast<T*>(normed);
      T* sum = static_cast<T*>(total);
      const dim3 grid{static_cast<uint32_t>(plan.blocks)};
      if (plan.in_registers) {
        const uint32_t threads = plan.threads_per_row * plan.rows_per_block;
        emulator::launch(
            grid, {threads}, 0,
            [&] {
              add_layer_norm_fwd_kernel<X, R, V>(from, added, *weight, *bias, to, sum, mean, rstd,
                                                 rows, hidden, plan.threads_per_row, eps);
            },
            backwards);
      } else {
        emulator::launch(
            grid, {kLoopThreads}, 0,
            [&] {
              add_layer_norm_fwd_loop_kernel<X, R>(from, added, *weight, *bias, to, sum, mean, rstd,
                                                   hidden, eps);
            },
            backwards);
      }
    });
  });
  return used;
}

// dbias may be null.
int add_layer_norm_bwd(int dtype, const void* grad_normed, const void* grad_total,
                       const void* total, const Parameter* weight, const float* mean,
                       const float* rstd, void* dx, void* dweight, void* dbias, int64_t rows,
                       int64_t hidden, int sm_count, int backwards) {
  int used = 0;
  const uint64_t bits = address(grad_normed, grad_total, total, weight->data, dx);
  const bool has_bias = dbias != nullptr;
  const int64_t pitch = PartialSums::pitch(hidden);
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const RowPlan plan =
        plan_layer_norm_bwd(rows, hidden, vectors_fit(hidden, kVector<T>, bits), sm_count);
    used = plan.in_registers ? kVector<T> : 1;
    Workspace workspace((has_bias ? 2 : 1) * plan.blocks * pitch);
    float* partials = workspace.memory.data();
    const auto kernel = !plan.in_registers ? add_layer_norm_bwd_loop_kernel<T>
                        : plan.elements == kBackwardElements
                            ? add_layer_norm_bwd_kernel<T, kBackwardElements>
                            : add_layer_norm_bwd_kernel<T, kWideBackwardElements>;
    emulator::launch(
        {static_cast<uint32_t>(plan.blocks)}, {static_cast<uint32_t>(plan.threads_per_row)}, 0,
        [&] {
          kernel(static_cast<const T*>(grad_normed), static_cast<const T*>(grad_total),
                 static_cast<const T*>(total), *weight, mean, rstd, static_cast<T*>(dx), partials,
                 has_bias, rows, hidden, pitch);
        },
        backwards);
    dispatch(static_cast<int>(weight->dtype), [&](auto weight_tag) {
      using W = decltype(weight_tag);
      emulator::launch(
          {blocks_of(pitch, PartialSums::kColumns), has_bias ? 2u : 1u},
          {PartialSums::kLanes * PartialSums::kSlices}, 0,
          [&] {
            add_layer_norm_sum_kernel<W>(partials, static_cast<W*>(dweight), static_cast<W*>(dbias),
                                         plan.blocks, hidden, pitch);
          },
          backwards);
    });
  });
  return used;
}
}
