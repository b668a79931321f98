// Windowed attention on Hopper, backward where a tile and its halo do not fit into shared memory
// together (local_attention_bwd_sm90.cu serves the rest): choose, launch. Device code:
// local_attention_stream_bwd_sm90.cuh.
//
// A block keeps q, k, v and grad_out of 128 rows; the rows in their reach stream by in blocks of
// 64, first k and v for grad_q, then q and grad_out for grad_k and grad_v. So each gradient is a
// sum in one warpgroup's registers, without atomics, the same bits twice, and the rotation is
// undone on the way out. Of the producer warpgroup one thread loads, four pairs and the next head's
// tile ahead, and three warps rotate what came and clear what is not of the sequence: the two
// consumer warpgroups wait for neither. delta comes from a row kernel before.
//
// Scores are made twice, once a side: 7 products of the 64 + 2 reach columns that the blocks hold,
// where 5 would do if dq could be shared between blocks, and in exchange nothing is.
//
// Floor, head_dim 64, reach 128, a token-head: 1024 bytes (q, k, v, out, grad_out; dq, dk, dv) and
// 128 more for grad_out in the row kernel, at 4.3 TB/s: 0.27 ns. Products: 7 x 320 x 64 x 2 =
// 287 kFLOP, 0.36 ns at 790 TFLOP/s. Other work on the SM's 640 weights a token-head: exponentials
// at 16 a clock, some ten instructions each at 128 a clock: 0.4 ns, beside the products of the
// other warpgroup. From L2: 4 operands x 3 times = 1536 bytes. 196 KB of shared memory: one block
// an SM, 384 threads, 72 registers a producer's and 216 a consumer's. Prediction: 0.55 ns. Has not
// run on a GPU: tests/test_cuda_local_attention_sm90.py runs the device code on the CPU, and judges
// what it compiles to.
#include "attention_sm90.cuh"
#include "local_attention_stream_bwd_sm90.cuh"
#include "sm90/tensor_map.cuh"

namespace fastenc::cuda {
namespace {

using namespace sm90;

template <typename T, int kHeadDim>
void launch(const Launcher& launcher, const AttentionGradArgs& grads) {
  using Shape = LocalStreamShape<kHeadDim>;
  const AttentionArgs& args = grads.forward;
  constexpr auto kKernel = local_attention_stream_bwd_sm90<T, kHeadDim>;
  const GradMaps maps{rows_map<T>(args.q, args), rows_map<T>(args.k, args),
                      rows_map<T>(args.v, args), rows_map<T>(grads.grad_out, args)};
  attention_delta_sm90<T, kHeadDim>
      <<<rotate_blocks(args.total_tokens * args.heads), kRotateThreads, 0, launcher.stream()>>>(
          grads);
  launch_tiles<Shape>(launcher, "local attention backward", kKernel, args, launcher.sm_count(),
                      maps, grads);
}

template <typename T>
void launch(const Launcher& launcher, const AttentionGradArgs& grads, int64_t head_dim) {
  switch (head_dim) {
    case 64:
      return launch<T, 64>(launcher, grads);
    default:
      STD_TORCH_CHECK(false, "local attention backward in a stream: no kernel for head_dim ",
                      head_dim);
  }
}

}  // namespace

void local_attention_stream_sm90_bwd(const Launcher& launcher, const AttentionCall& call,
                                     const AttentionGradArgs& grads) {
  const int64_t head_dim = grads.forward.head_dim;
  call.dtype == ScalarType::BFloat16 ? launch<bf16>(launcher, grads, head_dim)
                                     : launch<fp16>(launcher, grads, head_dim);
}

}  // namespace fastenc::cuda
