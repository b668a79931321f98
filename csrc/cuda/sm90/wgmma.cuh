// Products of a warpgroup (128 threads): 64 rows, 16-bit operands, fp32 accumulators.
//
// An accumulator of n columns is float[n / 8][4]: with warp and lane within the warpgroup,
// group = lane / 4, t = lane % 4 and row = 16 warp + group, d[i] holds
//   (row, 8 i + 2 t), (row, 8 i + 2 t + 1), (row + 8, 8 i + 2 t), (row + 8, 8 i + 2 t + 1).
// A left operand in registers holds pairs of columns at
//   (row, 2 t), (row + 8, 2 t), (row, 2 t + 8), (row + 8, 2 t + 8).
// PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16".
#pragma once

#include <type_traits>

#include "../../common/simd_types.h"
#include "mbarrier.cuh"

namespace fastenc::cuda::sm90 {

// Before the first product that reads or writes registers written otherwise.
__device__ __forceinline__ void wgmma_fence() {
#ifdef FASTENC_EMULATE
  ::emulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef FASTENC_EMULATE
  ::emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most kPending committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef FASTENC_EMULATE
  ::emulator::wgmma_wait(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// wgmma_wait, but only once `made`, which is never negative, is there. ptxas moves a wait up over
// arithmetic that does not need it, which then no longer runs beside the products; it does not move
// one over a warp's synchronisation. (A branch that depends on `made` serves too, but makes ptxas
// 13.0 spill at head_dim 128.)
template <int kPending>
__device__ __forceinline__ void wgmma_wait_after(float made) {
#ifndef FASTENC_EMULATE
  __syncwarp(made < 0.0f ? 0u : 0xffffffffu);
#endif
  wgmma_wait<kPending>();
}

// Keeps the compiler from moving accesses of these registers over the fences and waits.
template <int kTiles>
__device__ __forceinline__ void hold(float (&d)[kTiles][4]) {
#ifndef FASTENC_EMULATE
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
#endif
}

#define FASTENC_D1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FASTENC_D4(i) FASTENC_D1(i), FASTENC_D1(i + 1), FASTENC_D1(i + 2), FASTENC_D1(i + 3)
#define FASTENC_D8(i) FASTENC_D4(i), FASTENC_D4(i + 4)
#define FASTENC_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTENC_R32 \
  FASTENC_R16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTENC_R64                                                                  \
  FASTENC_R32                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTENC_R96                                                                  \
  FASTENC_R64                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTENC_R128                                                                             \
  FASTENC_R96                                                                                    \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"

// registers: of an accumulator; the operands after them are numbered from there.
#define FASTENC_WGMMA_SS(TYPE, N, REGISTERS, A, B, P, TA, TB, ...)                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                        \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS \
               "}, "                                                                         \
               "%" A ", %" B ", p, 1, 1, %" TA ", %" TB ";\n}"                               \
               : __VA_ARGS__                                                                 \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransA), "n"(kTransB))
#define FASTENC_WGMMA_RS(TYPE, N, REGISTERS, A0, A1, A2, A3, B, P, TB, ...)                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                        \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS \
               "}, "                                                                         \
               "{%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, %" TB ";\n}"          \
               : __VA_ARGS__                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                         \
                 "r"(static_cast<int>(accumulate)), "n"(kTransB))

