// Windowed attention on Hopper, backward where a tile and its halo fit into shared memory together
// (local_attention_stream_bwd_sm90.cu serves the rest): choose, launch. Device code:
// local_attention_bwd_sm90.cuh.
//
// A block owns 128 rows of a sequence, as queries and as keys, and brings q, k, v and grad_out of
// these rows and of those in their reach: so each gradient is a sum in one warpgroup's registers,
// without atomics, the same bits twice, and the rotation is undone on the way out. Scores are made
// twice, once a side: 7 products of 64 + 2 reach columns where 5 would do if dq could be shared
// between blocks, and in exchange nothing is.
//
// Floor, bf16, head_dim 64: 1024 bytes a token-head (q, k, v, out, grad_out; dq, dk, dv) at
// 4.3 TB/s: 0.24 ns. Products: 7 x 192 x 64 x 2 = 172 kFLOP, 0.22 ns at 790 TFLOP/s. One block an
// SM (160 KB), so that loads and rotations are not overlapped with products: prediction 0.5 ns.
// Has not run on a GPU: tests/test_cuda_local_attention_sm90.py runs the device code on the CPU,
// and judges what it compiles to.
#include "attention_sm90.cuh"
#include "local_attention_bwd_sm90.cuh"
#include "sm90/tensor_map.cuh"

namespace fastenc::cuda {
namespace {

using namespace sm90;

template <typename T, int kHeadDim, int kReach>
void launch(const Launcher& launcher, const AttentionGradArgs& grads) {
  using Shape = LocalGradShape<kHeadDim, kReach>;
  const AttentionArgs& args = grads.forward;
  constexpr auto kKernel = local_attention_bwd_sm90<T, kHeadDim, kReach>;
  const GradMaps maps{rows_map<T>(args.q, args), rows_map<T>(args.k, args),
                      rows_map<T>(args.v, args), rows_map<T>(grads.grad_out, args)};
  launch_tiles<Shape>(launcher, "local attention backward", kKernel, args, launcher.sm_count(),
                      maps, grads);
}

template <typename T>
void launch(const Launcher& launcher, const AttentionGradArgs& grads, int reach) {
  switch (grads.forward.head_dim * 1000 + reach) {
    case 32064:
      return launch<T, 32, 64>(launcher, grads);
    case 32128:
      return launch<T, 32, 128>(launcher, grads);
    case 64064:
      return launch<T, 64, 64>(launcher, grads);
    default:
      STD_TORCH_CHECK(false, "local attention backward: no kernel for head_dim ",
                      grads.forward.head_dim, " and windows up to ", reach);
  }
}

}  // namespace

void local_attention_sm90_bwd(const Launcher& launcher, const AttentionCall& call,
                              const AttentionGradArgs& grads) {
  const int reach = local_reach(attention_case(launcher, call));
  call.dtype == ScalarType::BFloat16 ? launch<bf16>(launcher, grads, reach)
                                     : launch<fp16>(launcher, grads, reach);
}

}  // namespace fastenc::cuda
