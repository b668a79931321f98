// Scores of spans against labels on NVIDIA GPUs, backward. Has not run on a GPU:
// tests/test_cuda_span_model.py runs the sources on the CPU.
#include <tuple>

#include "span_problem.cuh"
#include "span_score_bwd.cuh"

namespace fastenc::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> span_score_bwd(Tensor grad_in, Tensor start, Tensor end,
                                                          Tensor labels, Tensor cu_words,
                                                          int64_t max_width, double dropout_p,
                                                          std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("span_score_bwd");
  const char* op = "span_score_bwd";
  const Launcher launcher(start);
  SpanCall call = span_call(start, end, cu_words, max_width);
  set_labels(&call, labels, std::nullopt, start);
  set_span_dropout(&call, dropout_p, seed, start);
  const SpanArgs& a = call.args;
  const Tensor grad =
      dense(span_tensor(&call, "grad", grad_in, start, {a.words, a.max_width, a.label_count}));
  Tensor dstart = torch::stable::new_empty(start, {a.words, a.size});
  Tensor dend = torch::stable::new_empty(start, {a.words, a.size});
  Tensor dlabels = torch::stable::new_empty(start, {a.num_seqs, a.label_count, a.size});
  Tensor dbias = torch::stable::new_empty(start, {a.num_seqs, a.label_count});
  // At least one chunk: the bias has a gradient even where R is 0.
  const int64_t chunks = larger(1, ceil_div(a.size, kSpanChunk));
  STD_TORCH_CHECK(chunks <= kGridY, "start: expected at most ", kGridY * kSpanChunk,
                  " columns, got ", a.size);
  const int words = words_of_tile(a.max_width);
  const int64_t slots = attention_slots(a.words, a.num_seqs, words);
  dispatch_spans(call, [&](auto tag, auto width) {
    using T = typename decltype(tag)::type;
    constexpr int V = decltype(width)::value;
    if (dstart.numel() > 0) {
      launch_spans(launcher, op, span_words_bwd_kernel<T, V, false>, dim3(slots, chunks),
                   kSpanWordBytes<T>, a, data<T>(grad), mutable_data<T>(dstart), words);
      launch_spans(launcher, op, span_words_bwd_kernel<T, V, true>, dim3(slots, chunks),
                   kSpanWordBytes<T>, a, data<T>(grad), mutable_data<T>(dend), words);
    }
    if (dbias.numel() > 0) {
      const int64_t blocks = ceil_div(a.label_count, kSpanRows);
      launch_spans(launcher, op, span_labels_bwd_kernel<T, V>, dim3(a.num_seqs, chunks, blocks),
                   kSpanLabelBytes<T>, a, data<T>(grad), mutable_data<T>(dlabels),
                   mutable_data<T>(dbias));
    }
  });
  return {dstart, dend, dlabels, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("span_score_bwd", TORCH_BOX(&span_score_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("span_score_bwd", TORCH_BOX(&span_score_bwd));
}

}  // namespace fastenc::cuda
