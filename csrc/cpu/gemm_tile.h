// The one matrix product of the attention kernels, small enough to stay in L1 and L2:
//
//   C[m, n] (+)= sum_k A[m, k] * B[k, n]        n < NV * kLanes, the vector axis, unit stride
//
// A is read one broadcast element at a time, so it needs no packing; one of its two strides is 1.
// A tile of C lives in registers. m is a multiple of 4. Included once per ISA, inside the kernel
// part of a kernel file. What C holds is added last, so that long sums are sums of shorter ones.
//
// Zen 4, one core, head_dim 64, operands in L1, as a share of MKL's sgemm on one core: AVX-512
// 16x1 1.17, 8x2 1.16, 24x1 0.8 (gcc spills); AVX2 6x2 1.15, 4x3 1.14, 12x1 0.9.
#if defined(FASTENC_GEMM_TILE_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_GEMM_TILE_TOGGLE
#undef FASTENC_GEMM_TILE_TOGGLE
#else
#define FASTENC_GEMM_TILE_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

// How a product meets what C holds: C = AB, C = C + AB, or C = C * scale[n] + AB.
enum class Into { kOverwrite, kAdd, kScaleAdd };

// Rows of C in registers: M * NV accumulators, one row of B and a broadcast must fit.
constexpr int tile_rows(int vectors) {
  return (FASTENC_ISA_LEVEL == FASTENC_ISA_AVX512 ? 16 : 12) / vectors;
}

template <int M, int NV, Into kInto>
FASTENC_INLINE void gemm_tile(int64_t k, const float* a, int64_t a_m, int64_t a_k, const float* b,
                              int64_t ldb, float* c, int64_t ldc, const float* scale) {
  vf acc[M][NV];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < NV; ++n) {
      acc[m][n] = zero();
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    vf row[NV];
    for (int n = 0; n < NV; ++n) {
      row[n] = load(b + p * ldb + n * kLanes);
    }
    for (int m = 0; m < M; ++m) {
      const vf x = set(a[m * a_m + p * a_k]);
      for (int n = 0; n < NV; ++n) {
        acc[m][n] = fma(x, row[n], acc[m][n]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < NV; ++n) {
      float* to = c + m * ldc + n * kLanes;
      if constexpr (kInto == Into::kAdd) {
        acc[m][n] = load(to) + acc[m][n];
      } else if constexpr (kInto == Into::kScaleAdd) {
        acc[m][n] = fma(load(to), load(scale + n * kLanes), acc[m][n]);
      }
      store(to, acc[m][n]);
    }
  }
}

template <int NV, Into kInto, int M = tile_rows(NV)>
FASTENC_INLINE void gemm(int64_t m, int64_t k, const float* a, int64_t a_m, int64_t a_k,
                         const float* b, int64_t ldb, float* c, int64_t ldc,
                         const float* scale = nullptr) {
  // The rest is done four rows at a time: with M = 6 a rest of 2 takes one whole tile with it.
  const int64_t whole = m % M % 4 == 0 ? m / M * M : m / M * M - M;
  int64_t i = 0;
  for (; i < whole; i += M) {
    gemm_tile<M, NV, kInto>(k, a + i * a_m, a_m, a_k, b, ldb, c + i * ldc, ldc, scale);
  }
  for (; i < m; i += 4) {
    gemm_tile<4, NV, kInto>(k, a + i * a_m, a_m, a_k, b, ldb, c + i * ldc, ldc, scale);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
