// Scores of spans against labels on NVIDIA GPUs, forward; fastenc/ops/span_score.py says what is
// computed. Has not run on a GPU: tests/test_cuda_span_model.py runs the sources on the CPU.
#include "span_problem.cuh"
#include "span_score.cuh"

namespace fastenc::cuda {
namespace {

Tensor span_score_fwd(Tensor start, Tensor end, Tensor labels, Tensor cu_words, int64_t max_width,
                      std::optional<Tensor> label_bias, double dropout_p,
                      std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("span_score");
  const Launcher launcher(start);
  SpanCall call = span_call(start, end, cu_words, max_width);
  set_labels(&call, labels, label_bias, start);
  set_span_dropout(&call, dropout_p, seed, start);
  const SpanArgs& a = call.args;
  Tensor out = torch::stable::new_empty(start, {a.words, a.max_width, a.label_count});
  if (out.numel() == 0) {
    return out;
  }
  dispatch_spans(call, [&](auto tag, auto width) {
    using T = typename decltype(tag)::type;
    constexpr int V = decltype(width)::value;
    const auto launch = [&](auto columns) {
      constexpr int kLabels = decltype(columns)::value;
      const dim3 grid(call.row_slots(), ceil_div(a.label_count, kLabels));
      launch_spans(launcher, "span_score", span_score_fwd_kernel<T, V, kLabels>, grid,
                   kSpanLogitBytes<kLabels, T>, a, mutable_data<T>(out));
    };
    a.label_count <= 32 ? launch(Width<32>{}) : launch(Width<64>{});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("span_score_fwd", TORCH_BOX(&span_score_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("span_score_fwd", TORCH_BOX(&span_score_fwd));
}

}  // namespace fastenc::cuda
