// Spans above a threshold on NVIDIA GPUs; fastenc/ops/span_candidates.py says what is computed.
// The number of candidates is data: the one synchronisation is for it. Has not run on a GPU:
// tests/test_cuda_span_model.py runs the sources on the CPU.
#include <tuple>

#include "span_candidates.cuh"
#include "span_problem.cuh"

namespace fastenc::cuda {
namespace {

constexpr int kCandidateLabels = 32;

template <bool kWrite>
void launch_candidates(const Launcher& launcher, const SpanCall& call,
                       const CandidateOutputs& outputs) {
  dispatch_spans(call, [&](auto tag, auto width) {
    using T = typename decltype(tag)::type;
    constexpr int V = decltype(width)::value;
    launch_spans(launcher, "span_candidates",
                 span_candidates_kernel<T, V, kCandidateLabels, kWrite>, dim3(call.row_slots()),
                 kSpanLogitBytes<kCandidateLabels, T>, call.args, outputs);
  });
}

// The first index of each row in `counts`; returns how many there are.
int64_t scan_counts(const Launcher& launcher, const Tensor& counts) {
  const Tensor total = torch::stable::new_empty(counts, {1}, ScalarType::Long);
  scan_kernel<<<1, kScanThreads, kScanThreads * sizeof(int64_t), launcher.stream()>>>(
      mutable_data<int32_t>(counts), counts.numel(), mutable_data<int64_t>(total));
  Launcher::check_launch("span_candidates");
  int64_t found = 0;
  Launcher::check("span_candidates", cudaMemcpyAsync(&found, total.data_ptr(), sizeof(found),
                                                     cudaMemcpyDeviceToHost, launcher.stream()));
  Launcher::check("span_candidates", cudaStreamSynchronize(launcher.stream()));
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> span_candidates_fwd(Tensor start, Tensor end,
                                                               Tensor labels, Tensor cu_words,
                                                               int64_t max_width, double threshold,
                                                               std::optional<Tensor> label_bias) {
  FASTENC_COUNT_LAUNCH("span_candidates");
  const Launcher launcher(start);
  const int64_t widest = smaller(max_width, larger(1, start.size(0)));
  SpanCall call = span_call(start, end, cu_words, widest);
  set_labels(&call, labels, label_bias, start);
  CandidateOutputs outputs{};
  outputs.threshold = static_cast<float>(threshold);
  const Tensor counts = torch::stable::new_empty(start, {call.rows()}, ScalarType::Int);
  outputs.counts = mutable_data<int32_t>(counts);
  int64_t found = 0;
  if (call.rows() > 0 && call.args.label_count > 0) {
    launch_candidates<false>(launcher, call, outputs);
    found = scan_counts(launcher, counts);
    STD_TORCH_CHECK(found <= kInt32Max, "span_candidates: ", found, " candidates are too many");
  }
  Tensor word = torch::stable::new_empty(start, {found}, ScalarType::Long);
  Tensor width = torch::stable::new_empty(start, {found}, ScalarType::Long);
  Tensor label = torch::stable::new_empty(start, {found}, ScalarType::Long);
  Tensor score = torch::stable::new_empty(start, {found}, ScalarType::Float);
  if (found > 0) {
    outputs.word = mutable_data<int64_t>(word);
    outputs.width = mutable_data<int64_t>(width);
    outputs.label = mutable_data<int64_t>(label);
    outputs.score = mutable_data<float>(score);
    launch_candidates<true>(launcher, call, outputs);
  }
  return {word, width, label, score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("span_candidates_fwd", TORCH_BOX(&span_candidates_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("span_candidates_fwd", TORCH_BOX(&span_candidates_fwd));
}

}  // namespace fastenc::cuda