// d (64, kTiles * 8) = a b, plus d where `accumulate`; a and b are descriptors (swizzle.cuh), of
// tiles whose rows are K where kTrans.
template <typename T, bool kTransA, bool kTransB, int kTiles>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b,
                                      bool accumulate) {
#ifdef FASTENC_EMULATE
  ::emulator::wgmma<T, kTransA, kTransB>(d, a, b, accumulate);
#else
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 24);
  if constexpr (kTiles == 4) {
    if constexpr (std::is_same_v<T, bf16>) {
      FASTENC_WGMMA_SS("bf16", "32", FASTENC_R16, "16", "17", "18", "19", "20", FASTENC_D4(0));
    } else {
      FASTENC_WGMMA_SS("f16", "32", FASTENC_R16, "16", "17", "18", "19", "20", FASTENC_D4(0));
    }
  } else if constexpr (kTiles == 8) {
    if constexpr (std::is_same_v<T, bf16>) {
      FASTENC_WGMMA_SS("bf16", "64", FASTENC_R32, "32", "33", "34", "35", "36", FASTENC_D8(0));
    } else {
      FASTENC_WGMMA_SS("f16", "64", FASTENC_R32, "32", "33", "34", "35", "36", FASTENC_D8(0));
    }
  } else if constexpr (kTiles == 16) {
    if constexpr (std::is_same_v<T, bf16>) {
      FASTENC_WGMMA_SS("bf16", "128", FASTENC_R64, "64", "65", "66", "67", "68", FASTENC_D8(0),
                       FASTENC_D8(8));
    } else {
      FASTENC_WGMMA_SS("f16", "128", FASTENC_R64, "64", "65", "66", "67", "68", FASTENC_D8(0),
                       FASTENC_D8(8));
    }
  } else if constexpr (kTiles == 24) {
    if constexpr (std::is_same_v<T, bf16>) {
      FASTENC_WGMMA_SS("bf16", "192", FASTENC_R96, "96", "97", "98", "99", "100", FASTENC_D8(0),
                       FASTENC_D8(8), FASTENC_D8(16));
    } else {
      FASTENC_WGMMA_SS("f16", "192", FASTENC_R96, "96", "97", "98", "99", "100", FASTENC_D8(0),
                       FASTENC_D8(8), FASTENC_D8(16));
    }
  }
#endif
}

// The same with the left operand in registers.
template <typename T, bool kTransB, int kTiles>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
#ifdef FASTENC_EMULATE
  ::emulator::wgmma<T, kTransB>(d, a, b, accumulate);
#else
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 24);
  if constexpr (kTiles == 4) {
    if constexpr (std::is_same_v<T, bf16>) {
      FASTENC_WGMMA_RS("bf16", "32", FASTENC_R16, "16", "17", "18", "19", "20", "21", "22",
                       FASTENC_D4(0));
    } else {
      FASTENC_WGMMA_RS("f16", "32", FASTENC_R16, "16", "17", "18", "19", "20", "21", "22",
                       FASTENC_D4(0));
    }
  } else if constexpr (kTiles == 8) {
    if constexpr (std::is_same_v<T, bf16>) {
      FASTENC_WGMMA_RS("bf16", "64", FASTENC_R32, "32", "33", "34", "35", "36", "37", "38",
                       FASTENC_D8(0));
    } else {
      FASTENC_WGMMA_RS("f16", "64", FASTENC_R32, "32", "33", "34", "35", "36", "37", "38",
                       FASTENC_D8(0));
    }
  } else if constexpr (kTiles == 16) {
    if constexpr (std::is_same_v<T, bf16>) {
      FASTENC_WGMMA_RS("bf16", "128", FASTENC_R64, "64", "65", "66", "67", "68", "69", "70",
                       FASTENC_D8(0), FASTENC_D8(8));
    } else {
      FASTENC_WGMMA_RS("f16", "128", FASTENC_R64, "64", "65", "66", "67", "68", "69", "70",
                       FASTENC_D8(0), FASTENC_D8(8));
    }
  } else if constexpr (kTiles == 24) {
    if constexpr (std::is_same_v<T, bf16>) {
      FASTENC_WGMMA_RS("bf16", "192", FASTENC_R96, "96", "97", "98", "99", "100", "101", "102",
                       FASTENC_D8(0), FASTENC_D8(8), FASTENC_D8(16));
    } else {
      FASTENC_WGMMA_RS("f16", "192", FASTENC_R96, "96", "97", "98", "99", "100", "101", "102",
                       FASTENC_D8(0), FASTENC_D8(8), FASTENC_D8(16));
    }
  }
#endif
}

#undef FASTENC_WGMMA_RS
#undef FASTENC_WGMMA_SS
#undef FASTENC_R128
#undef FASTENC_R96
#undef FASTENC_R64
#undef FASTENC_R32
#undef FASTENC_R16
#undef FASTENC_D8
#undef FASTENC_D4
#undef FASTENC_D1

}  // namespace fastenc::cuda::sm90
