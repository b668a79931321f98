// Segment pooling on the CPU: one row for each packed sequence, and its gradient.
//
// Floor: one read of x at copy bandwidth. A task is (sequence, block of columns). The sum over
// tokens carries its rounding error along (Knuth's two-sum), so that terms which cancel, and long
// sequences, cost no accuracy; its six operations an element hide behind the read.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/checks.h"
#include "../common/launch_counts.h"
#include "../common/parallel.h"

#define FASTENC_KERNEL_FILE "../cpu/segment_pool.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
namespace fastenc::cpu::FASTENC_ISA {

template <typename T>
FASTENC_INLINE vf load_up_to(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}

template <typename T>
FASTENC_INLINE void store_up_to(T* p, vf x, int n) {
  n == kLanes ? store(p, x) : store_n(p, x, n);
}

template <typename T>
void mean_columns(const T* x, T* out, int64_t tokens, int64_t hidden, int64_t columns) {
  const vf count = set(static_cast<float>(tokens));
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, columns - c));
    vf total = zero(), lost = zero();
    for (int64_t t = 0; t < tokens; ++t) {
      const vf term = load_up_to(x + t * hidden + c, n);
      const vf sum = total + term;
      const vf added = sum - total;
      lost = lost + ((total - (sum - added)) + (term - added));
      total = sum;
    }
    const vf exact = select(is_nan(lost), total, total + lost);  // an infinite term loses NaN
    store_up_to(out + c, exact / count, n);
  }
}

template <typename T>
void max_columns(const T* x, T* out, int32_t* index, int64_t first_token, int64_t tokens,
                 int64_t hidden, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, columns - c));
    vf best = load_up_to(x + c, n);
    vi best_index = set_int(static_cast<int32_t>(first_token));
    for (int64_t t = 1; t < tokens; ++t) {
      const vf value = load_up_to(x + t * hidden + c, n);
      const vm better = (value > best) | (is_nan(value) & !is_nan(best));
      best = select(better, value, best);
      best_index = select(better, set_int(static_cast<int32_t>(first_token + t)), best_index);
    }
    store_up_to(out + c, best, n);
    int32_t indices[kLanes];
    store_int(indices, best_index);
    std::copy_n(indices, n, index + c);
  }
}

