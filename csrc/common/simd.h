// Vectors of kLanes floats (16, 8 or 4) in namespace fastenc::cpu::FASTENC_ISA; see foreach_isa.h.
//
//   vf  floats            vi  32-bit integers            vm  lane mask (m1 & m2, m1 | m2, !m)
//
//   set(x) set_int(i) zero() iota()             broadcast; iota = 0, 1, 2, ... as vi
//   load(p) load_n(p, n)                        p: float, bf16 or fp16; lanes >= n are 0
//   store(p, v) store_n(p, v, n)                rounds to nearest even, keeps NaN; n in 0..kLanes
//   + - * / and unary -, on vf
//   fma(a, b, c) fnma(a, b, c)                  a * b + c, c - a * b
//   min max                                     the second operand if either is NaN
//   abs sqrt copysign(magnitude, sign) round    round: to nearest even, |x| < 2^22
//   < <= > >= ==  is_nan                        -> vm; ordered (false on NaN)
//   select(m, a, b) zero_unless(m, a) first_n(n)
//   sum(v) max_lane(v)                          horizontal; max_lane loses NaN
//   exp exp2 log erf tanh                       <= 2 ulp, every special value as in libm; log only
//                                               of positive normal numbers
//   exp2_flush                                  exp2 for x <= 126 that flushes results under 2^-126
//   vi: + - * & | ^ == >  shift_left<n> shift_right<n> (logical)  unsigned_ge  min max (signed)
//       to_int(vf) truncates, to_float(vi), bits(vf), from_bits(vi)
//       load_int(const int32_t*) store_int(int32_t*, v)
//       multiply_wide(a, b, &high, &low)        unsigned 32 x 32 -> 64
//   permute(v, i)                               lane l is lane i[l] of v
//   transpose(v)                                array of kLanes vectors, in place
//   sums(v)                                     array of kLanes vectors; lane i is sum(v[i])
#if defined(FASTENC_SIMD_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_SIMD_TOGGLE
#undef FASTENC_SIMD_TOGGLE
#else
#define FASTENC_SIMD_TOGGLE
#endif

#if FASTENC_ISA_LEVEL == FASTENC_ISA_AVX512
#include "simd_avx512.h"
#elif FASTENC_ISA_LEVEL == FASTENC_ISA_AVX2
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif
#include "simd_math.h"

namespace fastenc::cpu::FASTENC_ISA {
using ::fastenc::to_float;  // of one bf16, fp16 or float
}

#endif
