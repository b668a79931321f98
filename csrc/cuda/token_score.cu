// Scores of words against labels on NVIDIA GPUs from sm_80 (mma.sync, cp.async, ldmatrix), forward;
// fastenc/ops/token_score.py says what is computed.
//
// Floor: 2 R D FLOPs a pair of a word and a label on the matrix units. Bytes are far below: R + D
// elements a word and a label once, R D of the weight for each tile of 128 pairs from L2, 256 FLOPs
// for each of its bytes in 16 bits.
// Prediction: a step of 128 x 128 x 64 takes 1024 clocks of an A100's tensor cores and 1660 of its
// shared memory and L1 (the weight's fragments for each warp's 16 rows, the two factors of X),
// which bounds it to 60% of mma.sync's rate: about 190 TFLOP/s there and 250 on an H200, a third of
// wgmma's. 384 words, 25 labels, D = 512: 20 GFLOP, floor 26 us on an H200, predicted 80 us.
// Has not run on a GPU: tests/test_cuda_token_model.py runs the sources on the CPU.
#include "token_problem.cuh"
#include "token_score.cuh"

namespace fastenc::cuda {
namespace {

Tensor token_score_fwd(Tensor token, Tensor label, Tensor token_factor, Tensor label_factor,
                       Tensor weight, Tensor out_weight, Tensor cu_words,
                       std::optional<Tensor> out_bias, double dropout_p,
                       std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("token_score");
  const char* op = "token_score";
  const Launcher launcher(token);
  TokenCall call =
      token_call(token, label, token_factor, label_factor, weight, out_weight, cu_words, out_bias);
  take_dropout(&call.tensors, &call.args, dropout_p, seed, token);
  const TokenArgs& a = call.args;
  Tensor out = torch::stable::new_empty(token, {a.words, a.labels, kTokenOutputs});
  if (out.numel() == 0) {
    return out;
  }
  const int64_t tiles = ceil_div(call.pairs(), kTokenRows), chunks = call.chunks();
  // Where the tiles alone leave multiprocessors idle, the columns are shared out too.
  const bool whole = chunks == 1 || tiles >= 4 * launcher.sm_count();
  Tensor parts;
  if (!whole) {
    parts =
        torch::stable::new_empty(token, {chunks, call.pairs(), kTokenOutputs}, ScalarType::Float);
  }
  dispatch_tokens(call, [&](auto tag, auto width) {
    using T = typename decltype(tag)::type;
    constexpr int V = decltype(width)::value;
    launch_kernel(launcher, op, token_score_fwd_kernel<T, V>, dim3(tiles, whole ? 1 : chunks),
                  kTokenThreads, kTokenForwardBytes<T>, a, mutable_data<T>(out),
                  whole ? nullptr : mutable_data<float>(parts));
    if (!whole) {
      launch_kernel(launcher, op, token_score_sum_kernel<T>,
                    dim3(ceil_div(out.numel(), kTokenThreads)), kTokenThreads, 0, a,
                    data<float>(parts), static_cast<int>(chunks), mutable_data<T>(out));
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("token_score_fwd", TORCH_BOX(&token_score_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("token_score_fwd", TORCH_BOX(&token_score_fwd));
}

}  // namespace fastenc::cuda
