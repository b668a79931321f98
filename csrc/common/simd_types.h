// Storage types and the choice of instruction set: what the SIMD layer needs once, not once per
// ISA.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTENC_X86 1
#include <cpuid.h>
// gcc's own AVX-512 header warns about its undefined vectors (gcc bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define FASTENC_X86 0
#endif

#define FASTENC_INLINE inline __attribute__((always_inline))

namespace fastenc {

// 16-bit storage; every computation is in fp32.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

FASTENC_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

FASTENC_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FASTENC_INLINE float to_float(float x) { return x; }

FASTENC_INLINE float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

FASTENC_INLINE float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN
    return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  // 2^112 rebiases the exponent, and makes subnormals normal.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
  return bits_to_float(sign | float_to_bits(scaled));
}

// Conversions from fp32 round to nearest, ties to even; NaN stays a (quiet) NaN.
template <typename T>
T from_float(float x);

template <>
FASTENC_INLINE float from_float<float>(float x) {
  return x;
}

template <>
FASTENC_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
FASTENC_INLINE fp16 from_float<fp16>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds past 65504
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the FPU round at 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

namespace cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable";
}

// The best instruction set of this machine; __builtin_cpu_supports also asks the operating system.
inline Isa best_isa() {
#if FASTENC_X86
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
#else
  return Isa::kPortable;
#endif
}

inline Isa choose_isa(const char* wanted, Isa best) {
  if (wanted == nullptr || *wanted == '\0') {
    return best;
  }
  std::string possible;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (isa > best) {
      break;
    }
    if (isa_name(isa) == std::string(wanted)) {
      return isa;
    }
    possible += possible.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  throw std::runtime_error("FASTENC_CPU_ISA=" + std::string(wanted) +
                           " is not possible on this machine; possible values: " + possible);
}

inline bool cpu_is_intel() {
#if FASTENC_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Chosen once per process: the best one, or what the environment variable FASTENC_CPU_ISA asks for.
inline Isa active_isa() {
  static const Isa isa = choose_isa(std::getenv("FASTENC_CPU_ISA"), best_isa());
  return isa;
}

}  // namespace cpu
}  // namespace fastenc
