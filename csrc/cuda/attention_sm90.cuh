// Host side of the Hopper attention kernels: whether they serve a call, and their launches.
#pragma once

#include "../common/hopper_tiles.h"
#include "attention_choice.h"
#include "attention_problem.cuh"

namespace fastenc::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  STD_TORCH_CHECK(cudaGetDevice(&device) == cudaSuccess &&
                      cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess,
                  "the device query failed");
  return value;
}

// TMA wants strides that are positive and below 2^40 bytes; expanded tensors have stride 0.
inline bool strides_fit_tma(const HeadRows& rows, const AttentionArgs& args) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride < int64_t{1} << 38);
  };
  return fits(args.heads, rows.head_stride) && fits(args.total_tokens, rows.token_stride);
}

inline AttentionCase attention_case(const Launcher&, const AttentionCall& call) {
  const AttentionArgs& a = call.args;
  const bool half = call.dtype != ScalarType::Float;
  const Dtype dtype = call.dtype == ScalarType::BFloat16 ? Dtype::kBf16 : Dtype::kFp16;
  return {
      .capability = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
                    device_attribute(cudaDevAttrComputeCapabilityMinor),
      .sm90a = holds_sm90a(FASTENC_CUDA_ARCHS),
      .item_bytes = half ? 2 : 4,
      .head_dim = a.head_dim,
      .left = call.options.left,
      .right = call.options.right,
      .max_seqlen = call.options.max_seqlen,
      .scale = call.options.scale,
      .dropout = a.drop_below != 0,
      .bias = a.bias.data != nullptr,
      .rotary = a.cos.data != nullptr,
      .rotary_same_type = half && a.cos.dtype == dtype && a.sin.dtype == dtype && a.rotary_vectors,
      .vectors = a.vectors && strides_fit_tma(a.q, a) && strides_fit_tma(a.k, a) &&
                 strides_fit_tma(a.v, a)};
}

// A kernel of blocks (tile of Shape::kRows rows, heads_per_block heads): kernel(maps, args, heads).
template <typename Shape, typename Kernel, typename Maps, typename Args>
void launch_tiles(const Launcher& launcher, const char* op, Kernel kernel,
                  const AttentionArgs& sizes, int64_t resident, const Maps& maps,
                  const Args& args) {
  const int64_t slots = attention_slots(sizes.total_tokens, sizes.num_seqs, Shape::kRows);
  const int heads = heads_per_block(slots, sizes.heads, resident);
  allow_shared_memory(op, kernel, Shape::kBytes);
  const dim3 grid(static_cast<uint32_t>(slots),
                  static_cast<uint32_t>(ceil_div(sizes.heads, heads)));
  kernel<<<grid, Shape::kThreads, Shape::kBytes, launcher.stream()>>>(maps, args, heads);
  Launcher::check_launch(op);
}

// Needs choose_attention(attention_case(...)) == kLocalSm90, out and lse in call.args, and at least
// one token and head.
void local_attention_sm90_fwd(const Launcher& launcher, const AttentionCall& call);

// Needs choose_attention_bwd(attention_case(...)) == kLocalSm90, of aligned gradients, too. `delta`
// is not used.
void local_attention_sm90_bwd(const Launcher& launcher, const AttentionCall& call,
                              const AttentionGradArgs& grads);

// Needs choose_attention_bwd(attention_case(...)) == kLocalStreamSm90, of aligned gradients, and
// `delta`.
void local_attention_stream_sm90_bwd(const Launcher& launcher, const AttentionCall& call,
                                     const AttentionGradArgs& grads);

// Needs choose_attention(attention_case(...)) == kGlobalSm90. `like` says where workspaces go.
void global_attention_sm90_fwd(const Launcher& launcher, const AttentionCall& call,
                               const Tensor& like);

// Needs choose_attention_bwd(attention_case(...)) == kGlobalSm90, of aligned gradients, and
// `delta`.
void global_attention_sm90_bwd(const Launcher& launcher, const AttentionCall& call,
                               const AttentionGradArgs& grads, const Tensor& like);

}  // namespace fastenc::cuda
