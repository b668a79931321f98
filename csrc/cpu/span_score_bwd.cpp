// Scores of all short spans against labels, backward; fastenc/ops/span_score.py says what is
// computed. With Z = dropout(relu(start_i + end_j)), made again, and G the incoming gradient:
//
//   dZ = G V, where Z > 0, over 1 - p    dV = G^T Z    dbias = column sums of G
//   dstart_i = sum_w dZ[i, w]            dend_j = sum_i dZ[i, j - i]
//
// A task is one sequence and 256 elements of R: each of its results is complete in it, so there is
// no partial sum between tasks, and nothing depends on the number of threads. Lanes are elements of
// R throughout.
//
// Floor: 4 words K C R FLOPs at the rate of sgemm. As in span_score.cpp: 8.5 to 11 ms; forward and
// backward of the whole head 222 ms, gliner's 1338 ms.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/launch_counts.h"
#include "span_problem.h"

#ifndef FASTENC_SPAN_GRADIENTS
#define FASTENC_SPAN_GRADIENTS
namespace fastenc::cpu {

struct SpanGradients {
  const void* grad;  // (words, max_width, C)
  void* start;
  void* end;
  void* labels;      // (num_seqs, C, R)
  void* label_bias;  // (num_seqs, C)
};

}  // namespace fastenc::cpu
#endif

#define FASTENC_KERNEL_FILE "../cpu/span_score_bwd.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"
#include "gemm_tile.h"
#include "span_rows.h"

namespace fastenc::cpu::FASTENC_ISA {

template <typename T>
class SpanBackward {
 public:
  SpanBackward(const SpanProblem& p, const SpanGradients& g, int64_t seq, int64_t r)
      : p_(p),
        g_(g),
        seq_(seq),
        first_word_(p.cu_words[seq]),
        length_(p.length(seq)),
        r_(r),
        size_(std::min(kSpanChunk, p.size - r)),
        labels_(round_up(p.labels, 4)),
        ring_(std::min(p.max_width, length_)) {}

  void run() {
    carve_scratch({{&rows_, kSpanRows * kSpanStride},
                   {&drows_, kSpanRows * kSpanStride},
                   {&grads_, kSpanRows * labels_},
                   {&keep_, kSpanChunk},
                   {&label_rows_, labels_ * kSpanStride},
                   {&dlabels_, labels_ * kSpanStride},
                   {&dstart_, kSpanStride},
                   {&dends_, ring_ * kSpanStride}});
    for (int64_t c = 0; c < p_.labels; ++c) {
      widen_row(p_.label_row<T>(seq_, c) + r_, size_, label_rows_ + c * kSpanStride);
    }
    for (int64_t c = 0; c < labels_; ++c) {
      clear_row(size_, dlabels_ + c * kSpanStride);
    }
    clear_row(size_, dstart_);
    for (int64_t j = 0; j < ring_; ++j) {
      clear_row(size_, dends_ + j * kSpanStride);
    }
    SpanWalk made{p_, length_, 0, length_};
    SpanWalk added = made;
    while (!made.done()) {
      const int64_t rows = make_block(&made);
      multiply(rows);
      for (int64_t s = 0; s < rows; ++s, added.advance()) {
        add_span(added, s);
      }
    }
    T* to = static_cast<T*>(g_.labels) + seq_ * p_.labels * p_.size;
    for (int64_t c = 0; c < p_.labels; ++c) {
      write(dlabels_ + c * kSpanStride, to + c * p_.size);
    }
  }

 private:
  int64_t make_block(SpanWalk* walk) {
    int64_t rows = 0;
    for (; rows < kSpanRows && !walk->done(); ++rows, walk->advance()) {
      make_span<T>(p_, first_word_, walk->word, walk->width, r_, size_, keep_,
                   rows_ + rows * kSpanStride);
      const int64_t span = (first_word_ + walk->word) * p_.max_width + walk->width;
      float* grad = grads_ + rows * labels_;
      for (int64_t c = p_.labels; c < labels_; ++c) {
        grad[c] = 0.0f;
      }
      const T* from = static_cast<const T*>(g_.grad) + span * p_.labels;
      for (int64_t c = 0; c < p_.labels; c += kLanes) {
        const int some = lanes_of(p_.labels, c);
        store_up_to(grad + c, load_up_to(from + c, some), some);
      }
    }
    for (int64_t pad = rows; pad % 4 != 0; ++pad) {
      std::fill_n(grads_ + pad * labels_, labels_, 0.0f);
    }
    return rows;
  }

  void multiply(int64_t rows) {
    int64_t r = 0;
    for (; r + kLanes < size_; r += 2 * kLanes) {
      multiply_columns<2>(rows, r);
    }
    if (r < size_) {
      multiply_columns<1>(rows, r);
    }
  }

  template <int NV>
  void multiply_columns(int64_t rows, int64_t r) {
    const int64_t padded = round_up(rows, 4);
    gemm<NV, Into::kOverwrite>(padded, std::min(kLabelGroup, p_.labels), grads_, labels_, 1,
                               label_rows_ + r, kSpanStride, drows_ + r, kSpanStride);
    for (int64_t c = kLabelGroup; c < p_.labels; c += kLabelGroup) {
      gemm<NV, Into::kAdd>(padded, std::min(kLabelGroup, p_.labels - c), grads_ + c, labels_, 1,
                           label_rows_ + c * kSpanStride + r, kSpanStride, drows_ + r, kSpanStride);
    }
    gemm<NV, Into::kAdd>(labels_, rows, grads_, 1, labels_, rows_ + r, kSpanStride, dlabels_ + r,
                         kSpanStride);
  }

