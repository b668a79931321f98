// The launch counters of this library, for fastenc.record(): read through ctypes, so plain C.
#include <cstdint>

#include "../common/launch_counts.h"

// Name and count of the i-th counter; nullptr past the last. An op may have several counters.
extern "C" __attribute__((visibility("default"))) const char* fastenc_cuda_launch_count(
    int64_t i, int64_t* count) {
  const auto* counter = fastenc::LaunchCounter::head().load();
  for (; counter != nullptr && i > 0; --i) {
    counter = counter->next();
  }
  if (counter == nullptr) {
    return nullptr;
  }
  *count = counter->count();
  return counter->op();
}
