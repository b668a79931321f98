// The words of csrc/common/philox.h on the device.
#pragma once

#include "../common/philox.h"
#include "simt.cuh"

namespace fastenc::cuda {

struct PhiloxWords {
  uint32_t word[4];
};

__device__ __forceinline__ PhiloxWords philox_words(uint32_t c0, uint32_t c1, uint32_t c2,
                                                    uint32_t c3, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiply0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiply1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(p0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastenc::cuda
