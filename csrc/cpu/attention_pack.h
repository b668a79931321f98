// Between tensors and fp32 scratch: rows converted, rotated, scaled and transposed.
//
// Included once per ISA, inside the kernel part of a kernel file. LD is scratch_stride(head_dim).
#if defined(FASTENC_ATTENTION_PACK_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_ATTENTION_PACK_TOGGLE
#undef FASTENC_ATTENTION_PACK_TOGGLE
#else
#define FASTENC_ATTENTION_PACK_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

FASTENC_INLINE int lanes_left(int64_t n, int64_t i) {
  return static_cast<int>(n - i < kLanes ? n - i : kLanes);
}

// The branch is for 16-bit storage, whose partial accesses are slow under AVX2.
template <typename T>
FASTENC_INLINE vf load_some(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <typename T>
FASTENC_INLINE void store_some(T* p, vf x, int n) {
  n == kLanes ? store(p, x) : store_n(p, x, n);
}

// Consecutive tokens of a head lie a page apart in a packed qkv, where no hardware prefetcher
// follows.
template <typename T>
FASTENC_INLINE void prefetch_row(const T* row, int64_t n) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  for (int64_t d = 0; d < n; d += kCacheLine) {
    __builtin_prefetch(row + d);
  }
}
constexpr int64_t kPrefetchRows = 16;  // the next block of queries

// Rotates the pairs (d, d + half) of a row by angle (sign = 1) or back (sign = -1).
template <typename From, typename To>
FASTENC_INLINE void rotate_row(const From* x, To* y, int64_t half, const float* cos,
                               const float* sin, float sign, float scale) {
  for (int64_t d = 0; d < half; d += kLanes) {
    const int n = lanes_left(half, d);
    const vf c = load_some(cos + d, n) * set(scale);
    const vf s = load_some(sin + d, n) * set(scale * sign);
    const vf low = load_some(x + d, n);
    const vf high = load_some(x + half + d, n);
    store_some(y + d, fnma(high, s, low * c), n);
    store_some(y + half + d, fma(low, s, high * c), n);
  }
}

template <typename From, typename To>
FASTENC_INLINE void scale_row(const From* x, To* y, int64_t n, float scale) {
  for (int64_t d = 0; d < n; d += kLanes) {
    const int rest = lanes_left(n, d);
    store_some(y + d, load_some(x + d, rest) * set(scale), rest);
  }
}

FASTENC_INLINE void zero_row(float* y, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes) {
    store(y + d, zero());
  }
}

template <int LD, typename T>
void pack_rows_of(const AttentionProblem& p, const Rows& rows, bool rotated, int64_t start,
                  int64_t head, int64_t begin, int64_t end, int64_t padded, float scale, float* y) {
  const int64_t half = p.head_dim / 2;
  const int64_t width = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = begin; i < end; ++i, y += LD) {
    const T* x = rows.at<T>(start + i, head);
    prefetch_row(rows.at<T>(std::min(start + i + kPrefetchRows, p.total_tokens - 1), head),
                 p.head_dim);
    zero_row(y + (width - kLanes), kLanes);
    if (rotated) {
      const int64_t table = i * p.rotation.row_stride;
      rotate_row(x, y, half, p.rotation.cos + table, p.rotation.sin + table, 1.0f, scale);
    } else {
      scale_row(x, y, p.head_dim, scale);
    }
  }
  for (int64_t i = end; i < begin + padded; ++i, y += LD) {
    zero_row(y, width);
  }
}

// Tokens begin to end of a sequence that starts at packed row `start`, as `padded` rows of scratch:
// the columns past head_dim up to a whole vector, and the rows past the end, are zeros.
template <int LD>
__attribute__((noinline)) void pack_rows(const AttentionProblem& p, const Rows& rows, bool rotate,
                                         int64_t start, int64_t head, int64_t begin, int64_t end,
                                         int64_t padded, float scale, float* y) {
  const bool rotated = rotate && p.rotation.cos != nullptr;
  if (rows.dtype == ScalarType::Float) {
    pack_rows_of<LD, float>(p, rows, rotated, start, head, begin, end, padded, scale, y);
  } else if (rows.dtype == ScalarType::BFloat16) {
    pack_rows_of<LD, bf16>(p, rows, rotated, start, head, begin, end, padded, scale, y);
  } else {
    pack_rows_of<LD, fp16>(p, rows, rotated, start, head, begin, end, padded, scale, y);
  }
}

// NV * kLanes scratch rows -> (head_dim, NV * kLanes), the layout whose vector axis is the rows.
template <int LD, int NV>
__attribute__((noinline)) void transpose_in(const float* rows, int64_t head_dim, float* y) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    for (int v = 0; v < NV; ++v) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        r[i] = load(rows + (v * kLanes + i) * LD + d);
      }
      transpose(r);
      for (int i = 0; i < kLanes; ++i) {
        store(y + (d + i) * NV * kLanes + v * kLanes, r[i]);
      }
    }
  }
}

// The inverse; column n is scaled by scale[n] on the way.
template <int LD, int NV>
__attribute__((noinline)) void transpose_out(const float* x, int64_t head_dim, const float* scale,
                                             float* rows) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    for (int v = 0; v < NV; ++v) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        r[i] = load(x + (d + i) * NV * kLanes + v * kLanes) * load(scale + v * kLanes);
      }
      transpose(r);
      for (int i = 0; i < kLanes; ++i) {
        store(rows + (v * kLanes + i) * LD + d, r[i]);
      }
    }
  }
}

template <int LD, typename T>
void unpack_rows_of(const AttentionProblem& p, const Rows& rows, bool rotated, int64_t start,
                    int64_t head, int64_t begin, int64_t end, float scale, const float* x) {
  for (int64_t i = begin; i < end; ++i, x += LD) {
    T* y = rows.at<T>(start + i, head);
    prefetch_row(rows.at<T>(std::min(start + i + kPrefetchRows, p.total_tokens - 1), head),
                 p.head_dim);
    if (rotated) {
      const int64_t table = i * p.rotation.row_stride;
      rotate_row(x, y, p.head_dim / 2, p.rotation.cos + table, p.rotation.sin + table, -1.0f,
                 scale);
    } else {
      scale_row(x, y, p.head_dim, scale);
    }
  }
}

// Scratch rows -> tokens begin to end, scaled, and rotated back if `rotate`.
template <int LD>
__attribute__((noinline)) void unpack_rows(const AttentionProblem& p, const Rows& rows, bool rotate,
                                           int64_t start, int64_t head, int64_t begin, int64_t end,
                                           float scale, const float* x) {
  const bool rotated = rotate && p.rotation.cos != nullptr;
  if (rows.dtype == ScalarType::Float) {
    unpack_rows_of<LD, float>(p, rows, rotated, start, head, begin, end, scale, x);
  } else if (rows.dtype == ScalarType::BFloat16) {
    unpack_rows_of<LD, bf16>(p, rows, rotated, start, head, begin, end, scale, x);
  } else {
    unpack_rows_of<LD, fp16>(p, rows, rotated, start, head, begin, end, scale, x);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
