// Per-thread scratch that grows and is kept.
//
// Under AddressSanitizer (make sanitize) a gap follows each buffer, so that an overrun is found
// where the next buffer would hide it, and buffers begin as NaN.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace fastenc::cpu {

#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kScratchGap = 16;
#else
constexpr int64_t kScratchGap = 0;
#endif

// One task of a thread at a time carves its buffers out of it, each on a cache line of its own.
struct ScratchBuffer {
  float** target;
  int64_t floats;
};

inline void carve_scratch(std::initializer_list<ScratchBuffer> buffers) {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kAlignment); }
  };
  thread_local std::unique_ptr<float[], Free> memory;
  thread_local int64_t capacity = 0;
  const auto padded = [](int64_t floats) { return (floats + 15) / 16 * 16 + kScratchGap; };
  int64_t total = 0;
  for (const ScratchBuffer& buffer : buffers) {
    total += padded(buffer.floats);
  }
  if (total > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<float*>(::operator new[](total * sizeof(float), kAlignment)));
    capacity = total;
  }
  float* next = memory.get();
  ASAN_UNPOISON_MEMORY_REGION(next, total * sizeof(float));
  for (const ScratchBuffer& buffer : buffers) {
    *buffer.target = next;
    if constexpr (kScratchGap > 0) {
      std::fill_n(next, buffer.floats, std::numeric_limits<float>::quiet_NaN());
    }
    ASAN_POISON_MEMORY_REGION(next + buffer.floats,
                              (padded(buffer.floats) - buffer.floats) * sizeof(float));
    next += padded(buffer.floats);
  }
}

}  // namespace fastenc::cpu
