// Compiles a kernel file once per instruction set, from one source and with ordinary build flags.
//
// A kernel file names itself, includes this header, and has two parts: the kernels, compiled once
// per ISA inside namespace fastenc::cpu::FASTENC_ISA (avx512, avx2, portable), and everything else,
// compiled once. FASTENC_FOR_ACTIVE_ISA(f) is the address of f of the ISA of this machine.
//
//   #include <algorithm>                          // 1. standard and torch headers first, always
//   #include "../common/parallel.h"
//   #define FASTENC_KERNEL_FILE "../cpu/scale.cpp"  // 2. this file, as seen from csrc/common
//   #include "../common/foreach_isa.h"
//   #ifdef FASTENC_ISA                            // 3. once per ISA
//   namespace fastenc::cpu::FASTENC_ISA {
//   template <typename T>
//   void scale_row(const T* x, T* y, int64_t n, float a) {
//     int64_t i = 0;
//     for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * set(a));
//     if (i < n) store_n(y + i, load_n(x + i, n - i) * set(a), n - i);
//   }
//   }
//   #else                                         // 4. once
//   void scale(const bf16* x, bf16* y, int64_t n) {
//     FASTENC_FOR_ACTIVE_ISA(scale_row<bf16>)(x, y, n, 2);
//   }
//   #endif
//
// Rules. Standard headers must be included before this one: included later, their inline functions
// would be compiled with AVX-512 and the linker could keep that copy for everybody. Use no vector
// type inside a lambda (clang does not carry the target into it). A helper header with kernels is
// included inside part 3 and guarded as simd.h is, by FASTENC_ISA_TOGGLE (which flips each pass).
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>

#include "simd_types.h"

#ifndef FASTENC_ISA

#ifndef FASTENC_KERNEL_FILE
#error "define FASTENC_KERNEL_FILE before including foreach_isa.h"
#endif

#define FASTENC_ISA_PORTABLE 0
#define FASTENC_ISA_AVX2 1
#define FASTENC_ISA_AVX512 2

#if FASTENC_X86

#define FASTENC_ISA avx512
#define FASTENC_ISA_LEVEL FASTENC_ISA_AVX512
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "simd.h"
#include FASTENC_KERNEL_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTENC_ISA
#undef FASTENC_ISA_LEVEL

#define FASTENC_ISA avx2
#define FASTENC_ISA_LEVEL FASTENC_ISA_AVX2
#define FASTENC_ISA_TOGGLE
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd.h"
#include FASTENC_KERNEL_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTENC_ISA
#undef FASTENC_ISA_LEVEL
#undef FASTENC_ISA_TOGGLE

#endif  // FASTENC_X86

#define FASTENC_ISA portable
#define FASTENC_ISA_LEVEL FASTENC_ISA_PORTABLE
#include "simd.h"
#include FASTENC_KERNEL_FILE
#undef FASTENC_ISA
#undef FASTENC_ISA_LEVEL

#if FASTENC_X86
#define FASTENC_FOR_ACTIVE_ISA(...)                             \
  (::fastenc::cpu::active_isa() == ::fastenc::cpu::Isa::kAvx512 \
       ? &::fastenc::cpu::avx512::__VA_ARGS__                   \
   : ::fastenc::cpu::active_isa() == ::fastenc::cpu::Isa::kAvx2 \
       ? &::fastenc::cpu::avx2::__VA_ARGS__                     \
       : &::fastenc::cpu::portable::__VA_ARGS__)
#else
#define FASTENC_FOR_ACTIVE_ISA(...) \
  ((void)::fastenc::cpu::active_isa(), &::fastenc::cpu::portable::__VA_ARGS__)
#endif

#endif  // FASTENC_ISA
