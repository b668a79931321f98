// The AVX-512 (F, BW, DQ, VL) half of simd.h; the functions are described there.
namespace fastenc::cpu::FASTENC_ISA {

constexpr int kLanes = 16;

struct vf {
  __m512 v;
};
struct vi {
  __m512i v;
};
struct vm {
  __mmask16 v;
};

FASTENC_INLINE vf set(float x) { return {_mm512_set1_ps(x)}; }
FASTENC_INLINE vf zero() { return {_mm512_setzero_ps()}; }
FASTENC_INLINE vi set_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
FASTENC_INLINE vi iota() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
FASTENC_INLINE vm first_n(int n) { return {static_cast<__mmask16>((1u << n) - 1u)}; }

FASTENC_INLINE vf widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
FASTENC_INLINE __m256i narrow_bf16(vf x) {
  const __m512i b = _mm512_castps_si512(x.v);
  const __m512i high = _mm512_srli_epi32(b, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
}
FASTENC_INLINE __m256i narrow_fp16(vf x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTENC_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTENC_INLINE vf load(const bf16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTENC_INLINE vf load(const fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FASTENC_INLINE vf load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_n(n).v, p)}; }
FASTENC_INLINE vf load_n(const bf16* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_n(n).v, p));
}
FASTENC_INLINE vf load_n(const fp16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_n(n).v, p))};
}
FASTENC_INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x.v); }
FASTENC_INLINE void store(bf16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
}
FASTENC_INLINE void store(fp16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_fp16(x));
}
FASTENC_INLINE void store_n(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first_n(n).v, x.v); }
FASTENC_INLINE void store_n(bf16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, first_n(n).v, narrow_bf16(x));
}
FASTENC_INLINE void store_n(fp16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, first_n(n).v, narrow_fp16(x));
}
FASTENC_INLINE vi load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FASTENC_INLINE void store_int(int32_t* p, vi x) { _mm512_storeu_si512(p, x.v); }

FASTENC_INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTENC_INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTENC_INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTENC_INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTENC_INLINE vf operator-(vf a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
FASTENC_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTENC_INLINE vf fnma(vf a, vf b, vf c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
FASTENC_INLINE vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTENC_INLINE vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTENC_INLINE vf abs(vf a) { return {_mm512_abs_ps(a.v)}; }
FASTENC_INLINE vf sqrt(vf a) { return {_mm512_sqrt_ps(a.v)}; }
FASTENC_INLINE vf round(vf a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FASTENC_INLINE vf copysign(vf magnitude, vf sign) {
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN),
                                                        _mm512_castps_si512(sign.v),
                                                        _mm512_castps_si512(magnitude.v), 0xca))};
}

FASTENC_INLINE vm operator<(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FASTENC_INLINE vm operator<=(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
FASTENC_INLINE vm operator>(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
FASTENC_INLINE vm operator>=(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
FASTENC_INLINE vm operator==(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
FASTENC_INLINE vm is_nan(vf a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
FASTENC_INLINE vm operator&(vm a, vm b) { return {static_cast<__mmask16>(a.v & b.v)}; }
FASTENC_INLINE vm operator|(vm a, vm b) { return {static_cast<__mmask16>(a.v | b.v)}; }
FASTENC_INLINE vm operator!(vm a) { return {static_cast<__mmask16>(~a.v)}; }
FASTENC_INLINE vf select(vm m, vf a, vf b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
FASTENC_INLINE vi select(vm m, vi a, vi b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }
FASTENC_INLINE vf zero_unless(vm m, vf a) { return {_mm512_maskz_mov_ps(m.v, a.v)}; }

FASTENC_INLINE vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
FASTENC_INLINE vi operator-(vi a, vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FASTENC_INLINE vi operator*(vi a, vi b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
FASTENC_INLINE vi operator&(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
FASTENC_INLINE vi operator|(vi a, vi b) { return {_mm512_or_si512(a.v, b.v)}; }
FASTENC_INLINE vi operator^(vi a, vi b) { return {_mm512_xor_si512(a.v, b.v)}; }
FASTENC_INLINE vi min(vi a, vi b) { return {_mm512_min_epi32(a.v, b.v)}; }
FASTENC_INLINE vi max(vi a, vi b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int n>
FASTENC_INLINE vi shift_left(vi a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
FASTENC_INLINE vi shift_right(vi a) {
  return {_mm512_srli_epi32(a.v, n)};
}
FASTENC_INLINE vm operator==(vi a, vi b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
FASTENC_INLINE vm operator>(vi a, vi b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
FASTENC_INLINE vm unsigned_ge(vi a, vi b) { return {_mm512_cmpge_epu32_mask(a.v, b.v)}; }
FASTENC_INLINE vi to_int(vf a) { return {_mm512_cvttps_epi32(a.v)}; }
FASTENC_INLINE vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
FASTENC_INLINE vi bits(vf a) { return {_mm512_castps_si512(a.v)}; }
FASTENC_INLINE vf from_bits(vi a) { return {_mm512_castsi512_ps(a.v)}; }
FASTENC_INLINE vf permute(vf a, vi lanes) { return {_mm512_permutexvar_ps(lanes.v, a.v)}; }
FASTENC_INLINE void multiply_wide(vi a, vi b, vi* high, vi* low) {
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  high->v = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low->v = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}

FASTENC_INLINE float sum(vf a) {
  const __m256 upper = _mm512_extractf32x8_ps(a.v, 1);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), upper);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FASTENC_INLINE __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
FASTENC_INLINE __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
FASTENC_INLINE __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
FASTENC_INLINE vf sums(const vf (&r)[kLanes]) {
  __m512 four[4];
  for (int i = 0; i < 4; ++i) {
    four[i] = add_quarters(add_halves(r[i].v, r[i + 4].v), add_halves(r[i + 8].v, r[i + 12].v));
  }
  const __m512 low = add_pairs(four[0], four[1]), high = add_pairs(four[2], four[3]);
  return {_mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xdd))};
}
FASTENC_INLINE float max_lane(vf a) {
  const __m256 upper = _mm512_extractf32x8_ps(a.v, 1);
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a.v), upper);
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

FASTENC_INLINE vf exp2_range_reduced(vf poly, vf n) { return {_mm512_scalef_ps(poly.v, n.v)}; }

FASTENC_INLINE void transpose(vf (&r)[kLanes]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA
