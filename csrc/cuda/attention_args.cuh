// What the attention kernels are called with.
#pragma once

#include "vectors.cuh"

namespace fastenc::cuda {

// Rows of one head: element (token, head, d) is data[token * token_stride + head * head_stride +
// d].
struct HeadRows {
  const void* data;
  int64_t token_stride, head_stride;

  template <typename T>
  __device__ __forceinline__ T* at(int64_t token, int head) const {
    return static_cast<T*>(const_cast<void*>(data)) + token * token_stride + head * head_stride;
  }
};

struct AttentionArgs {
  HeadRows q, k, v, out;
  float* lse;  // (heads, total_tokens)
  const int32_t* cu_seqlens;
  int32_t num_seqs, heads, head_dim;
  int64_t total_tokens;
  int32_t left, right;  // at most kUnlimited
  bool vectors;         // 16-byte accesses are legal for every row

  // exp(scale s + bias) = 2^(factor s'), s' = s, or s' = scale_log2 s + bias log2 e, factor = 1
  // (`prescale`: with a bias, or a scale that is not positive).
  float scale_log2, factor;
  bool prescale;
  Parameter bias;  // (heads, 2 * radius + 1) by the distance j - i, or absent
  int32_t bias_radius;

  Parameter cos, sin;  // (max_pos, head_dim / 2), or absent
  bool rotary_vectors;

  const int64_t* seed;
  uint32_t drop_below;  // an element is kept iff its word is at least this; 0: no dropout
  float keep_scale;     // 1 / (1 - p)
};

struct AttentionGradArgs {
  AttentionArgs forward;
  HeadRows grad_out, dq, dk, dv;
  const float* grad_lse;  // (heads, total_tokens), or absent
  float* delta;           // (heads, total_tokens): sum_d out dout - dlse
  float* bias_partials;   // (slots, heads, 2 * radius + 1), or absent
  float scale;
};

}  // namespace fastenc::cuda
