// The hidden rows relu(token_i + label_c + weight (token_factor_i * label_factor_c)) of a block of
// pairs, 256 elements at a time.
//
// Included once per ISA, inside the kernel part of a kernel file, after span_rows.h.
#if defined(FASTENC_TOKEN_ROWS_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_TOKEN_ROWS_TOGGLE
#undef FASTENC_TOKEN_ROWS_TOGGLE
#else
#define FASTENC_TOKEN_ROWS_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

// Columns of a packed matrix: those of one product.
constexpr int64_t kPanel = 2 * kLanes;

// Row stride of `n` elements: whole panels, off the power of two.
inline int64_t token_stride(int64_t n) { return round_up(n, kPanel) + 16; }

// A packed matrix of `depth` rows is panels of (depth, kPanel), zeros past the last column: the
// products read it with unit stride.
inline int64_t panel_columns() { return kPanel; }

// Columns [panel kPanel, ...) of the transpose of x (columns, depth).
inline void pack_transposed(const float* x, int64_t columns, int64_t depth, int64_t panel,
                            float* packed) {
  float* y = packed + panel * depth * kPanel;
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const int64_t first = panel * kPanel + half;
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int some = lanes_of(depth, k);
      vf rows[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        rows[l] = first + l < columns ? load_up_to(x + (first + l) * depth + k, some) : zero();
      }
      transpose(rows);
      for (int l = 0; l < some; ++l) {
        store(y + (k + l) * kPanel + half, rows[l]);
      }
    }
  }
}

// Columns [panel kPanel, ...) of x (depth, columns).
inline void pack_columns(const float* x, int64_t columns, int64_t depth, int64_t panel,
                         float* packed) {
  float* y = packed + panel * depth * kPanel;
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const int64_t first = panel * kPanel + half;
    const int some = first < columns ? lanes_of(columns, first) : 0;
    for (int64_t k = 0; k < depth; ++k) {
      store(y + k * kPanel + half, load_n(x + k * columns + first, some));
    }
  }
}

// C (rows, columns) = or += A (rows, depth) times packed panels, depth in steps of kSpanChunk;
// `packed` begins at row 0 of the first panel, whose rows are `panel_depth`.
template <bool kAdd>
FASTENC_INLINE void multiply_panels(int64_t rows, int64_t depth, const float* a, int64_t a_m,
                                    int64_t a_k, const float* packed, int64_t panel_depth,
                                    int64_t columns, float* c, int64_t ldc) {
  for (int64_t j = 0; j < columns; j += kPanel, packed += panel_depth * kPanel) {
    int64_t k = 0;
    do {
      const int64_t n = std::min(kSpanChunk, depth - k);
      if (kAdd || k > 0) {
        gemm<2, Into::kAdd>(rows, n, a + k * a_k, a_m, a_k, packed + k * kPanel, kPanel, c + j,
                            ldc);
      } else {
        gemm<2, Into::kOverwrite>(rows, n, a + k * a_k, a_m, a_k, packed + k * kPanel, kPanel,
                                  c + j, ldc);
      }
      k += kSpanChunk;
    } while (k < depth);
  }
}

// x[s] = token_factor * label_factor of pair first + s; zeros up to a multiple of four rows.
inline void make_factors(const TokenProblem& p, int64_t first, int64_t count, int64_t ldx,
                         float* x) {
  PairWalk walk(p, first);
  for (int64_t s = 0; s < round_up(count, 4); ++s) {
    float* y = x + s * ldx;
    if (s >= count) {
      clear_row(p.factors, y);
      continue;
    }
    const TokenPair pair = walk.here();
    const float* a = p.token_factor + pair.word * p.factors;
    const float* b = p.label_factor + pair.label_row * p.factors;
    for (int64_t d = 0; d < p.factors; d += kLanes) {
      const int some = lanes_of(p.factors, d);
      store(y + d, load_up_to(a + d, some) * load_up_to(b + d, some));
    }
    walk.advance();
  }
}

// y = relu(y + a + b) keep, zeros up to a whole vector. max keeps its second operand's NaN.
template <bool kDropout>
FASTENC_INLINE void activate_row(const float* a, const float* b, int64_t n, const float* keep,
                                 float* y) {
  for (int64_t r = 0; r < n; r += kLanes) {
    const int some = lanes_of(n, r);
    vf x = max(zero(), load(y + r) + (load_up_to(a + r, some) + load_up_to(b + r, some)));
    if constexpr (kDropout) {
      x = x * load(keep + r);
    }
    store(y + r, x);
  }
}

// Elements [r, r + n) of the hidden rows of a block, dropped out, in rows of kSpanStride.
inline void make_hidden(const TokenProblem& p, const float* packed, int64_t first, int64_t count,
                        int64_t r, int64_t n, const float* x, int64_t ldx, float* keep, float* h) {
  multiply_panels<false>(round_up(count, 4), p.factors, x, ldx, 1, packed + r * p.factors,
                         p.factors, n, h, kSpanStride);
  PairWalk walk(p, first);
  for (int64_t s = 0; s < count; ++s, walk.advance()) {
    const TokenPair pair = walk.here();
    const float* a = p.token + pair.word * p.size + r;
    const float* b = p.label + pair.label_row * p.size + r;
    if (p.dropout.active()) {
      keep_factors<kTokenTag>(p.dropout, pair.word, pair.label, r, n, keep);
      activate_row<true>(a, b, n, keep, h + s * kSpanStride);
    } else {
      activate_row<false>(a, b, n, keep, h + s * kSpanStride);
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
