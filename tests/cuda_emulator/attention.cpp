// The attention kernels, for every dtype and padded width, behind one plain C function each.
#include "csrc/cuda/attention_dkdv.cuh"
#include "csrc/cuda/attention_fwd.cuh"

using namespace fastenc;
using namespace fastenc::cuda;

namespace {

template <typename F>
void for_width(int head_dim, F&& f) {
  if (head_dim <= 32) {
    f(Width<32>{});
  } else if (head_dim <= 64) {
    f(Width<64>{});
  } else if (head_dim <= 96) {
    f(Width<96>{});
  } else {
    f(Width<128>{});
  }
}

template <typename F>
void for_dtype(int dtype, F&& f) {
  dtype == 0 ? f(float{}) : dtype == 1 ? f(bf16{}) : f(fp16{});
}

}  // namespace

extern "C" {

int64_t bank_conflicts() { return emulator::machine().conflicts; }

void attention_fwd(int dtype, const AttentionArgs* args, int backwards) {
  for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    for_width(args->head_dim, [&](auto width) {
      using Shape = AttentionShape<sizeof(T), decltype(width)::value>;
      const auto slots = attention_slots(args->total_tokens, args->num_seqs, kAttentionRows);
      emulator::launch(
          {static_cast<uint32_t>(slots * args->heads)}, {kAttentionThreads}, Shape::forward_bytes(),
          [&] { varlen_attention_fwd_kernel<T, decltype(width)::value>(*args); }, backwards);
    });
  });
}

void attention_bwd(int dtype, const AttentionGradArgs* grads, int backwards) {
  const AttentionArgs& args = grads->forward;
  for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    for_width(args.head_dim, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      using Shape = AttentionShape<sizeof(T), kWidth>;
      const auto slots = attention_slots(args.total_tokens, args.num_seqs, kAttentionRows);
      const dim3 grid{static_cast<uint32_t>(slots * args.heads)}, block{kAttentionThreads};
      const int bias = grads->bias_partials ? Shape::bias_bytes(args.bias_radius) : 0;
      emulator::launch(
          grid, block, Shape::dq_bytes() + bias,
          [&] { varlen_attention_dq_kernel<T, kWidth>(*grads); }, backwards);
      emulator::launch(
          grid, block, Shape::dkdv_bytes(),
          [&] { varlen_attention_dkdv_kernel<T, kWidth>(*grads); }, backwards);
    });
  });
}

void bias_grad(const float* partials, float* out, int64_t slots, int64_t entries) {
  emulator::launch({static_cast<uint32_t>(ceil_div(entries, kWarp))}, {kWarp * kBiasSlices},
                   kWarp * kBiasSlices * 4,
                   [&] { bias_grad_kernel<float>(partials, out, slots, entries); });
}

int64_t grad_args_size() { return sizeof(AttentionGradArgs); }
int64_t args_size() { return sizeof(AttentionArgs); }
}
