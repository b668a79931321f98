// Tiles that pass from the warps that bring them to those that read them.
#pragma once

#include "mbarrier.cuh"

namespace fastenc::cuda::sm90 {

// A ring of tiles in shared memory: `full` once TMA has brought one, `empty` once every consumer
// warp has read it. `count` tiles have gone through it.
template <int kStages>
struct Ring {
  uint64_t *full, *empty;
  uint32_t count = 0;

  __device__ __forceinline__ void init(uint32_t readers) const {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, readers);
    }
  }
  __device__ __forceinline__ int stage() const { return count % kStages; }
  __device__ __forceinline__ uint64_t* await_full() {
    mbarrier_wait(full + stage(), count / kStages & 1);
    return full + stage();
  }
  __device__ __forceinline__ uint64_t* await_empty() {
    mbarrier_wait(empty + stage(), (count / kStages & 1) ^ 1);
    return full + stage();
  }
  __device__ __forceinline__ void release() {
    if (threadIdx.x % 32 == 0) {
      mbarrier_arrive(empty + stage());
    }
    ++count;
  }
};

}  // namespace fastenc::cuda::sm90
