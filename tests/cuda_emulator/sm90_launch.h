// What the functions that run Hopper kernels share.
#pragma once

#include "csrc/cuda/sm90/attention.cuh"

namespace emulator {

inline TensorMap map_of(const fastenc::cuda::HeadRows& rows,
                        const fastenc::cuda::AttentionArgs& args) {
  const int row_bytes = args.head_dim * 2 < 128 ? args.head_dim * 2 : 128;
  return {static_cast<unsigned char*>(const_cast<void*>(rows.data)),
          {args.head_dim, args.heads, args.total_tokens},
          {2, rows.head_stride * 2, rows.token_stride * 2},
          {row_bytes / 2, 1, fastenc::kBoxRows},
          row_bytes};
}

template <typename F>
void run(uint32_t x, uint32_t y, int threads, int bytes, bool backwards, const F& kernel) {
  launch({x, y, 1}, {uint32_t(threads), 1, 1}, bytes, kernel, backwards);
  finish_block();
}

}  // namespace emulator
