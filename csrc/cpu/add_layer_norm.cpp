// Residual add + LayerNorm on the CPU, forward and backward, over (rows, hidden).
//
// Floor: forward reads x and residual and writes total and normed, backward reads grad_normed,
// grad_total and total and writes dx, at copy bandwidth; a row stays in L1 between its passes.
// The mean is rounded once; what that leaves of the centred row's sum (rest) is taken off it again,
// which is what counts where a row's spread is small beside its mean.
// dweight and dbias: partial sums of fixed row chunks, added in order, so that the result does not
// depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/checks.h"
#include "../common/launch_counts.h"
#include "../common/parallel.h"

#ifndef FASTENC_PROMOTED
#define FASTENC_PROMOTED
namespace fastenc::cpu {
template <typename A, typename B>
using Promoted = std::conditional_t<std::is_same_v<A, B>, A, float>;
}
#endif

#define FASTENC_KERNEL_FILE "../cpu/add_layer_norm.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
namespace fastenc::cpu::FASTENC_ISA {

// Vectors of a row, the last one partial: f(offset, lanes).
#define FASTENC_FOR_VECTORS(offset, lanes, size)                                     \
  for (int64_t offset = 0, lanes = std::min<int64_t>(kLanes, size); offset < (size); \
       offset += kLanes, lanes = std::min<int64_t>(kLanes, (size) - offset))

template <typename T>
FASTENC_INLINE vf load_up_to(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_n(p, static_cast<int>(n));
}

template <typename T>
FASTENC_INLINE void store_up_to(T* p, vf x, int64_t n) {
  n == kLanes ? store(p, x) : store_n(p, x, static_cast<int>(n));
}

template <typename T>
void widen(const T* x, float* out, int64_t size) {
  FASTENC_FOR_VECTORS(i, n, size) { store_up_to(out + i, load_up_to(x + i, n), n); }
}

// What total holds after its one rounding, in fp32.
template <typename T>
FASTENC_INLINE vf rounded_store(T* p, vf x, int64_t n) {
  store_up_to(p, x, n);
  return load_up_to(p, n);
}

template <>
FASTENC_INLINE vf rounded_store<float>(float* p, vf x, int64_t n) {
  store_up_to(p, x, n);
  return x;
}

// row: hidden floats of scratch, rounded up to whole vectors.
template <typename X, typename R>
void add_layer_norm_rows(const X* x, const R* residual, const float* weight, const float* bias,
                         Promoted<X, R>* normed, Promoted<X, R>* total, float* mean, float* rstd,
                         float* row, int64_t hidden, float eps, int64_t begin, int64_t end) {
  const float inv = 1.0f / static_cast<float>(hidden);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * hidden;
    vf sums = zero();
    FASTENC_FOR_VECTORS(i, n, hidden) {
      vf t = load_up_to(x + at + i, n);
      if (residual != nullptr) {
        t = rounded_store(total + at + i, t + load_up_to(residual + at + i, n), n);
      }
      store(row + i, t);
      sums = sums + t;
    }
    const float m = sum(sums) * inv;
    vf squares = zero(), rests = zero();
    FASTENC_FOR_VECTORS(i, n, hidden) {
      const vf d = zero_unless(first_n(static_cast<int>(n)), load(row + i) - set(m));
      rests = rests + d;
      squares = fma(d, d, squares);
    }
    const float rest = sum(rests) * inv;
    const double variance =
        static_cast<double>(sum(squares)) / hidden - static_cast<double>(rest) * rest;
    const float s = static_cast<float>(1.0 / std::sqrt(std::max(variance, 0.0) + eps));
    FASTENC_FOR_VECTORS(i, n, hidden) {
      const vf xhat = (load(row + i) - set(m) - set(rest)) * set(s);
      const vf w = load_up_to(weight + i, n);
      const vf y = bias == nullptr ? xhat * w : fma(xhat, w, load_up_to(bias + i, n));
      store_up_to(normed + at + i, y, n);
    }
    mean[r] = m;
    rstd[r] = s;
  }
}

