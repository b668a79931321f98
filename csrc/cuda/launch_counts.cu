// What Python asks of this library: its launch counters, for fastenc.record(), its targets and
// its toolkit. Plain C, read through ctypes.
#include <cstdint>

#include "../common/launch_counts.h"

#ifndef FASTENC_CUDA_ARCHS
#define FASTENC_CUDA_ARCHS ""
#endif

// What this library is compiled for; fastenc/ops/_library.py looks for it in the file.
extern "C" __attribute__((visibility("default"), used)) const char fastenc_cuda_archs[] =
    "fastenc-cuda-archs:" FASTENC_CUDA_ARCHS;

// The toolkit whose runtime is linked in: a driver of an older major version does not serve it.
#define FASTENC_TEXT_OF(x) #x
#define FASTENC_TEXT(x) FASTENC_TEXT_OF(x)
extern "C" __attribute__((visibility("default"), used)) const char fastenc_cuda_toolkit[] =
    "fastenc-cuda-toolkit:" FASTENC_TEXT(__CUDACC_VER_MAJOR__);

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
