// cp.async (sm_80): 16 bytes from global to shared memory, past the registers.
#pragma once

#include "simt.cuh"

namespace fastenc::cuda {

// Zeros where not `inside`; `from` must be a valid address all the same.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool inside) {
  const int size = inside ? 16 : 0;
#ifdef FASTENC_EMULATE
  ::emulator::cp_async(to, from, 16, size);
#else
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(size)
               : "memory");
#endif
}

// Closes the group of the copies issued since the last one.
__device__ __forceinline__ void cp_async_commit() {
#ifdef FASTENC_EMULATE
  ::emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all of this thread's groups have arrived but the `kPending` latest.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef FASTENC_EMULATE
  ::emulator::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fastenc::cuda
