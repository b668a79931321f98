// Scores of words against labels on NVIDIA GPUs from sm_80, backward; token_score_bwd.cuh says in
// which steps.
//
// Floor: 6 R D FLOPs a pair, three products and none of them twice. Bytes: dY and dX are written
// once and read three and two times, 8 R + 12 D a pair in 16 bits, from L2 while a pass fits it.
// Prediction, 384 words, 25 labels, D = 512: 60 GFLOP, floor 76 us on an H200; the products at a
// third of wgmma's rate take 240 us, and the sums over words, whose few blocks do not keep enough
// bytes in flight, some 40 us.
// Has not run on a GPU: tests/test_cuda_token_model.py runs the sources on the CPU.
#include <algorithm>
#include <tuple>

#include "token_problem.cuh"
#include "token_score_bwd.cuh"

namespace fastenc::cuda {
namespace {

// What the passes add to, in fp32, and what they write.
struct TokenGrads {
  Tensor token, token_factor;                // the call's dtype
  Tensor label, label_factor, weight, sums;  // fp32; sums: dout_weight and dout_bias, (3, size + 1)
};

template <typename T, int V, typename In, bool kFactor>
void sum_rows(const Launcher& launcher, const char* op, const TokenArgs& a, const TokenPass& pass,
              const In* rows, int32_t columns, T* of_words, float* of_labels) {
  if (columns == 0) {
    return;
  }
  const int64_t blocks = ceil_div(columns, int64_t{V} * kTokenSumThreads);
  launch_kernel(launcher, op, token_labels_sum_kernel<T, V, In, kFactor>,
                dim3(pass.last - pass.first, blocks), kTokenSumThreads, 0, a, pass, rows, columns,
                of_words);
  launch_kernel(launcher, op, token_words_sum_kernel<T, V, In, kFactor>,
                dim3(int64_t{a.num_seqs} * a.labels, blocks), kTokenSumThreads, 0, a, pass, rows,
                columns, of_labels);
}

template <typename T, int V>
void run_pass(const Launcher& launcher, const char* op, const TokenCall& call,
              const TokenPass& pass, const T* grad, float* parts, const TokenGrads& grads) {
  const TokenArgs& a = call.args;
  const int64_t pairs = int64_t{pass.last - pass.first} * a.labels;
  const int64_t tiles = ceil_div(pairs, kTokenRows), elements = grads.sums.numel();
  launch_kernel(launcher, op, token_hidden_bwd_kernel<T, V>, dim3(tiles, call.chunks()),
                kTokenThreads, kTokenHiddenBytes<T>, a, pass, grad, parts);
  launch_kernel(launcher, op, token_parts_sum_kernel, dim3(ceil_div(elements, kTokenThreads)),
                kTokenThreads, 0, parts, kPartsOfTile * tiles, elements,
                mutable_data<float>(grads.sums));
  if (a.factors > 0) {
    launch_kernel(launcher, op, token_factors_bwd_kernel<T, V>,
                  dim3(tiles, ceil_div(a.factors, kTokenColumns)), kTokenThreads,
                  kTokenFactorBytes<T>, a, pass);
  }
  if (grads.weight.numel() > 0) {
    launch_kernel(launcher, op, token_weight_bwd_kernel<T, V>,
                  dim3(ceil_div(a.size, kTokenRows), ceil_div(a.factors, kTokenDepth)),
                  kTokenThreads, kTokenWeightBytes<T>, a, pass, mutable_data<float>(grads.weight));
  }
  sum_rows<T, V, T, false>(launcher, op, a, pass, static_cast<const T*>(pass.dhidden), a.size,
                           mutable_data<T>(grads.token), mutable_data<float>(grads.label));
  sum_rows<T, V, float, true>(launcher, op, a, pass, pass.dfactors, a.factors,
                              mutable_data<T>(grads.token_factor),
                              mutable_data<float>(grads.label_factor));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_score_bwd(
    Tensor grad_in, Tensor token, Tensor label, Tensor token_factor, Tensor label_factor,
    Tensor weight, Tensor out_weight, Tensor cu_words, double dropout_p,
    std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("token_score_bwd");
  const Launcher launcher(token);
  TokenCall call = token_call(token, label, token_factor, label_factor, weight, out_weight,
                              cu_words, std::nullopt);
  take_dropout(&call.tensors, &call.args, dropout_p, seed, token);
  const TokenArgs& a = call.args;
  const Tensor grad =
      dense(take_rows(&call.tensors, "grad", grad_in, token, {a.words, a.labels, kTokenOutputs}));
  const auto zeros = [&](std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_zeros(token, shape, dtype);
  };
  const auto empty = [&](std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(token, shape, dtype);
  };
  const bool some = call.pairs() > 0;
  const ScalarType fp32 = ScalarType::Float;
  const TokenGrads grads{
      .token = some ? empty({a.words, a.size}, call.dtype) : zeros({a.words, a.size}, call.dtype),
      .token_factor =
          some ? empty({a.words, a.factors}, call.dtype) : zeros({a.words, a.factors}, call.dtype),
      .label = zeros({a.num_seqs, a.labels, a.size}, fp32),
      .label_factor = zeros({a.num_seqs, a.labels, a.factors}, fp32),
      .weight = zeros({a.size, a.factors}, fp32),
      .sums = zeros({kTokenOutputs, a.size + 1}, fp32)};
  const int64_t words = words_of_pass(a.words, a.labels, a.size), most = words * a.labels;
  if (some) {
    const Tensor dhidden = empty({most, a.size}, call.dtype);
    const Tensor dfactors = empty({most, a.factors}, fp32);
    const Tensor parts = empty(
        {kPartsOfTile * ceil_div(most, kTokenRows), kTokenOutputs, int64_t{a.size} + 1}, fp32);
    for (int64_t first = 0; first < a.words; first += words) {
      const TokenPass pass{static_cast<int32_t>(first),
                           static_cast<int32_t>(std::min(first + words, a.words)),
                           dhidden.data_ptr(), mutable_data<float>(dfactors)};
      dispatch_tokens(call, [&](auto tag, auto width) {
        using T = typename decltype(tag)::type;
        run_pass<T, decltype(width)::value>(launcher, "token_score_bwd", call, pass, data<T>(grad),
                                            mutable_data<float>(parts), grads);
      });
    }
  }
  const auto out = [&](const Tensor& x) {
    return call.dtype == fp32 ? x : torch::stable::to(x, call.dtype);
  };
  Tensor sums = grads.sums;
  const Tensor dout_weight = dense(torch::stable::narrow(sums, 1, 0, a.size));
  const Tensor dbias =
      torch::stable::view(dense(torch::stable::narrow(sums, 1, a.size, 1)), {kTokenOutputs});
  return {grads.token,       out(grads.label), grads.token_factor, out(grads.label_factor),
          out(grads.weight), out(dout_weight), out(dbias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("token_score_bwd", TORCH_BOX(&token_score_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("token_score_bwd", TORCH_BOX(&token_score_bwd));
}

}  // namespace fastenc::cuda
