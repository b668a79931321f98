// Registers moved between the warpgroups of a block: all four warps of a warpgroup call these.
#pragma once

#include "../simt.cuh"

namespace fastenc::cuda::sm90 {

template <int kCount>
__device__ __forceinline__ void release_registers() {
#ifndef FASTENC_EMULATE
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
__device__ __forceinline__ void claim_registers() {
#ifndef FASTENC_EMULATE
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace fastenc::cuda::sm90
