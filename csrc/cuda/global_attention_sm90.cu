// Attention without a window on Hopper, forward: choose, launch. Device code:
// global_attention_sm90.cuh.
//
// A producer thread brings blocks of 128 keys and values through a ring in shared memory; two
// consumer warpgroups of 64 queries multiply, the next block's scores under way while this block's
// weights are made. One block an SM walks (sequence, head, tile) items, the longest sequences
// first, their order made on the device. Queries are rotated where they lie, once a tile; keys are
// rotated by a kernel before, once for all tiles.
//
// Floor: 4 x length x head_dim FLOP a token-head at 790 TFLOP/s, bf16, head_dim 64: 0.17 ns at
// length 512, 2.7 ns at 8192; exponentials, 16 a clock and SM: 0.14 ns and 2.2 ns. Prediction from
// the design (FlashAttention-3's): 60% of it at 8192, less at 512 where the first block's scores
// and the last block's outputs are not overlapped. ptxas 13.0 moved the wait for the outputs to
// before the weights, of whose 66 exponentials a block none ran beside the products;
// wgmma_wait_after holds it: now all do. Has not run on a GPU:
// tests/test_cuda_global_attention_sm90.py runs the device code on the CPU, and judges what it
// compiles to.
#include "attention_sm90.cuh"
#include "global_attention_sm90.cuh"
#include "sm90/tensor_map.cuh"

namespace fastenc::cuda {
namespace {

using namespace sm90;

template <typename T, int kHeadDim>
void launch(const Launcher& launcher, const AttentionCall& call, const Tensor& like) {
  using Shape = GlobalShape<kHeadDim>;
  AttentionArgs args = call.args;
  const int64_t entries = int64_t{2} * args.num_seqs + 1;
  const Tensor order_memory = torch::stable::new_empty(like, {entries}, ScalarType::Int);
  int32_t* sequence = mutable_data<int32_t>(order_memory);
  const TileOrder order{sequence, sequence + args.num_seqs};
  attention_order_sm90<Shape::kRows>
      <<<1, kOrderThreads, kOrderThreads * sizeof(int32_t), launcher.stream()>>>(
          args.cu_seqlens, args.num_seqs, order);
  Launcher::check_launch("global attention");
  Tensor keys = order_memory;
  if (args.cos.data != nullptr) {
    keys = torch::stable::new_empty(like, {args.total_tokens, args.heads, args.head_dim});
    const int64_t items = args.total_tokens * args.heads * (kHeadDim / 16);
    rotate_rows_sm90<T, kHeadDim><<<rotate_blocks(items), kRotateThreads, 0, launcher.stream()>>>(
        args, args.k, mutable_data<T>(keys));
    Launcher::check_launch("global attention");
    args.k = head_rows(keys);
  }
  const GlobalAttentionMaps maps{rows_map<T>(args.q, args), rows_map<T>(args.k, args),
                                 rows_map<T>(args.v, args)};
  constexpr auto kKernel = global_attention_fwd_sm90<T, kHeadDim>;
  allow_shared_memory("global attention", kKernel, Shape::kBytes);
  const int64_t most = attention_slots(args.total_tokens, args.num_seqs, Shape::kRows) * args.heads;
  const auto blocks = static_cast<uint32_t>(smaller(launcher.sm_count(), most));
  kKernel<<<blocks, Shape::kThreads, Shape::kBytes, launcher.stream()>>>(maps, args, order);
  Launcher::check_launch("global attention");
}

template <typename T>
void launch(const Launcher& launcher, const AttentionCall& call, const Tensor& like) {
  switch (call.args.head_dim) {
    case 32:
      return launch<T, 32>(launcher, call, like);
    case 64:
      return launch<T, 64>(launcher, call, like);
    case 128:
      return launch<T, 128>(launcher, call, like);
    default:
      STD_TORCH_CHECK(false, "global attention: no kernel for head_dim ", call.args.head_dim);
  }
}

}  // namespace

void global_attention_sm90_fwd(const Launcher& launcher, const AttentionCall& call,
                               const Tensor& like) {
  call.dtype == ScalarType::BFloat16 ? launch<bf16>(launcher, call, like)
                                     : launch<fp16>(launcher, call, like);
}

}  // namespace fastenc::cuda