template <typename T>
void add_layer_norm_bwd_rows(const T* grad_normed, const T* grad_total, const T* total,
                             const float* weight, const float* mean, const float* rstd, T* dx,
                             float* dweight, float* dbias, int64_t hidden, int64_t begin,
                             int64_t end) {
  const float inv = 1.0f / static_cast<float>(hidden);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * hidden;
    const vf m = set(mean[r]), s = set(rstd[r]);
    vf rests = zero();
    FASTENC_FOR_VECTORS(i, n, hidden) {
      const vf d = load_up_to(total + at + i, n) - m;
      rests = rests + zero_unless(first_n(static_cast<int>(n)), d);
    }
    const vf rest = set(sum(rests) * inv);
    vf sum_gw = zero(), sum_gwx = zero();
    FASTENC_FOR_VECTORS(i, n, hidden) {
      const vf g = load_up_to(grad_normed + at + i, n);
      const vf xhat = (load_up_to(total + at + i, n) - m - rest) * s;
      const vf gw = g * load_up_to(weight + i, n);
      sum_gw = sum_gw + gw;
      sum_gwx = fma(gw, xhat, sum_gwx);
      store_up_to(dweight + i, fma(g, xhat, load_up_to(dweight + i, n)), n);
      if (dbias != nullptr) {
        store_up_to(dbias + i, load_up_to(dbias + i, n) + g, n);
      }
    }
    const vf mean_gw = set(sum(sum_gw) * inv), mean_gwx = set(sum(sum_gwx) * inv);
    FASTENC_FOR_VECTORS(i, n, hidden) {
      const vf g = load_up_to(grad_normed + at + i, n);
      const vf xhat = (load_up_to(total + at + i, n) - m - rest) * s;
      const vf gw = g * load_up_to(weight + i, n);
      vf d = (gw - mean_gw - xhat * mean_gwx) * s;
      if (grad_total != nullptr) {
        d = d + load_up_to(grad_total + at + i, n);
      }
      store_up_to(dx + at + i, d, n);
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA
#undef FASTENC_FOR_VECTORS
#else

namespace fastenc::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;
constexpr int64_t kVectorPad = 16;
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinChunkRows = 32;

std::vector<float> widened(const Tensor& parameter_in) {
  const Tensor parameter = dense(parameter_in);
  std::vector<float> out(parameter.numel());
  dispatch_dtype("weight or bias", parameter.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    FASTENC_FOR_ACTIVE_ISA(widen<T>)(data<T>(parameter), out.data(), parameter.numel());
  });
  return out;
}

// normed, total, mean and rstd of dense x and residual; normed may be x, and total the residual.
void run_forward(const Tensor& x, const std::optional<Tensor>& residual_in, const Tensor& weight,
                 const std::optional<Tensor>& bias, double eps, Tensor& normed, Tensor& total,
                 Tensor& mean, Tensor& rstd) {
  const bool has_residual = residual_in.has_value();
  const Tensor& residual = has_residual ? *residual_in : x;
  const int64_t hidden = x.size(x.dim() - 1), rows = x.numel() / hidden;
  check_numel("residual", residual, x.numel());
  check_numel("weight", weight, hidden);
  const std::vector<float> w = widened(weight);
  const std::vector<float> b = bias ? widened(*bias) : std::vector<float>{};
  if (bias) {
    check_numel("bias", *bias, hidden);
  }
  dispatch_dtype("x", x.scalar_type(), [&](auto x_tag) {
    using X = typename decltype(x_tag)::type;
    dispatch_dtype("residual", residual.scalar_type(), [&](auto r_tag) {
      using R = typename decltype(r_tag)::type;
      using T = Promoted<X, R>;
      const auto kernel = FASTENC_FOR_ACTIVE_ISA(add_layer_norm_rows<X, R>);
      parallel_for(rows, kGrainElements / hidden, [&](int64_t begin, int64_t end) {
        std::vector<float> row(hidden + kVectorPad);
        kernel(data<X>(x), has_residual ? data<R>(residual) : nullptr, w.data(),
               bias ? b.data() : nullptr, mutable_data<T>(normed), mutable_data<T>(total),
               mutable_data<float>(mean), mutable_data<float>(rstd), row.data(), hidden,
               static_cast<float>(eps), begin, end);
      });
    });
  });
}

void check_hidden(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x: expected (..., hidden >= 1)");
}

Tensor new_stats(const Tensor& x) {
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  return torch::stable::new_empty(x, shape, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x_in,
                                                              std::optional<Tensor> residual,
                                                              const Tensor& weight,
                                                              std::optional<Tensor> bias,
                                                              double eps) {
  FASTENC_COUNT_LAUNCH("add_layer_norm");
  const Tensor x = dense(x_in);
  check_hidden(x);
  ScalarType dtype = x.scalar_type();
  if (residual) {
    residual = dense(*residual);
    dtype = promoted(dtype, residual->scalar_type());
  }
  Tensor normed = torch::stable::new_empty(x, x.sizes(), dtype);
  Tensor total = residual ? torch::stable::new_empty(x, x.sizes(), dtype)
                          : torch::stable::new_empty(x, {0}, dtype);
  Tensor mean = new_stats(x), rstd = new_stats(x);
  run_forward(x, residual, weight, bias, eps, normed, total, mean, rstd);
  return {normed, total, mean, rstd};
}

// A row is read whole before it is written.
void add_layer_norm_inplace_fwd(Tensor x, Tensor residual, const Tensor& weight,
                                std::optional<Tensor> bias, double eps) {
  FASTENC_COUNT_LAUNCH("add_layer_norm_inplace");
  check_hidden(x);
  check_dtype("residual", residual, x.scalar_type());
  STD_TORCH_CHECK(x.is_contiguous() && residual.is_contiguous(),
                  "x, residual: expected contiguous tensors");
  Tensor mean = new_stats(x), rstd = new_stats(x);
  run_forward(x, residual, weight, bias, eps, x, residual, mean, rstd);
}

// sums[c][i] over c into out, in order.
void reduce_chunks(const std::vector<float>& sums, int64_t chunks, int64_t hidden,
                   const Tensor& out) {
  std::vector<float> total(hidden, 0.0f);
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < hidden; ++i) {
      total[i] += sums[c * hidden + i];
    }
  }
  dispatch_dtype("weight", out.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    std::transform(total.begin(), total.end(), mutable_data<T>(out),
                   [](float x) { return from_float<T>(x); });
  });
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& grad_normed_in,
                                                      std::optional<Tensor> grad_total_in,
                                                      const Tensor& total_in, const Tensor& weight,
                                                      const Tensor& mean, const Tensor& rstd,
                                                      bool has_bias) {
  FASTENC_COUNT_LAUNCH("add_layer_norm_bwd");
  const Tensor total = dense(total_in), grad_normed = dense(grad_normed_in);
  const bool has_grad_total = grad_total_in.has_value();
  const Tensor grad_total = has_grad_total ? dense(*grad_total_in) : grad_normed;
  const int64_t hidden = total.size(total.dim() - 1), rows = total.numel() / hidden;
  for (const Tensor* g : {&grad_normed, &grad_total}) {
    check_dtype("gradient", *g, total.scalar_type());
    check_numel("gradient", *g, total.numel());
  }
  check_numel("weight", weight, hidden);
  check_numel("mean", mean, rows);
  check_numel("rstd", rstd, rows);
  const std::vector<float> w = widened(weight);
  const int64_t chunk_rows = std::max(kMinChunkRows, (rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  std::vector<float> dweights(chunks * hidden, 0.0f);
  std::vector<float> dbiases(has_bias ? chunks * hidden : 0, 0.0f);
  Tensor dx = torch::stable::empty_like(total);
  dispatch_dtype("total", total.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = FASTENC_FOR_ACTIVE_ISA(add_layer_norm_bwd_rows<T>);
    parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        kernel(data<T>(grad_normed), has_grad_total ? data<T>(grad_total) : nullptr, data<T>(total),
               w.data(), data<float>(mean), data<float>(rstd), mutable_data<T>(dx),
               dweights.data() + c * hidden, has_bias ? dbiases.data() + c * hidden : nullptr,
               hidden, c * chunk_rows, std::min(rows, (c + 1) * chunk_rows));
      }
    });
  });
  Tensor dweight = torch::stable::new_empty(weight, {hidden});
  Tensor dbias = torch::stable::new_empty(weight, {has_bias ? hidden : 0});
  reduce_chunks(dweights, chunks, hidden, dweight);
  if (has_bias) {
    reduce_chunks(dbiases, chunks, hidden, dbias);
  }
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
  m.impl("add_layer_norm_inplace_fwd", TORCH_BOX(&add_layer_norm_inplace_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
  m.impl("add_layer_norm_inplace_fwd", TORCH_BOX(&add_layer_norm_inplace_fwd));
}

}  // namespace fastenc::cpu
#endif
