// Span pooling on the CPU, forward and backward; fastenc/ops/span_pool.py says what is computed.
//
// Floor: words K R elements written (forward) or read (backward), at copy bandwidth.
#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../common/launch_counts.h"
#include "span_problem.h"

#define FASTENC_KERNEL_FILE "../cpu/span_pool.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "gemm_tile.h"
#include "span_rows.h"

namespace fastenc::cpu::FASTENC_ISA {

// Spans that begin at word `row`; `after` is the first row past its sequence.
template <typename T>
void pool_word(const T* start, const T* end, T* out, int64_t size, int64_t max_width, int64_t row,
               int64_t after) {
  const T* a = start + row * size;
  T* y = out + row * max_width * size;
  for (int64_t w = 0; w < max_width; ++w, y += size) {
    if (row + w >= after) {
      std::fill_n(y, (max_width - w) * size, T{});
      return;
    }
    const T* b = end + (row + w) * size;
    for (int64_t r = 0; r < size; r += kLanes) {
      const int n = lanes_of(size, r);
      store_up_to(y + r, max(zero(), load_up_to(a + r, n) + load_up_to(b + r, n)), n);
    }
  }
}

// Both gradients of word `row`: as the start of spans, and as the end of those from `first` on.
template <typename T>
void unpool_word(const T* grad, const T* start, const T* end, T* dstart, T* dend, int64_t size,
                 int64_t max_width, int64_t row, int64_t first, int64_t after) {
  const int64_t width = std::min(max_width, after - row);
  const int64_t back = std::min(max_width - 1, row - first);
  for (int64_t r = 0; r < size; r += kLanes) {
    const int n = lanes_of(size, r);
    const vf a = load_up_to(start + row * size + r, n);
    const vf b = load_up_to(end + row * size + r, n);
    vf da = zero(), db = zero();
    for (int64_t w = 0; w < width; ++w) {
      const vf x = a + load_up_to(end + (row + w) * size + r, n);
      const vf g = load_up_to(grad + (row * max_width + w) * size + r, n);
      da = da + zero_unless(x > zero(), g);
    }
    for (int64_t w = back; w >= 0; --w) {
      const vf x = load_up_to(start + (row - w) * size + r, n) + b;
      const vf g = load_up_to(grad + ((row - w) * max_width + w) * size + r, n);
      db = db + zero_unless(x > zero(), g);
    }
    store_up_to(dstart + row * size + r, da, n);
    store_up_to(dend + row * size + r, db, n);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

struct PoolProblem {
  int64_t words, size;
  const int32_t* cu_words;
  int64_t num_seqs;
};

PoolProblem check_pool(const Tensor& start, const Tensor& end, const Tensor& cu_words,
                       int64_t max_width) {
  check_dim("start", start, 2);
  check_shape("end", end, {start.size(0), start.size(1)});
  check_dtype("end", end, start.scalar_type());
  STD_TORCH_CHECK(max_width >= 1, "max_width: expected at least 1, got ", max_width);
  return {start.size(0), start.size(1), check_cu_seqlens(cu_words, start.size(0)),
          cu_words.size(0) - 1};
}

// Calls f(row, first row of its sequence, first row past it) for every word.
template <typename F>
void for_words(const PoolProblem& p, int64_t max_width, const F& f) {
  constexpr int64_t kGrainElements = 16384;
  const int64_t grain = kGrainElements / std::max<int64_t>(1, max_width * p.size);
  parallel_for(p.words, grain, [&](int64_t begin, int64_t end) {
    const int32_t* edge = std::upper_bound(p.cu_words, p.cu_words + p.num_seqs + 1, begin);
    for (int64_t row = begin; row < end; ++row) {
      while (*edge <= row) {
        ++edge;
      }
      f(row, edge[-1], edge[0]);
    }
  });
}

Tensor span_pool_fwd(const Tensor& start_in, const Tensor& end_in, const Tensor& cu_words,
                     int64_t max_width) {
  FASTENC_COUNT_LAUNCH("span_pool");
  const PoolProblem p = check_pool(start_in, end_in, cu_words, max_width);
  const Tensor start = dense(start_in), end = dense(end_in);
  Tensor out = torch::stable::new_empty(start, {p.words, max_width, p.size});
  dispatch_dtype("start", start.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = FASTENC_FOR_ACTIVE_ISA(pool_word<T>);
    for_words(p, max_width, [&](int64_t row, int64_t, int64_t after) {
      run(data<T>(start), data<T>(end), mutable_data<T>(out), p.size, max_width, row, after);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> span_pool_bwd(const Tensor& grad_in, const Tensor& start_in,
                                         const Tensor& end_in, const Tensor& cu_words,
                                         int64_t max_width) {
  FASTENC_COUNT_LAUNCH("span_pool_bwd");
  const PoolProblem p = check_pool(start_in, end_in, cu_words, max_width);
  check_shape("grad", grad_in, {p.words, max_width, p.size});
  check_dtype("grad", grad_in, start_in.scalar_type());
  const Tensor grad = dense(grad_in), start = dense(start_in), end = dense(end_in);
  Tensor dstart = torch::stable::empty_like(start), dend = torch::stable::empty_like(end);
  dispatch_dtype("start", start.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = FASTENC_FOR_ACTIVE_ISA(unpool_word<T>);
    for_words(p, max_width, [&](int64_t row, int64_t first, int64_t after) {
      run(data<T>(grad), data<T>(start), data<T>(end), mutable_data<T>(dstart),
          mutable_data<T>(dend), p.size, max_width, row, first, after);
    });
  });
  return {dstart, dend};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("span_pool_fwd", TORCH_BOX(&span_pool_fwd));
  m.impl("span_pool_bwd", TORCH_BOX(&span_pool_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("span_pool_fwd", TORCH_BOX(&span_pool_fwd));
  m.impl("span_pool_bwd", TORCH_BOX(&span_pool_bwd));
}

}  // namespace fastenc::cpu
#endif
