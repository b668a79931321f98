// Which attention kernel serves a call on a GPU: a pure function of the problem and of the chip.
// Neither CUDA nor torch in here: tests/test_cuda_attention_choice.py calls it on the CPU.
#pragma once

#include <cstdint>
#include <string_view>

namespace fastenc {

// Whether targets such as "80;90a" are of a library with code for Hopper's own instructions.
constexpr bool holds_sm90a(std::string_view archs) {
  return archs.find("90a") != std::string_view::npos;
}

enum class AttentionKernel {
  kGeneral,          // csrc/cuda/varlen_attention.cu: sm_80 and up, every case
  kLocalSm90,        // csrc/cuda/local_attention_sm90.cu, local_attention_bwd_sm90.cu
  kGlobalSm90,       // csrc/cuda/global_attention_sm90.cu, global_attention_bwd_sm90.cu
  kLocalStreamSm90,  // csrc/cuda/local_attention_stream_bwd_sm90.cu, backward only
};

struct AttentionCase {
  int capability;  // 10 * major + minor of the device
  bool sm90a;      // the library holds code for it
  int item_bytes;  // of q, k, v: 2 for bf16 and fp16
  int64_t head_dim;
  int64_t left, right;  // of the window; negative: unlimited
  int64_t max_seqlen;
  double scale;
  bool dropout, bias;
  bool rotary;            // cos and sin are given
  bool rotary_same_type;  // in the dtype of q, contiguous, 16-byte aligned
  bool vectors;  // addresses and strides of q, k, v, out (and gradients): 16-byte multiples
};

// A window that reaches past every sequence is as wide as the longest one.
constexpr int64_t attention_reach(int64_t side, int64_t max_seqlen) {
  const int64_t most = max_seqlen > 1 ? max_seqlen - 1 : 0;
  return side < 0 || side > most ? most : side;
}

constexpr int64_t window_reach(const AttentionCase& c) {
  const int64_t left = attention_reach(c.left, c.max_seqlen);
  const int64_t right = attention_reach(c.right, c.max_seqlen);
  return left > right ? left : right;
}

// The template argument of the local kernels: keys before and after a query, 0 where none fits.
constexpr int local_reach(const AttentionCase& c) {
  const int64_t reach = window_reach(c);
  // head_dim 128 leaves no shared memory for the wider stage.
  return reach <= 64 ? 64 : reach <= 128 && c.head_dim <= 64 ? 128 : 0;
}

constexpr bool hopper_serves(const AttentionCase& c) {
  return c.capability == 90 && c.sm90a && c.item_bytes == 2 && c.vectors && !c.dropout && !c.bias &&
         (!c.rotary || c.rotary_same_type) && c.scale > 0 &&
         (c.head_dim == 32 || c.head_dim == 64 || c.head_dim == 128);
}

// Whether every query sees every key of its sequence.
constexpr bool sees_everything(const AttentionCase& c) {
  const int64_t most = c.max_seqlen > 1 ? c.max_seqlen - 1 : 0;
  return attention_reach(c.left, c.max_seqlen) == most &&
         attention_reach(c.right, c.max_seqlen) == most;
}

constexpr AttentionKernel choose_attention(const AttentionCase& c) {
  return !hopper_serves(c)    ? AttentionKernel::kGeneral
         : local_reach(c) > 0 ? AttentionKernel::kLocalSm90
         : sees_everything(c) ? AttentionKernel::kGlobalSm90
                              : AttentionKernel::kGeneral;
}

constexpr AttentionKernel choose_attention_bwd(const AttentionCase& c) {
  // Four tiles and their halo have to fit into shared memory; else the halo streams.
  const bool fits = local_reach(c) > 0 && c.head_dim * local_reach(c) <= 64 * 64;
  const bool streams = c.head_dim == 64 && window_reach(c) <= 128;
  return !hopper_serves(c)    ? AttentionKernel::kGeneral
         : fits               ? AttentionKernel::kLocalSm90
         : streams            ? AttentionKernel::kLocalStreamSm90
         : sees_everything(c) ? AttentionKernel::kGlobalSm90
                              : AttentionKernel::kGeneral;
}

}  // namespace fastenc
