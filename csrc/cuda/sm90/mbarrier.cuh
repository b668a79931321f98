// Barriers in shared memory that count arrivals and bytes, and barriers of some warps of a block.
#pragma once

#include "../simt.cuh"
#ifdef FASTENC_EMULATE
#include <sm90_emulator.h>
#endif

namespace fastenc::cuda::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
#ifdef FASTENC_EMULATE
  return ::emulator::shared_address(p);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
#ifdef FASTENC_EMULATE
  ::emulator::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// By the thread that initialised, before the block's barrier: the async proxy sees the barriers.
__device__ __forceinline__ void mbarrier_publish() {
#ifdef FASTENC_EMULATE
  ::emulator::mbarrier_publish();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// One arrival; the phase ends once that many bytes have come, too.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
#ifdef FASTENC_EMULATE
  ::emulator::mbarrier_expect(barrier, bytes);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#ifdef FASTENC_EMULATE
  ::emulator::mbarrier_arrive(barrier);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// Until the phase of this parity has ended: 0 for the first, then 1, 0, ...
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef FASTENC_EMULATE
  ::emulator::mbarrier_wait(barrier, parity);
#else
  const uint32_t address = shared_address(barrier);
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// Barrier `id` (1 to 15; 0 is __syncthreads) of the `threads` threads that call it.
__device__ __forceinline__ void named_barrier(int id, int threads) {
#ifdef FASTENC_EMULATE
  ::emulator::named_barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// What threads wrote to shared memory before a barrier is seen by TMA and wgmma after it. Each
// writing thread calls it between its writes and the barrier.
__device__ __forceinline__ void fence_async_proxy() {
#ifdef FASTENC_EMULATE
  ::emulator::fence_async_proxy();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace fastenc::cuda::sm90
