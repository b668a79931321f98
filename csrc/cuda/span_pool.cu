// Span pooling on NVIDIA GPUs; fastenc/ops/span_pool.py says what is computed. Floor: words K R
// elements written (forward) or read (backward) at copy bandwidth. Has not run on a GPU:
// tests/test_cuda_span_model.py runs the sources on the CPU.
#include <tuple>

#include "span_pool.cuh"
#include "span_problem.cuh"

namespace fastenc::cuda {
namespace {

template <typename Kernel, typename... Arguments>
void launch_pool(const Launcher& launcher, const char* op, const SpanCall& call, Kernel kernel,
                 Arguments... arguments) {
  kernel<<<static_cast<uint32_t>(call.args.words), kPoolThreads, 0, launcher.stream()>>>(
      call.args, arguments...);
  Launcher::check_launch(op);
}

Tensor span_pool_fwd(Tensor start, Tensor end, Tensor cu_words, int64_t max_width) {
  FASTENC_COUNT_LAUNCH("span_pool");
  const Launcher launcher(start);
  SpanCall call = span_call(start, end, cu_words, max_width);
  Tensor out = torch::stable::new_empty(start, {call.args.words, max_width, call.args.size});
  call.vectors = call.vectors && address(out) % kAccessBytes == 0;
  if (out.numel() > 0) {
    dispatch_spans(call, [&](auto tag, auto width) {
      using T = typename decltype(tag)::type;
      launch_pool(launcher, "span_pool", call, span_pool_fwd_kernel<T, decltype(width)::value>,
                  mutable_data<T>(out));
    });
  }
  return out;
}

std::tuple<Tensor, Tensor> span_pool_bwd(Tensor grad_in, Tensor start, Tensor end, Tensor cu_words,
                                         int64_t max_width) {
  FASTENC_COUNT_LAUNCH("span_pool_bwd");
  const Launcher launcher(start);
  SpanCall call = span_call(start, end, cu_words, max_width);
  const Tensor grad = dense(
      span_tensor(&call, "grad", grad_in, start, {call.args.words, max_width, call.args.size}));
  Tensor dstart = torch::stable::new_empty(start, {call.args.words, call.args.size});
  Tensor dend = torch::stable::new_empty(start, {call.args.words, call.args.size});
  call.vectors =
      call.vectors && (address(grad) | address(dstart) | address(dend)) % kAccessBytes == 0;
  if (dstart.numel() > 0) {
    dispatch_spans(call, [&](auto tag, auto width) {
      using T = typename decltype(tag)::type;
      launch_pool(launcher, "span_pool_bwd", call, span_pool_bwd_kernel<T, decltype(width)::value>,
                  data<T>(grad), mutable_data<T>(dstart), mutable_data<T>(dend));
    });
  }
  return {dstart, dend};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("span_pool_fwd", TORCH_BOX(&span_pool_fwd));
  m.impl("span_pool_bwd", TORCH_BOX(&span_pool_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("span_pool_fwd", TORCH_BOX(&span_pool_fwd));
  m.impl("span_pool_bwd", TORCH_BOX(&span_pool_bwd));
}

}  // namespace fastenc::cuda
