// mma.sync.m16n8k16 (sm_80): 16-bit operands, fp32 accumulators.
#pragma once

#include "../common/simd_types.h"
#include "simt.cuh"

namespace fastenc::cuda {

// c (16 x 8) += a (16 x 16) b (16 x 8). With group = lane / 4 and t = lane % 4 a lane holds
//   c: (group, 2t), (group, 2t + 1), (group + 8, 2t), (group + 8, 2t + 1);
//   a: pairs of columns at (group, 2t), (group + 8, 2t), (group, 2t + 8), (group + 8, 2t + 8);
//   b: pairs of rows at (2t, group), (2t + 8, group).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#ifdef FASTENC_EMULATE
  ::emulator::mma_m16n8k16<T>(c, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, fp16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// Two values as the halves of one register, `low` first in memory; rounded to nearest.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#ifdef FASTENC_EMULATE
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#else
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, fp16>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#endif
}

}  // namespace fastenc::cuda
