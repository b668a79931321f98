// Argument checks and dtype dispatch of the C++ entry points. The public Python functions check
// with friendlier messages; these keep direct calls of torch.ops.fastenc.* safe too.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "simd_types.h"

namespace fastenc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline bool is_kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<float>{}), f(Type<bf16>{}) or f(Type<fp16>{}).
template <typename F>
decltype(auto) dispatch_dtype(const char* name, ScalarType dtype, F&& f) {
  STD_TORCH_CHECK(is_kernel_dtype(dtype), name, ": expected float32, bfloat16 or float16, got ",
                  dtype_name(dtype));
  if (dtype == ScalarType::Float) {
    return f(Type<float>{});
  }
  return dtype == ScalarType::BFloat16 ? f(Type<bf16>{}) : f(Type<fp16>{});
}

inline ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Unit stride in the last dimension; every other stride stays as it is.
inline Tensor dense_rows(const Tensor& x) {
  const bool unit = x.dim() == 0 || x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1;
  return unit ? x : torch::stable::contiguous(x);
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, name, ": expected ", dtype_name(expected), ", got ",
                  dtype_name(x.scalar_type()));
}

inline void check_dim(const char* name, const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.dim() == dim, name, ": expected ", dim, " dimensions, got ", x.dim());
}

inline void check_numel(const char* name, const Tensor& x, int64_t numel) {
  STD_TORCH_CHECK(x.numel() == numel, name, ": expected ", numel, " elements, got ", x.numel());
}

// cu_seqlens is (num_seqs + 1,) int32, from 0 to total_tokens, non-decreasing; returns its entries.
inline const int32_t* check_cu_seqlens(const Tensor& cu_seqlens, int64_t total_tokens) {
  check_dtype("cu_seqlens", cu_seqlens, ScalarType::Int);
  check_dim("cu_seqlens", cu_seqlens, 1);
  const int64_t entries = cu_seqlens.size(0);
  STD_TORCH_CHECK(entries >= 1 && cu_seqlens.is_contiguous(),
                  "cu_seqlens: expected num_seqs + 1 contiguous entries, got ", entries);
  const int32_t* edges = data<int32_t>(cu_seqlens);
  STD_TORCH_CHECK(edges[0] == 0 && edges[entries - 1] == total_tokens,
                  "cu_seqlens: expected to run from 0 to ", total_tokens, ", got ", edges[0],
                  " to ", edges[entries - 1]);
  for (int64_t i = 1; i < entries; ++i) {
    STD_TORCH_CHECK(edges[i - 1] <= edges[i], "cu_seqlens: expected non-decreasing entries, got ",
                    edges[i - 1], " then ", edges[i], " at index ", i);
  }
  return edges;
}

}  // namespace fastenc
