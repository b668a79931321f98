// The CUDA language for device code. Under FASTENC_EMULATE it is tests/cuda_emulator, which runs
// the same sources on the CPU.
#pragma once

#include <cstdint>

#ifdef FASTENC_EMULATE
#include <simt_emulator.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fastenc::cuda {

__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef FASTENC_EMULATE
  return ::emulator::machine().shared;
#else
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
#endif
}

__device__ __forceinline__ int lane_of(int thread) { return thread % 32; }

// 2^x on the special function unit; 2^-inf = 0, results below 2^-126 are zero.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef FASTENC_EMULATE
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace fastenc::cuda
