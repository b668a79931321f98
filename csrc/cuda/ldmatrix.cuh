// ldmatrix (sm_75): four 8 x 8 matrices of 16-bit elements from shared memory into mma fragments.
#pragma once

#include "simt.cuh"

namespace fastenc::cuda {

// Lanes 8 i .. 8 i + 7 point at the 16-byte rows of matrix i. Lane l then holds of each matrix the
// elements (l / 4, 2 (l % 4)) and the next one in the row; transposed: (2 (l % 4), l / 4) and the
// next one in the column.
template <bool kTransposed>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#ifdef FASTENC_EMULATE
  ::emulator::ldmatrix_x4(out, row, kTransposed);
#else
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  }
#endif
}

}  // namespace fastenc::cuda
