// What the functions that run row kernels share: the choices that csrc/cuda/*.cu make from tensors.
#pragma once

#include "csrc/cuda/vectors.cuh"

namespace fastenc::cuda {

template <typename F>
void dispatch(int dtype, F&& f) {
  dtype == 0 ? f(float{}) : dtype == 1 ? f(bf16{}) : f(fp16{});
}

template <int kWide, typename F>
void dispatch_width(bool vectors, F&& f) {
  vectors ? f(Width<kWide>{}) : f(Width<1>{});
}

template <typename... P>
uint64_t address(const P*... p) {
  return (reinterpret_cast<uintptr_t>(p) | ...);
}

inline uint32_t blocks_of(int64_t n, int64_t size) {
  return static_cast<uint32_t>(ceil_div(n, size));
}

}  // namespace fastenc::cuda
