// Shared memory that a kernel declares: thread-local variables. The emulator has one thread, and
// they lie in one piece, so that it finds all of them: none keeps what the block before left in it.
#pragma once

#include <link.h>

#include <cstddef>

#define __shared__ static thread_local

namespace emulator {

struct Bytes {
  unsigned char* first;
  size_t count;
};

// Every __shared__ variable of this library, and `anchor`.
inline Bytes static_shared() {
  static thread_local unsigned char anchor;
  static const Bytes found = [] {
    Bytes all{&anchor, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* out) {
          auto* first = static_cast<unsigned char*>(library->dlpi_tls_data);
          auto* bytes = static_cast<Bytes*>(out);
          for (int i = 0; first != nullptr && i < library->dlpi_phnum; ++i) {
            const size_t count = library->dlpi_phdr[i].p_memsz;
            if (library->dlpi_phdr[i].p_type == PT_TLS && bytes->first >= first &&
                bytes->first < first + count) {
              *bytes = {first, count};
              return 1;
            }
          }
          return 0;
        },
        &all);
    return all;
  }();
  return found;
}

}  // namespace emulator