  // The end's row is complete, and its place in the ring free, once its own word has begun no span
  // any more; the start's with its last span.
  void add_span(const SpanWalk& span, int64_t s) {
    const float* row = rows_ + s * kSpanStride;
    const float* drow = drows_ + s * kSpanStride;
    float* dend = dends_ + (span.word + span.width) % ring_ * kSpanStride;
    const vf scale = set(p_.dropout.keep_scale);
    for (int64_t r = 0; r < size_; r += kLanes) {
      const vf d = zero_unless(load(row + r) > zero(), load(drow + r) * scale);
      store(dstart_ + r, load(dstart_ + r) + d);
      store(dend + r, load(dend + r) + d);
    }
    if (span.width + 1 == p_.widths(span.word, length_)) {
      const int64_t at = (first_word_ + span.word) * p_.size;
      float* own_end = dends_ + span.word % ring_ * kSpanStride;
      write(dstart_, static_cast<T*>(g_.start) + at);
      write(own_end, static_cast<T*>(g_.end) + at);
      clear_row(size_, dstart_);
      clear_row(size_, own_end);
    }
  }

  void write(const float* row, T* to) {
    for (int64_t r = 0; r < size_; r += kLanes) {
      store_up_to(to + r_ + r, load(row + r), lanes_of(size_, r));
    }
  }

  const SpanProblem& p_;
  const SpanGradients& g_;
  int64_t seq_, first_word_, length_, r_, size_, labels_, ring_;
  float *rows_, *drows_, *grads_, *keep_, *label_rows_, *dlabels_, *dstart_, *dends_;
};

template <typename T>
void differentiate_task(const SpanProblem& p, const SpanGradients& g, int64_t seq, int64_t r) {
  SpanBackward<T>(p, g, seq, r).run();
}

// Sums of 64 words' sums, so that the rounding error does not grow with the length.
template <typename T>
void bias_task(const SpanProblem& p, const SpanGradients& g, int64_t seq) {
  constexpr int64_t kBlock = 64;
  const int64_t n = p.length(seq);
  const T* grad = static_cast<const T*>(g.grad) + p.cu_words[seq] * p.max_width * p.labels;
  T* out = static_cast<T*>(g.label_bias) + seq * p.labels;
  for (int64_t c = 0; c < p.labels; c += kLanes) {
    const int some = lanes_of(p.labels, c);
    vf total = zero();
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      vf partial = zero();
      for (int64_t i = begin; i < std::min(n, begin + kBlock); ++i) {
        vf word = zero();
        for (int64_t w = 0; w < p.widths(i, n); ++w) {
          word = word + load_up_to(grad + (i * p.max_width + w) * p.labels + c, some);
        }
        partial = partial + word;
      }
      total = total + partial;
    }
    store_up_to(out + c, total, some);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#else  // once

namespace fastenc::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> span_score_bwd(
    const Tensor& grad_in, const Tensor& start, const Tensor& end, const Tensor& labels,
    const Tensor& cu_words, int64_t max_width, double dropout_p, std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("span_score_bwd");
  SpanProblem p = make_span_problem(start, end, labels, cu_words, max_width, std::nullopt);
  set_dropout(&p, dropout_p, seed);
  check_shape("grad", grad_in, {p.words, max_width, p.labels});
  check_dtype("grad", grad_in, p.dtype);
  const Tensor grad = dense(grad_in);
  Tensor dstart = torch::stable::new_empty(start, {p.words, p.size});
  Tensor dend = torch::stable::new_empty(start, {p.words, p.size});
  Tensor dlabels = torch::stable::new_empty(start, {p.num_seqs, p.labels, p.size});
  Tensor dbias = torch::stable::new_empty(start, {p.num_seqs, p.labels});
  const SpanGradients g{grad.data_ptr(), dstart.data_ptr(), dend.data_ptr(), dlabels.data_ptr(),
                        dbias.data_ptr()};
  const int64_t chunks = (p.size + kSpanChunk - 1) / kSpanChunk;
  std::vector<int64_t> costs(p.num_seqs * chunks);
  for (int64_t i = 0; i < static_cast<int64_t>(costs.size()); ++i) {
    costs[i] = p.length(i / chunks) + 1;
  }
  dispatch_dtype("start", p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = FASTENC_FOR_ACTIVE_ISA(differentiate_task<T>);
    const auto sum_bias = FASTENC_FOR_ACTIVE_ISA(bias_task<T>);
    run_tasks(costs, [&](int64_t i) { run(p, g, i / chunks, i % chunks * kSpanChunk); });
    parallel_for(p.num_seqs, 1, [&](int64_t begin, int64_t stop) {
      for (int64_t seq = begin; seq < stop; ++seq) {
        sum_bias(p, g, seq);
      }
    });
  });
  return {dstart, dend, dlabels, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("span_score_bwd", TORCH_BOX(&span_score_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) { m.impl("span_score_bwd", TORCH_BOX(&span_score_bwd)); }

}  // namespace fastenc::cpu
#endif
