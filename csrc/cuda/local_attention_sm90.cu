// Windowed attention on Hopper, forward: check, choose, launch. Device code:
// local_attention_sm90.cuh; what is computed: fastenc/ops/varlen_attention.py and
// rope_varlen_attention.py.
//
// A block takes 128 queries of one sequence and the keys in their reach, all in shared memory at
// once, and walks the heads: TMA brings queries, keys and values (those of the next head while this
// head's weights are made), q and k are rotated where they lie, cos and sin being read once for all
// heads. Each of two warpgroups multiplies its 64 queries by only the 64 + 2 reach keys that they
// can see; whole rows of scores are in registers, so softmax is one pass without rescaling, and the
// weights go from registers into the second product. The middle keys of a tile need no mask.
//
// Floor, bf16, head_dim 64: 512 bytes a token-head (q, k, v, out) at 4.3 TB/s: 0.119 ns. Products:
// 2 x 192 keys x 64 x 2 = 49 kFLOP a token-head, 0.062 ns at 790 TFLOP/s; exponentials: 192 at 16 a
// clock and SM, 0.05 ns. Shared memory is 112 KB, so that two blocks of an SM overlap one's
// products with the other's softmax. Has not run on a GPU: tests/test_cuda_local_attention_sm90.py
// runs this device code on the CPU, and judges what it compiles to.
#include "attention_sm90.cuh"
#include "local_attention_sm90.cuh"
#include "sm90/tensor_map.cuh"

namespace fastenc::cuda {
namespace {

using namespace sm90;

template <typename T, int kHeadDim, int kReach>
void launch(const Launcher& launcher, const AttentionCall& call) {
  using Shape = LocalShape<kHeadDim, kReach>;
  const AttentionArgs& args = call.args;
  constexpr auto kKernel = local_attention_fwd_sm90<T, kHeadDim, kReach>;
  const LocalAttentionMaps maps{rows_map<T>(args.q, args), rows_map<T>(args.k, args),
                                rows_map<T>(args.v, args)};
  launch_tiles<Shape>(launcher, "local attention", kKernel, args,
                      launcher.sm_count() * Shape::kBlocksPerSm, maps, args);
}

template <typename T>
void launch(const Launcher& launcher, const AttentionCall& call, int reach) {
  switch (call.args.head_dim * 1000 + reach) {
    case 32064:
      return launch<T, 32, 64>(launcher, call);
    case 32128:
      return launch<T, 32, 128>(launcher, call);
    case 64064:
      return launch<T, 64, 64>(launcher, call);
    case 64128:
      return launch<T, 64, 128>(launcher, call);
    case 128064:
      return launch<T, 128, 64>(launcher, call);
    default:
      STD_TORCH_CHECK(false, "local attention: no kernel for head_dim ", call.args.head_dim,
                      " and windows up to ", reach);
  }
}

}  // namespace

void local_attention_sm90_fwd(const Launcher& launcher, const AttentionCall& call) {
  const int reach = local_reach(attention_case(launcher, call));
  call.dtype == ScalarType::BFloat16 ? launch<bf16>(launcher, call, reach)
                                     : launch<fp16>(launcher, call, reach);
}

}  // namespace fastenc::cuda
