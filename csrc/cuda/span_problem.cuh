// From the tensors of a span call to the arguments of its kernels: the checks that memory safety
// rests on.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "span_rows.cuh"

namespace fastenc::cuda {

struct SpanCall {
  SpanArgs args{};
  ScalarType dtype = ScalarType::Float;
  bool vectors = true;  // 16-byte accesses are legal for every row
  std::vector<Tensor> tensors;

  int64_t rows() const { return args.words * args.max_width; }
  int64_t row_slots() const { return attention_slots(rows(), args.num_seqs, kSpanRows); }
};

inline Tensor span_tensor(SpanCall* call, const char* name, const Tensor& x, const Tensor& like,
                          const std::vector<int64_t>& shape) {
  return take_rows(&call->tensors, name, x, like, shape);
}

inline SpanCall span_call(const Tensor& start, const Tensor& end, const Tensor& cu_words,
                          int64_t max_width) {
  SpanCall call;
  call.dtype = start.scalar_type();
  dtype_of("start", start);
  check_dim("start", start, 2);
  SpanArgs& a = call.args;
  a.words = start.size(0);
  const int64_t size = start.size(1);
  const Tensor s = dense(span_tensor(&call, "start", start, start, {a.words, size}));
  const Tensor e = dense(span_tensor(&call, "end", end, start, {a.words, size}));
  call.tensors.insert(call.tensors.end(), {s, e, cu_words});
  a.cu_words = cu_seqlens_data(cu_words, start);
  STD_TORCH_CHECK(max_width >= 1 && size <= kInt32Max - kSpanChunk,
                  "max_width: expected at least 1, got ", max_width);
  STD_TORCH_CHECK(larger(1, a.words) <= (kInt32Max - kSpanRows) / max_width, a.words, " words of ",
                  max_width, " widths are more than one launch can cover");
  a.num_seqs = static_cast<int32_t>(cu_words.size(0) - 1);
  STD_TORCH_CHECK(a.num_seqs >= 1 || a.words == 0, "cu_words: no sequence holds the ", a.words,
                  " words");
  a.size = static_cast<int32_t>(size);
  a.max_width = static_cast<int32_t>(max_width);
  a.start = s.data_ptr();
  a.end = e.data_ptr();
  a.keep_scale = 1.0f;
  call.vectors = vectors_fit(size * start.element_size(), kAccessBytes, address(s) | address(e));
  return call;
}

inline void set_labels(SpanCall* call, const Tensor& labels, const std::optional<Tensor>& bias,
                       const Tensor& like) {
  SpanArgs& a = call->args;
  check_dim("labels", labels, 3);
  const int64_t count = labels.size(1);
  const Tensor rows = span_tensor(call, "labels", labels, like, {a.num_seqs, count, a.size});
  STD_TORCH_CHECK(count <= 64 * kGridY, "labels: expected at most ", 64 * kGridY, ", got ", count);
  a.labels = rows.data_ptr();
  a.label_seq_stride = rows.stride(0);
  a.label_stride = rows.stride(1);
  a.label_count = static_cast<int32_t>(count);
  const uint64_t strides = static_cast<uint64_t>((a.num_seqs > 1 ? a.label_seq_stride : 0) |
                                                 (count > 1 ? a.label_stride : 0));
  call->vectors =
      call->vectors && vectors_fit(kAccessBytes, 1, address(rows) | strides * like.element_size());
  if (bias.has_value()) {
    const Tensor kept = dense(span_tensor(call, "label_bias", *bias, like, {a.num_seqs, count}));
    call->tensors.push_back(kept);
    a.label_bias = kept.data_ptr();
  }
}

inline void set_span_dropout(SpanCall* call, double dropout_p, const std::optional<Tensor>& seed,
                             const Tensor& like) {
  take_dropout(&call->tensors, &call->args, dropout_p, seed, like);
}

// Calls f(Type<T>{}, Width<V>{}).
template <typename F>
void dispatch_spans(const SpanCall& call, F&& f) {
  dispatch_dtype("start", call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_width<kVector<T>>(call.vectors, [&](auto width) { f(tag, width); });
  });
}

template <typename... Parameters, typename... Arguments>
void launch_spans(const Launcher& launcher, const char* op, void (*kernel)(Parameters...),
                  dim3 grid, int bytes, Arguments&&... arguments) {
  launch_kernel(launcher, op, kernel, grid, kSpanThreads, bytes, arguments...);
}

}  // namespace fastenc::cuda
