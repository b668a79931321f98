// The second kernel of the backward of packed attention, launched by varlen_attention_bwd.cu.
#include "attention_bwd.cuh"
#include "attention_dkdv.cuh"

namespace fastenc::cuda {

void launch_dkdv(const Launcher& launcher, const char* op, const AttentionCall& call,
                 const AttentionGradArgs& grads) {
  dispatch_shape(call, [&](auto tag, auto width) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = decltype(width)::value;
    launch_tiles(launcher, op, varlen_attention_dkdv_kernel<T, kWidth>,
                 call.slots() * call.args.heads, AttentionShape<sizeof(T), kWidth>::dkdv_bytes(),
                 grads);
  });
}

}  // namespace fastenc::cuda
