// Tensor maps of attention's operands, made on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "../../common/hopper_tiles.h"
#include "../attention_args.cuh"
#include "../launch.cuh"

namespace fastenc::cuda::sm90 {

// From the driver that is loaded, not by linking: the library must load where there is no libcuda.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    STD_TORCH_CHECK(error == cudaSuccess && result == cudaDriverEntryPointSuccess,
                    "the driver has no cuTensorMapEncodeTiled: CUDA 12.0 or later is needed");
    return reinterpret_cast<Encode>(found);
  }();
  return encode;
}

// (total_tokens, heads, head_dim) in boxes of kBoxRows tokens of one head, in panels of at most 128
// bytes of a row, swizzled as wide as they are: what Tile<> of swizzle.cuh describes.
template <typename T>
CUtensorMap rows_map(const HeadRows& rows, const AttentionArgs& args) {
  constexpr CUtensorMapDataType kType =
      std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int64_t row_bytes = args.head_dim * sizeof(T);
  const auto panel = static_cast<cuuint32_t>(smaller(row_bytes, 128));
  // The stride of a dimension of size 1 may be anything in torch.
  const int64_t head_stride = args.heads == 1 ? row_bytes : rows.head_stride * sizeof(T);
  const int64_t token_stride =
      args.total_tokens == 1 ? head_stride * args.heads : rows.token_stride * sizeof(T);
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(args.head_dim),
                               static_cast<cuuint64_t>(args.heads),
                               static_cast<cuuint64_t>(args.total_tokens)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(head_stride),
                                 static_cast<cuuint64_t>(token_stride)};
  const cuuint32_t box[3] = {panel / static_cast<cuuint32_t>(sizeof(T)), 1, kBoxRows};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, kType, 3, const_cast<void*>(rows.data), sizes, strides, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE,
                           panel == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ",
                  static_cast<int>(result));
  return map;
}

}  // namespace fastenc::cuda::sm90
