// What every entry point does around its launch: the device of the tensors, torch's stream, the
// error check. The only symbols taken from torch are those of its stable ABI.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/checks.h"
#include "../common/launch_counts.h"
#include "../common/philox.h"
#include "vectors.cuh"

#ifndef FASTENC_CUDA_ARCHS
#define FASTENC_CUDA_ARCHS "unknown targets"
#endif

namespace fastenc::cuda {

// Makes the tensor's device current for its lifetime, and names the stream torch uses there.
class Launcher {
 public:
  explicit Launcher(const Tensor& x) : guard_(device_of(x)) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  int sm_count() const {
    int device = 0, count = 0;
    check("the device query", cudaGetDevice(&device));
    check("the device query",
          cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }

  // After each launch: reports a bad configuration now instead of in some later call.
  static void check_launch(const char* op) { check(op, cudaGetLastError()); }

  // The runtime keeps an error for the next cudaGetLastError, which would be of another launch.
  static void check(const char* what, cudaError_t error) {
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
    }
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error),
                    error == cudaErrorNoKernelImageForDevice ? " (compiled for " FASTENC_CUDA_ARCHS
                                                               "; see FASTENC_CUDA_ARCHS)"
                                                             : "");
  }

 private:
  static int32_t device_of(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "expected a CUDA tensor as the first argument");
    return x.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline uint64_t address(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.data_ptr()); }

inline void check_cuda(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  ": expected a tensor on CUDA device ", like.get_device_index());
}

inline std::vector<int64_t> shape_of(const Tensor& x) {
  return {x.sizes().begin(), x.sizes().end()};
}

inline Dtype dtype_of(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(is_kernel_dtype(x.scalar_type()), name,
                  ": expected float32, bfloat16 or float16, got ", dtype_name(x.scalar_type()));
  return x.scalar_type() == ScalarType::Float      ? Dtype::kFloat
         : x.scalar_type() == ScalarType::BFloat16 ? Dtype::kBf16
                                                   : Dtype::kFp16;
}

// A parameter of `size` elements.
inline Parameter parameter(const char* name, const Tensor& p, int64_t size, const Tensor& like) {
  check_cuda(name, p, like);
  check_numel(name, p, size);
  return {p.data_ptr(), dtype_of(name, p)};
}

// Shape and dtype only: the entries lie in device memory, and reading them would synchronise.
inline const int32_t* cu_seqlens_data(const Tensor& cu_seqlens, const Tensor& like) {
  check_cuda("cu_seqlens", cu_seqlens, like);
  check_dtype("cu_seqlens", cu_seqlens, ScalarType::Int);
  check_dim("cu_seqlens", cu_seqlens, 1);
  STD_TORCH_CHECK(cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous(),
                  "cu_seqlens: expected num_seqs + 1 contiguous entries, got ", cu_seqlens.size(0));
  return data<int32_t>(cu_seqlens);
}

// `x`, which must have this shape and the dtype of `like`, with unit stride in its last dimension
// (an expanded tensor stays one copy); kept alive in `kept`.
inline Tensor take_rows(std::vector<Tensor>* kept, const char* name, const Tensor& x,
                        const Tensor& like, const std::vector<int64_t>& shape) {
  check_cuda(name, x, like);
  check_dtype(name, x, like.scalar_type());
  check_dim(name, x, static_cast<int64_t>(shape.size()));
  for (size_t d = 0; d < shape.size(); ++d) {
    STD_TORCH_CHECK(x.size(d) == shape[d], name, ": expected size ", shape[d], " in dimension ", d,
                    ", got ", x.size(d));
  }
  kept->push_back(dense_rows(x));
  return kept->back();
}

// Fills the seed, drop_below and keep_scale of a kernel's arguments.
template <typename Args>
void take_dropout(std::vector<Tensor>* kept, Args* args, double dropout_p,
                  const std::optional<Tensor>& seed, const Tensor& like) {
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p: expected 0 <= p < 1, got ",
                  dropout_p);
  const Dropout dropout(dropout_p, 0);
  args->drop_below = dropout.threshold;
  args->keep_scale = dropout.keep_scale;
  if (dropout.active()) {
    STD_TORCH_CHECK(seed.has_value(), "seed: expected a tensor where dropout_p > 0");
    check_cuda("seed", *seed, like);
    check_dtype("seed", *seed, ScalarType::Long);
    check_numel("seed", *seed, 1);
    kept->push_back(*seed);
    args->seed = data<int64_t>(*seed);
  }
}

// Dynamic shared memory has to be asked for where it makes more than 48 KB with the static one.
template <typename Kernel>
void allow_shared_memory(const char* op, Kernel kernel, int bytes) {
  Launcher::check(op,
                  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(const Launcher& launcher, const char* op, void (*kernel)(Parameters...),
                   dim3 grid, int threads, int bytes, Arguments&&... arguments) {
  if (bytes > 0) {
    allow_shared_memory(op, kernel, bytes);
  }
  kernel<<<grid, threads, bytes, launcher.stream()>>>(arguments...);
  Launcher::check_launch(op);
}

// Calls f(Width<wide>{}) or, where vectors do not fit, f(Width<1>{}).
template <int wide, typename F>
void dispatch_width(bool vectors, F&& f) {
  vectors ? f(Width<wide>{}) : f(Width<1>{});
}

}  // namespace fastenc::cuda
