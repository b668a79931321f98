// Elementary functions on vf, one source for every ISA; included by simd.h.
//
// Coefficients: minimax fits of the relative error, found with Lawson's iteration (least squares
// whose weights are multiplied by the residual until it is level) on 3000 Chebyshev points against
// mpmath, then rounded to fp32. "fit" below is the error of the polynomial in units of 2^-24.
namespace fastenc::cpu::FASTENC_ISA {

template <int n>
FASTENC_INLINE vf polynomial(vf x, const float (&c)[n]) {
  vf r = set(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) {
    r = fma(r, x, set(c[i]));
  }
  return r;
}

#if FASTENC_ISA_LEVEL != FASTENC_ISA_AVX512
// poly * 2^n for |n| <= 252, in two steps so that overflow and subnormal results round correctly.
FASTENC_INLINE vf exp2_range_reduced(vf poly, vf n) {
  const vf half = round(n * set(0.5f));
  const vi bias = set_int(127);
  const vf first = from_bits(shift_left<23>(to_int(half) + bias));
  const vf second = from_bits(shift_left<23>(to_int(n - half) + bias));
  return poly * first * second;
}
#endif

// 2^f on [-0.5, 0.5]; fit 0.04.
FASTENC_INLINE vf exp2_fraction(vf f) {
  constexpr float c[] = {1.0f,          0.693147182f,   0.240226477f,  0.0555033237f,
                         0.0096184369f, 0.00133988739f, 0.00015353362f};
  return polynomial(f, c);
}

FASTENC_INLINE vf exp2(vf x) {
  const vf clamped = min(set(130.0f), max(set(-152.0f), x));
  const vf n = round(clamped);
  return exp2_range_reduced(exp2_fraction(clamped - n), n);
}

// For softmax: x <= 126 (or -inf, or NaN); results under 2^-126 are 0.
FASTENC_INLINE vf exp2_flush(vf x) {
#if FASTENC_ISA_LEVEL == FASTENC_ISA_AVX512
  const vf n = round(x);
  const vf f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};  // 0 at -inf
  return {_mm512_scalef_ps(exp2_fraction(f).v, n.v)};
#else
  // Adding 1.5 * 2^23 + 127 leaves round(x) + 127 in the low mantissa bits, the exponent of 2^n.
  const vf magic = set(12583039.0f);
  const vf clamped = max(set(-127.0f), x);
  const vf shifted = clamped + magic;
  const vf f = clamped - (shifted - magic);
  return exp2_fraction(f) * from_bits(shift_left<23>(bits(shifted)));
#endif
}

FASTENC_INLINE vf exp(vf x) {
  const vf clamped = min(set(90.0f), max(set(-105.0f), x));
  const vf n = round(clamped * set(1.44269504f));
  // ln 2 in two parts; the first has 9 significant bits, so n * first is exact without an FMA too.
  vf f = fnma(n, set(0.693359375f), clamped);
  f = fnma(n, set(-2.12194440e-4f), f);
  // (exp(f) - 1 - f) / f^2 on +-ln2/2; fit 0.06.
  constexpr float c[] = {0.49999994f, 0.16666521f, 0.041668389f, 0.00836871099f, 0.00138146104f};
  const vf tail = fma(polynomial(f, c), f * f, f);
  return exp2_range_reduced(tail + set(1.0f), n);
}

// Natural logarithm of positive normal numbers.
FASTENC_INLINE vf log(vf x) {
  // x = 2^n * m with m in [sqrt(1/2), sqrt(2)): subtract sqrt(1/2) in the integer domain.
  const vi shifted = bits(x) - set_int(0x3f3504f3);
  const vi exponent = shift_right<23>(shifted + set_int(127 << 23)) - set_int(127);
  const vf f = from_bits(bits(x) - shift_left<23>(exponent)) - set(1.0f);
  const vf n = to_float(exponent);
  // (log1p(f) - f + f^2/2) / f^3; fit 0.1.
  constexpr float c[] = {0.333333313f, -0.250008196f, 0.200012267f, -0.166233569f,
                         0.142017573f, -0.131601825f, 0.12761578f,  -0.076344975f};
  const vf f2 = f * f;
  vf r = fma(polynomial(f, c), f2 * f, n * set(-2.12194440e-4f));
  r = fnma(set(0.5f), f2, r) + f;
  return fma(n, set(0.693359375f), r);
}

FASTENC_INLINE vf erf(vf x) {
  const vf t = abs(x);
  // Small: x + x P(x^2) up to 0.93; fit 0.3.
  constexpr float small_c[] = {0.128379151f,  -0.376124799f,  0.112816826f,
                               -0.026761722f, 0.00498594390f, -0.000595375488f};
  const vf small = fma(polynomial(t * t, small_c), x, x);
  // Large: 1 - exp(t Q(t)), erf is 1 in fp32 from 3.92 on; fit 0.05.
  constexpr float large_c[] = {-1.12851441f,  -0.635718286f,   -0.10526184f,
                               0.0228899643f, -0.00321495556f, 0.000213984953f};
  const vf u = min(set(4.0f), t);
  const vf large = copysign(set(1.0f) - exp(polynomial(u, large_c) * u), x);
  return select(t < set(0.93f), small, select(is_nan(x), x, large));
}

FASTENC_INLINE vf tanh(vf x) {
  const vf t = abs(x);
  // Small: x + x^3 P(x^2) up to 0.625; fit 0.08.
  constexpr float c[] = {-0.333332807f, 0.133314416f, -0.0537397154f, 0.0206390881f,
                         -0.00570498733f};
  const vf s = t * t;
  const vf small = fma(polynomial(s, c) * s, x, x);
  const vf e = exp(t + t);
  const vf large = copysign(set(1.0f) - set(2.0f) / (e + set(1.0f)), x);
  return select(t < set(0.625f), small, large);
}

}  // namespace fastenc::cpu::FASTENC_ISA
