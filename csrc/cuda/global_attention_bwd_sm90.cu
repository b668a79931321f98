// Attention without a window on Hopper, backward: choose, launch. Device code:
// global_attention_bwd_sm90.cuh.
//
// Row kernels first: delta, and q and k rotated. Then two walks over the same work items as the
// forward's, one for grad_q, one for grad_k and grad_v; a producer thread streams blocks of 64 rows
// past two consumer warpgroups of 64 rows each. Scores are made twice, 7 products where 5 would do
// if blocks added to grad_q in memory: no atomics, and the same bits twice.
//
// Floor: 14 x length x head_dim FLOP a token-head at 790 TFLOP/s, bf16, head_dim 64: 0.58 ns at
// length 512, 9.3 ns at 8192. Prediction: a third of that rate, as a block's products and its
// weights overlap only across the two warpgroups. Has not run on a GPU:
// tests/test_cuda_global_attention_sm90.py runs the device code on the CPU, and judges what it
// compiles to.
#include "attention_sm90.cuh"
#include "global_attention_bwd_sm90.cuh"
#include "sm90/tensor_map.cuh"

namespace fastenc::cuda {
namespace {

using namespace sm90;

template <typename T, int kHeadDim, bool kOfKeys>
void launch_walk(const Launcher& launcher, const AttentionGradArgs& grads, const TileOrder& order,
                 const GlobalGradMaps& maps) {
  using Shape = GlobalGradShape<kHeadDim>;
  const AttentionArgs& args = grads.forward;
  constexpr auto kKernel = global_attention_bwd_sm90<T, kHeadDim, kOfKeys>;
  allow_shared_memory("global attention backward", kKernel, Shape::kBytes);
  const int64_t most = attention_slots(args.total_tokens, args.num_seqs, Shape::kRows) * args.heads;
  const auto blocks = static_cast<uint32_t>(smaller(launcher.sm_count(), most));
  kKernel<<<blocks, Shape::kThreads, Shape::kBytes, launcher.stream()>>>(maps, grads, order);
  Launcher::check_launch("global attention backward");
}

template <typename T, int kHeadDim>
void launch(const Launcher& launcher, AttentionGradArgs grads, const Tensor& like) {
  using Shape = GlobalGradShape<kHeadDim>;
  AttentionArgs& args = grads.forward;
  const Tensor order_memory =
      torch::stable::new_empty(like, {int64_t{2} * args.num_seqs + 1}, ScalarType::Int);
  int32_t* sequence = mutable_data<int32_t>(order_memory);
  const TileOrder order{sequence, sequence + args.num_seqs};
  attention_order_sm90<Shape::kRows>
      <<<1, kOrderThreads, kOrderThreads * sizeof(int32_t), launcher.stream()>>>(
          args.cu_seqlens, args.num_seqs, order);
  const int64_t rows = args.total_tokens * args.heads;
  attention_delta_sm90<T, kHeadDim>
      <<<rotate_blocks(rows), kRotateThreads, 0, launcher.stream()>>>(grads);
  Tensor q = order_memory, k = order_memory;
  if (args.cos.data != nullptr) {
    q = torch::stable::new_empty(like, {args.total_tokens, args.heads, args.head_dim});
    k = torch::stable::new_empty(like, {args.total_tokens, args.heads, args.head_dim});
    const uint32_t blocks = rotate_blocks(rows * (kHeadDim / 16));
    rotate_rows_sm90<T, kHeadDim>
        <<<blocks, kRotateThreads, 0, launcher.stream()>>>(args, args.q, mutable_data<T>(q));
    rotate_rows_sm90<T, kHeadDim>
        <<<blocks, kRotateThreads, 0, launcher.stream()>>>(args, args.k, mutable_data<T>(k));
    args.q = head_rows(q);
    args.k = head_rows(k);
  }
  Launcher::check_launch("global attention backward");
  const CUtensorMap maps[4] = {rows_map<T>(args.q, args), rows_map<T>(args.k, args),
                               rows_map<T>(args.v, args), rows_map<T>(grads.grad_out, args)};
  launch_walk<T, kHeadDim, false>(launcher, grads, order, {maps[0], maps[3], maps[1], maps[2]});
  launch_walk<T, kHeadDim, true>(launcher, grads, order, {maps[1], maps[2], maps[0], maps[3]});
}

template <typename T>
void launch(const Launcher& launcher, const AttentionGradArgs& grads, const Tensor& like) {
  switch (grads.forward.head_dim) {
    case 32:
      return launch<T, 32>(launcher, grads, like);
    case 64:
      return launch<T, 64>(launcher, grads, like);
    case 128:
      return launch<T, 128>(launcher, grads, like);
    default:
      STD_TORCH_CHECK(false, "global attention backward: no kernel for head_dim ",
                      grads.forward.head_dim);
  }
}

}  // namespace

void global_attention_sm90_bwd(const Launcher& launcher, const AttentionCall& call,
                               const AttentionGradArgs& grads, const Tensor& like) {
  call.dtype == ScalarType::BFloat16 ? launch<bf16>(launcher, grads, like)
                                     : launch<fp16>(launcher, grads, like);
}

}  // namespace fastenc::cuda
