// The second kernel of the backward of packed attention, launched by varlen_attention_bwd.cu.
#include "attention_bwd.cuh"
#include "attention_dkdv.cuh"

namespace fastenc::cuda {

void launch_dkdv(const Launcher& launcher, const char* op, const AttentionCall& call,
                 const AttentionGradArgs& grads) {
  const AttentionArgs& a = grads.forward;
  dispatch_dtype("q", call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_head_dim(a.head_dim, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch_tiles(launcher, op, varlen_attention_dkdv_kernel<T, kWidth>, call.slots() * a.heads,
                   AttentionShape<sizeof(T), kWidth>::dkdv_bytes(), grads);
    });
  });
}

}  // namespace fastenc::cuda
