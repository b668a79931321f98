// The AVX2 (+ FMA, F16C) half of simd.h; the functions are described there.
namespace fastenc::cpu::FASTENC_ISA {

constexpr int kLanes = 8;

struct vf {
  __m256 v;
};
struct vi {
  __m256i v;
};
struct vm {
  __m256 v;
};

FASTENC_INLINE vf set(float x) { return {_mm256_set1_ps(x)}; }
FASTENC_INLINE vf zero() { return {_mm256_setzero_ps()}; }
FASTENC_INLINE vi set_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
FASTENC_INLINE vi iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
FASTENC_INLINE vm first_n(int n) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), iota().v))};
}

FASTENC_INLINE vf widen_bf16(__m128i h) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
FASTENC_INLINE __m128i narrow_bf16(vf x) {
  const __m256i b = _mm256_castps_si256(x.v);
  const __m256i high = _mm256_srli_epi32(b, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
FASTENC_INLINE __m128i narrow_fp16(vf x) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTENC_INLINE __m128i load_halves(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
FASTENC_INLINE __m128i load_halves_n(const void* p, int n) {
  alignas(16) uint16_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
FASTENC_INLINE void store_halves(void* p, __m128i h) {
  _mm_storeu_si128(static_cast<__m128i*>(p), h);
}
FASTENC_INLINE void store_halves_n(void* p, __m128i h, int n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), h);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(uint16_t));
}

FASTENC_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTENC_INLINE vf load(const bf16* p) { return widen_bf16(load_halves(p)); }
FASTENC_INLINE vf load(const fp16* p) { return {_mm256_cvtph_ps(load_halves(p))}; }
FASTENC_INLINE vf load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, _mm256_castps_si256(first_n(n).v))};
}
FASTENC_INLINE vf load_n(const bf16* p, int n) { return widen_bf16(load_halves_n(p, n)); }
FASTENC_INLINE vf load_n(const fp16* p, int n) { return {_mm256_cvtph_ps(load_halves_n(p, n))}; }
FASTENC_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x.v); }
FASTENC_INLINE void store(bf16* p, vf x) { store_halves(p, narrow_bf16(x)); }
FASTENC_INLINE void store(fp16* p, vf x) { store_halves(p, narrow_fp16(x)); }
FASTENC_INLINE void store_n(float* p, vf x, int n) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(first_n(n).v), x.v);
}
FASTENC_INLINE void store_n(bf16* p, vf x, int n) { store_halves_n(p, narrow_bf16(x), n); }
FASTENC_INLINE void store_n(fp16* p, vf x, int n) { store_halves_n(p, narrow_fp16(x), n); }
FASTENC_INLINE vi load_int(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
FASTENC_INLINE void store_int(int32_t* p, vi x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v);
}

FASTENC_INLINE vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTENC_INLINE vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTENC_INLINE vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTENC_INLINE vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTENC_INLINE vf operator-(vf a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
FASTENC_INLINE vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTENC_INLINE vf fnma(vf a, vf b, vf c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FASTENC_INLINE vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTENC_INLINE vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTENC_INLINE vf abs(vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FASTENC_INLINE vf sqrt(vf a) { return {_mm256_sqrt_ps(a.v)}; }
FASTENC_INLINE vf round(vf a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FASTENC_INLINE vf copysign(vf magnitude, vf sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}

FASTENC_INLINE vm operator<(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FASTENC_INLINE vm operator<=(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
FASTENC_INLINE vm operator>(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
FASTENC_INLINE vm operator>=(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
FASTENC_INLINE vm operator==(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
FASTENC_INLINE vm is_nan(vf a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
FASTENC_INLINE vm operator&(vm a, vm b) { return {_mm256_and_ps(a.v, b.v)}; }
FASTENC_INLINE vm operator|(vm a, vm b) { return {_mm256_or_ps(a.v, b.v)}; }
FASTENC_INLINE vm operator!(vm a) {
  return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
FASTENC_INLINE vf select(vm m, vf a, vf b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
FASTENC_INLINE vi select(vm m, vi a, vi b) {
  return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.v))};
}
FASTENC_INLINE vf zero_unless(vm m, vf a) { return {_mm256_and_ps(m.v, a.v)}; }

FASTENC_INLINE vi operator+(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
FASTENC_INLINE vi operator-(vi a, vi b) { return {_mm256_sub_epi32(a.v, b.v)}; }
FASTENC_INLINE vi operator*(vi a, vi b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
FASTENC_INLINE vi operator&(vi a, vi b) { return {_mm256_and_si256(a.v, b.v)}; }
FASTENC_INLINE vi operator|(vi a, vi b) { return {_mm256_or_si256(a.v, b.v)}; }
FASTENC_INLINE vi operator^(vi a, vi b) { return {_mm256_xor_si256(a.v, b.v)}; }
FASTENC_INLINE vi min(vi a, vi b) { return {_mm256_min_epi32(a.v, b.v)}; }
FASTENC_INLINE vi max(vi a, vi b) { return {_mm256_max_epi32(a.v, b.v)}; }
template <int n>
FASTENC_INLINE vi shift_left(vi a) {
  return {_mm256_slli_epi32(a.v, n)};
}
template <int n>
FASTENC_INLINE vi shift_right(vi a) {
  return {_mm256_srli_epi32(a.v, n)};
}
FASTENC_INLINE vm operator==(vi a, vi b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))};
}
FASTENC_INLINE vm operator>(vi a, vi b) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))};
}
FASTENC_INLINE vm unsigned_ge(vi a, vi b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a.v, b.v), a.v))};
}
FASTENC_INLINE vi to_int(vf a) { return {_mm256_cvttps_epi32(a.v)}; }
FASTENC_INLINE vf to_float(vi a) { return {_mm256_cvtepi32_ps(a.v)}; }
FASTENC_INLINE vi bits(vf a) { return {_mm256_castps_si256(a.v)}; }
FASTENC_INLINE vf from_bits(vi a) { return {_mm256_castsi256_ps(a.v)}; }
FASTENC_INLINE vf permute(vf a, vi lanes) { return {_mm256_permutevar8x32_ps(a.v, lanes.v)}; }
FASTENC_INLINE void multiply_wide(vi a, vi b, vi* high, vi* low) {
  const __m256i even = _mm256_mul_epu32(a.v, b.v);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  high->v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low->v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

FASTENC_INLINE float sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FASTENC_INLINE __m256 add_halves(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
FASTENC_INLINE __m256 add_pairs(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
}
FASTENC_INLINE vf sums(const vf (&r)[kLanes]) {
  __m256 two[4];
  for (int i = 0; i < 4; ++i) {
    two[i] = add_halves(r[i].v, r[i + 4].v);
  }
  const __m256 low = add_pairs(two[0], two[1]), high = add_pairs(two[2], two[3]);
  return {_mm256_add_ps(_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xdd))};
}
FASTENC_INLINE float max_lane(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

FASTENC_INLINE void transpose(vf (&r)[kLanes]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m256 u[8];
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA
