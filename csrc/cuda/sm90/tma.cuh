// Tiles from global to shared memory by the tensor memory accelerator.
#pragma once

#include "mbarrier.cuh"
#ifndef FASTENC_EMULATE
#include <cuda.h>
#endif

namespace fastenc::cuda::sm90 {

#ifdef FASTENC_EMULATE
using TensorMap = ::emulator::TensorMap;
#else
using TensorMap = CUtensorMap;  // the type alone: libcuda is not linked
#endif

__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
#ifndef FASTENC_EMULATE
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// A box from (column, head, token), zeros where it lies outside of the tensor; its whole size
// counts against what `barrier` expects.
__device__ __forceinline__ void tma_load(void* to, const TensorMap& map, uint64_t* barrier,
                                         int column, int head, int token) {
#ifdef FASTENC_EMULATE
  ::emulator::tma_load(to, map, barrier, column, head, token);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(token)
      : "memory");
#endif
}

}  // namespace fastenc::cuda::sm90
