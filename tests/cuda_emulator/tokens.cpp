// The kernels of token_score, for every dtype and vector width, behind plain C functions.
#include "csrc/cuda/token_score.cuh"
#include "csrc/cuda/token_score_bwd.cuh"

using namespace fastenc;
using namespace fastenc::cuda;

namespace {

// f(T{}, Width<V>{})
template <typename F>
void dispatch(int dtype, int vectors, F&& f) {
  const auto of = [&](auto tag) {
    using T = decltype(tag);
    vectors ? f(tag, Width<kVector<T>>{}) : f(tag, Width<1>{});
  };
  dtype == 0 ? of(float{}) : dtype == 1 ? of(bf16{}) : of(fp16{});
}

uint32_t blocks_of(int64_t n, int64_t size) { return static_cast<uint32_t>(ceil_div(n, size)); }

template <typename T, int V, typename In, bool kFactor>
void sum_rows(const TokenArgs& a, const TokenPass& pass, const In* rows, int columns, T* of_words,
              float* of_labels) {
  const uint32_t blocks = blocks_of(columns, V * kTokenSumThreads);
  emulator::launch(
      {static_cast<uint32_t>(pass.last - pass.first), blocks}, {kTokenSumThreads}, 0,
      [&] { token_labels_sum_kernel<T, V, In, kFactor>(a, pass, rows, columns, of_words); });
  emulator::launch(
      {static_cast<uint32_t>(a.num_seqs * a.labels), blocks}, {kTokenSumThreads}, 0,
      [&] { token_words_sum_kernel<T, V, In, kFactor>(a, pass, rows, columns, of_labels); });
}

}  // namespace

extern "C" {

int64_t args_size() { return sizeof(TokenArgs); }
int64_t chunks_of(int64_t size) { return ceil_div(size, kTokenColumns); }
int64_t parts_of(int64_t pairs) { return kPartsOfTile * ceil_div(pairs, kTokenRows); }
int64_t pass_of(int64_t words, int64_t labels, int64_t size) {
  return words_of_pass(words, labels, size);
}

// parts: (chunks, pairs, 3), or null.
void score_fwd(int dtype, int vectors, const TokenArgs* args, void* out, float* parts,
               int backwards) {
  dispatch(dtype, vectors, [&](auto tag, auto width) {
    using T = decltype(tag);
    constexpr int V = decltype(width)::value;
    T* to = static_cast<T*>(out);
    const int64_t pairs = args->words * args->labels;
    const uint32_t chunks = blocks_of(args->size, kTokenColumns);
    emulator::launch(
        {blocks_of(pairs, kTokenRows), parts == nullptr ? 1 : chunks}, {kTokenThreads},
        kTokenForwardBytes<T>, [&] { token_score_fwd_kernel<T, V>(*args, to, parts); }, backwards);
    if (parts != nullptr) {
      emulator::launch({blocks_of(pairs * kTokenOutputs, kTokenThreads)}, {kTokenThreads}, 0,
                       [&] { token_score_sum_kernel<T>(*args, parts, chunks, to); });
    }
  });
}

// One pass, over the words [first, last). parts (parts_of(pairs), 3, size + 1).
void score_bwd(int dtype, int vectors, const TokenArgs* args, const TokenPass* pass,
               const void* grad, float* parts, void* dtoken, float* dlabel, void* dtoken_factor,
               float* dlabel_factor, float* dweight, float* sums, int backwards) {
  dispatch(dtype, vectors, [&](auto tag, auto width) {
    using T = decltype(tag);
    constexpr int V = decltype(width)::value;
    const int64_t pairs = static_cast<int64_t>(pass->last - pass->first) * args->labels;
    const uint32_t tiles = blocks_of(pairs, kTokenRows);
    emulator::launch(
        {tiles, blocks_of(args->size, kTokenColumns)}, {kTokenThreads}, kTokenHiddenBytes<T>,
        [&] { token_hidden_bwd_kernel<T, V>(*args, *pass, static_cast<const T*>(grad), parts); },
        backwards);
    const int64_t elements = int64_t{kTokenOutputs} * (args->size + 1);
    emulator::launch({blocks_of(elements, kTokenThreads)}, {kTokenThreads}, 0,
                     [&] { token_parts_sum_kernel(parts, kPartsOfTile * tiles, elements, sums); });
    emulator::launch(
        {tiles, blocks_of(args->factors, kTokenColumns)}, {kTokenThreads}, kTokenFactorBytes<T>,
        [&] { token_factors_bwd_kernel<T, V>(*args, *pass); }, backwards);
    emulator::launch(
        {blocks_of(args->size, kTokenRows), blocks_of(args->factors, kTokenDepth)}, {kTokenThreads},
        kTokenWeightBytes<T>, [&] { token_weight_bwd_kernel<T, V>(*args, *pass, dweight); },
        backwards);
    sum_rows<T, V, T, false>(*args, *pass, static_cast<const T*>(pass->dhidden), args->size,
                             static_cast<T*>(dtoken), dlabel);
    sum_rows<T, V, float, true>(*args, *pass, pass->dfactors, args->factors,
                                static_cast<T*>(dtoken_factor), dlabel_factor);
  });
}
}
