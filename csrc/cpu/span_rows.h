// The rows relu(start_i + end_j), and their products with labels, for a block of spans.
//
// Included once per ISA, inside the kernel part of a kernel file, after gemm_tile.h.
#if defined(FASTENC_SPAN_ROWS_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_SPAN_ROWS_TOGGLE
#undef FASTENC_SPAN_ROWS_TOGGLE
#else
#define FASTENC_SPAN_ROWS_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

FASTENC_INLINE int lanes_of(int64_t n, int64_t i) {
  return static_cast<int>(n - i < kLanes ? n - i : kLanes);
}

// The branch is for 16-bit storage, whose partial accesses are slow under AVX2.
template <typename T>
FASTENC_INLINE vf load_up_to(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <typename T>
FASTENC_INLINE void store_up_to(T* p, vf x, int n) {
  n == kLanes ? store(p, x) : store_n(p, x, n);
}

// Rows of T -> fp32, zeros up to a whole vector.
template <typename T>
FASTENC_INLINE void widen_row(const T* x, int64_t n, float* y) {
  for (int64_t r = 0; r < n; r += kLanes) {
    store(y + r, load_up_to(x + r, lanes_of(n, r)));
  }
}

FASTENC_INLINE void clear_row(int64_t n, float* y) {
  for (int64_t r = 0; r < n; r += kLanes) {
    store(y + r, zero());
  }
}

// 1 / (1 - p) or 0 for elements [r_begin, r_begin + n) of the span (row, width); r_begin is a
// multiple of kSpanChunk. Lane l of call q is counter (kLanes / 4) l + q, and its word k element
// kLanes l + 4 q + k, so that one transpose puts kLanes^2 elements in order.
template <int32_t kTag = kSpanTag>
FASTENC_INLINE void keep_factors(const Dropout& dropout, int64_t row, int64_t width,
                                 int64_t r_begin, int64_t n, float* y) {
  constexpr int kCalls = kLanes / 4;
  const vi threshold = set_int(static_cast<int32_t>(dropout.threshold));
  const vi lane = iota() * set_int(kCalls);
  for (int64_t r = 0; r < n; r += kLanes * kLanes) {
    vf kept[kLanes];
    for (int q = 0; q < kCalls; ++q) {
      const vi counter = lane + set_int(static_cast<int32_t>((r_begin + r) / 4 + q));
      const PhiloxWords words =
          philox(counter, set_int(static_cast<int32_t>(row)), set_int(static_cast<int32_t>(width)),
                 set_int(kTag), dropout.seed);
      for (int k = 0; k < 4; ++k) {
        kept[4 * q + k] =
            zero_unless(unsigned_ge(words.word[k], threshold), set(dropout.keep_scale));
      }
    }
    transpose(kept);
    for (int l = 0; l < kLanes; ++l) {
      store(y + r + l * kLanes, kept[l]);
    }
  }
}

// y = relu(a + b) keep, zeros up to a whole vector. max keeps its second operand's NaN.
template <bool kDropout, typename T>
FASTENC_INLINE void span_row(const T* a, const T* b, int64_t n, const float* keep, float* y) {
  for (int64_t r = 0; r < n; r += kLanes) {
    const int some = lanes_of(n, r);
    vf x = max(zero(), load_up_to(a + r, some) + load_up_to(b + r, some));
    if constexpr (kDropout) {
      x = x * load(keep + r);
    }
    store(y + r, x);
  }
}

// Elements [r_begin, r_begin + n) of one span: from word i of the sequence that begins at
// `first_word` to the word `width` after it.
template <typename T>
FASTENC_INLINE void make_span(const SpanProblem& p, int64_t first_word, int64_t i, int64_t width,
                              int64_t r_begin, int64_t n, float* keep, float* y) {
  const T* a = static_cast<const T*>(p.start) + (first_word + i) * p.size + r_begin;
  const T* b = static_cast<const T*>(p.end) + (first_word + i + width) * p.size + r_begin;
  if (p.dropout.active()) {
    keep_factors(p.dropout, first_word + i, width, r_begin, n, keep);
    span_row<true>(a, b, n, keep, y);
  } else {
    span_row<false>(a, b, n, keep, y);
  }
}

// Walks the spans of a sequence in order of (word, width).
struct SpanWalk {
  const SpanProblem& p;
  int64_t length;
  int64_t word;
  int64_t last_word;
  int64_t width = 0;

  FASTENC_INLINE bool done() const { return word >= last_word; }
  FASTENC_INLINE void advance() {
    if (++width >= p.widths(word, length)) {
      width = 0;
      ++word;
    }
  }
};

// `count` rows of labels, elements [r_begin, r_begin + n), as (n, ld) with the labels side by side
// and zeros up to a whole vector of them.
template <typename T>
__attribute__((noinline)) void pack_labels(const SpanProblem& p, int64_t seq, int64_t label,
                                           int64_t count, int64_t r_begin, int64_t n, int64_t ld,
                                           float* y) {
  for (int64_t c = 0; c < count; c += kLanes) {
    for (int64_t r = 0; r < n; r += kLanes) {
      vf rows[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        rows[l] = c + l < count
                      ? load_up_to(p.label_row<T>(seq, label + c + l) + r_begin + r, lanes_of(n, r))
                      : zero();
      }
      transpose(rows);
      for (int l = 0; l < kLanes; ++l) {
        store(y + (r + l) * ld + c, rows[l]);
      }
    }
  }
}

struct SpanScratch {
  float* rows;    // kSpanRows * kSpanStride
  float* labels;  // kSpanChunk * kLabelGroup
  float* keep;    // kSpanChunk
};

template <Into kInto>
FASTENC_INLINE void multiply_spans(int64_t rows, int64_t n, int64_t ld, const SpanScratch& s,
                                   float* sums) {
  int64_t c = 0;
  for (; c + kLanes < ld; c += 2 * kLanes) {
    gemm<2, kInto>(rows, n, s.rows, kSpanStride, 1, s.labels + c, ld, sums + c, ld);
  }
  if (c < ld) {
    gemm<1, kInto>(rows, n, s.rows, kSpanStride, 1, s.labels + c, ld, sums + c, ld);
  }
}

// sums[s][c] = span_s . labels_c for the spans of the task in order and `count` labels; the row
// stride is `count` rounded up to whole vectors, and up to three rows past the last are written.
template <typename T>
__attribute__((noinline)) void span_products(const SpanProblem& p, const SpanTask& task,
                                             int64_t label, int64_t count, const SpanScratch& s,
                                             float* sums) {
  const int64_t ld = round_up(count, kLanes);
  const int64_t first_word = p.cu_words[task.seq];
  int64_t r = 0;
  do {
    const int64_t n = std::min(kSpanChunk, p.size - r);
    pack_labels<T>(p, task.seq, label, count, r, n, ld, s.labels);
    SpanWalk walk{p, p.length(task.seq), task.begin, task.end};
    for (float* to = sums; !walk.done(); to += kSpanRows * ld) {
      int64_t rows = 0;
      for (; rows < kSpanRows && !walk.done(); ++rows, walk.advance()) {
        make_span<T>(p, first_word, walk.word, walk.width, r, n, s.keep,
                     s.rows + rows * kSpanStride);
      }
      for (; rows % 4 != 0; ++rows) {
        clear_row(n, s.rows + rows * kSpanStride);
      }
      r == 0 ? multiply_spans<Into::kOverwrite>(rows, n, ld, s, to)
             : multiply_spans<Into::kAdd>(rows, n, ld, s, to);
    }
    r += kSpanChunk;
  } while (r < p.size);
}

// Floats that span_products() writes at most.
inline int64_t span_sums(const SpanProblem& p, const SpanTask& task) {
  const int64_t spans = (task.end - task.begin) * p.widths(task.begin, p.length(task.seq));
  return round_up(spans, 4) * round_up(std::min(p.labels, kLabelGroup), kLanes);
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