// dx rows [begin, end) of one sequence: the mean's gradient.
template <typename T>
void spread_row(const T* grad, T* dx, int64_t tokens, int64_t hidden) {
  const vf scale = set(1.0f / static_cast<float>(tokens));
  for (int64_t c = 0; c < hidden; c += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, hidden - c));
    store_up_to(dx + c, load_up_to(grad + c, n) * scale, n);
  }
  for (int64_t t = 1; t < tokens; ++t) {
    std::copy_n(dx, hidden, dx + t * hidden);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA
#else

namespace fastenc::cpu {
namespace {

constexpr int64_t kColumns = 256;

enum class Mode { kMean, kCls, kMax, kLast };

Mode parse_mode(const std::string& mode) {
  if (mode == "mean") {
    return Mode::kMean;
  }
  if (mode == "cls") {
    return Mode::kCls;
  }
  if (mode == "max") {
    return Mode::kMax;
  }
  STD_TORCH_CHECK(mode == "last", "mode: expected mean, cls, max or last, got ", mode);
  return Mode::kLast;
}

std::tuple<Tensor, Tensor> segment_pool_fwd(const Tensor& x_in, const Tensor& cu_seqlens,
                                            std::string mode_name) {
  FASTENC_COUNT_LAUNCH("segment_pool");
  const Mode mode = parse_mode(mode_name);
  check_dim("x", x_in, 2);
  const Tensor x = dense(x_in);
  const int64_t hidden = x.size(1), num_seqs = cu_seqlens.size(0) - 1;
  const int32_t* edges = check_cu_seqlens(cu_seqlens, x.size(0));
  Tensor out = torch::stable::new_empty(x, {num_seqs, hidden});
  const bool indexed = mode == Mode::kMax;
  Tensor index = torch::stable::new_empty(
      x, indexed ? std::vector<int64_t>{num_seqs, hidden} : std::vector<int64_t>{0},
      ScalarType::Int);
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* rows = data<T>(x);
    T* pooled = mutable_data<T>(out);
    int32_t* indices = mutable_data<int32_t>(index);
    const auto mean = FASTENC_FOR_ACTIVE_ISA(mean_columns<T>);
    const auto max = FASTENC_FOR_ACTIVE_ISA(max_columns<T>);
    const int64_t blocks = (hidden + kColumns - 1) / kColumns;
    std::vector<int64_t> costs(num_seqs * blocks);
    for (size_t i = 0; i < costs.size(); ++i) {
      costs[i] = edges[i / blocks + 1] - edges[i / blocks];
    }
    run_tasks(costs, [&](int64_t task) {
      const int64_t seq = task / blocks, column = task % blocks * kColumns;
      const int64_t columns = std::min(kColumns, hidden - column), tokens = costs[task];
      const int64_t at = seq * hidden + column;
      const T* first = rows + edges[seq] * hidden + column;
      if (tokens == 0) {
        std::fill_n(pooled + at, columns, T{});
        if (indexed) {
          std::fill_n(indices + at, columns, -1);
        }
      } else if (mode == Mode::kMean) {
        mean(first, pooled + at, tokens, hidden, columns);
      } else if (indexed) {
        max(first, pooled + at, indices + at, edges[seq], tokens, hidden, columns);
      } else {
        std::copy_n(mode == Mode::kCls ? first : first + (tokens - 1) * hidden, columns,
                    pooled + at);
      }
    });
  });
  return {out, index};
}

Tensor segment_pool_bwd(const Tensor& grad_in, const Tensor& index_in, const Tensor& cu_seqlens,
                        int64_t total_tokens, std::string mode_name) {
  FASTENC_COUNT_LAUNCH("segment_pool_bwd");
  const Mode mode = parse_mode(mode_name);
  check_dim("grad", grad_in, 2);
  const Tensor grad = dense(grad_in), index = dense(index_in);
  const int64_t hidden = grad.size(1), num_seqs = grad.size(0);
  check_numel("cu_seqlens", cu_seqlens, num_seqs + 1);
  const int32_t* edges = check_cu_seqlens(cu_seqlens, total_tokens);
  if (mode == Mode::kMax) {
    check_dtype("index", index, ScalarType::Int);
    check_numel("index", index, grad.numel());
  }
  Tensor dx = torch::stable::new_empty(grad, {total_tokens, hidden});
  dispatch_dtype("grad", grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto spread = FASTENC_FOR_ACTIVE_ISA(spread_row<T>);
    std::vector<int64_t> costs(num_seqs);
    for (int64_t i = 0; i < num_seqs; ++i) {
      costs[i] = edges[i + 1] - edges[i];
    }
    run_tasks(costs, [&](int64_t seq) {
      const int64_t tokens = costs[seq];
      const T* g = data<T>(grad) + seq * hidden;
      T* first = mutable_data<T>(dx) + edges[seq] * hidden;
      if (tokens == 0) {
        return;
      }
      if (mode == Mode::kMean) {
        spread(g, first, tokens, hidden);
        return;
      }
      std::fill_n(first, tokens * hidden, T{});
      if (mode != Mode::kMax) {
        std::copy_n(g, hidden, mode == Mode::kCls ? first : first + (tokens - 1) * hidden);
        return;
      }
      const int32_t* winners = data<int32_t>(index) + seq * hidden;
      for (int64_t c = 0; c < hidden; ++c) {
        const int64_t token = winners[c] - edges[seq];
        STD_TORCH_CHECK(token >= 0 && token < tokens, "index: outside its sequence");
        first[token * hidden + c] = g[c];
      }
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("segment_pool_fwd", TORCH_BOX(&segment_pool_fwd));
  m.impl("segment_pool_bwd", TORCH_BOX(&segment_pool_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("segment_pool_fwd", TORCH_BOX(&segment_pool_fwd));
  m.impl("segment_pool_bwd", TORCH_BOX(&segment_pool_bwd));
}

}  // namespace fastenc::cpu
#endif
