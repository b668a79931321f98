// Per-thread scratch that grows and is kept.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>

namespace fastenc::cpu {

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
  const auto padded = [](int64_t floats) { return (floats + 15) / 16 * 16; };
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
  for (const ScratchBuffer& buffer : buffers) {
    *buffer.target = next;
    next += padded(buffer.floats);
  }
}

}  // namespace fastenc::cpu
