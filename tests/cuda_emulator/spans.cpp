// The span kernels, for every dtype and vector width, behind plain C functions.
#include "csrc/cuda/span_candidates.cuh"
#include "csrc/cuda/span_pool.cuh"
#include "csrc/cuda/span_score.cuh"
#include "csrc/cuda/span_score_bwd.cuh"

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

uint32_t row_slots(const SpanArgs& a) {
  return static_cast<uint32_t>(attention_slots(a.words * a.max_width, a.num_seqs, kSpanRows));
}

uint32_t blocks_of(int64_t n, int64_t size) { return static_cast<uint32_t>(ceil_div(n, size)); }

template <typename T, int V, int kLabels>
void candidates(const SpanArgs& args, const CandidateOutputs& outputs, bool write) {
  emulator::launch({row_slots(args)}, {kSpanThreads}, kSpanLogitBytes<kLabels, T>, [&] {
    write ? span_candidates_kernel<T, V, kLabels, true>(args, outputs)
          : span_candidates_kernel<T, V, kLabels, false>(args, outputs);
  });
}

}  // namespace

extern "C" {

int64_t args_size() { return sizeof(SpanArgs); }

void pool_fwd(int dtype, int vectors, const SpanArgs* args, void* out) {
  dispatch(dtype, vectors, [&](auto tag, auto width) {
    using T = decltype(tag);
    emulator::launch({static_cast<uint32_t>(args->words)}, {kPoolThreads}, 0, [&] {
      span_pool_fwd_kernel<T, decltype(width)::value>(*args, static_cast<T*>(out));
    });
  });
}

void pool_bwd(int dtype, int vectors, const SpanArgs* args, const void* grad, void* dstart,
              void* dend) {
  dispatch(dtype, vectors, [&](auto tag, auto width) {
    using T = decltype(tag);
    emulator::launch({static_cast<uint32_t>(args->words)}, {kPoolThreads}, 0, [&] {
      span_pool_bwd_kernel<T, decltype(width)::value>(
          *args, static_cast<const T*>(grad), static_cast<T*>(dstart), static_cast<T*>(dend));
    });
  });
}

void score_fwd(int dtype, int vectors, int labels, const SpanArgs* args, void* out, int backwards) {
  dispatch(dtype, vectors, [&](auto tag, auto width) {
    using T = decltype(tag);
    constexpr int V = decltype(width)::value;
    const auto run = [&](auto columns) {
      constexpr int kLabels = decltype(columns)::value;
      emulator::launch(
          {row_slots(*args), blocks_of(args->label_count, kLabels)}, {kSpanThreads},
          kSpanLogitBytes<kLabels, T>,
          [&] { span_score_fwd_kernel<T, V, kLabels>(*args, static_cast<T*>(out)); }, backwards);
    };
    labels == 32 ? run(Width<32>{}) : run(Width<64>{});
  });
}

void score_bwd(int dtype, int vectors, const SpanArgs* args, const void* grad, void* dstart,
               void* dend, void* dlabels, void* dbias, int backwards) {
  dispatch(dtype, vectors, [&](auto tag, auto width) {
    using T = decltype(tag);
    constexpr int V = decltype(width)::value;
    const T* g = static_cast<const T*>(grad);
    const int words = words_of_tile(args->max_width);
    const uint32_t chunks = blocks_of(args->size, kSpanChunk);
    const dim3 grid{static_cast<uint32_t>(attention_slots(args->words, args->num_seqs, words)),
                    chunks};
    emulator::launch(
        grid, {kSpanThreads}, kSpanWordBytes<T>,
        [&] { span_words_bwd_kernel<T, V, false>(*args, g, static_cast<T*>(dstart), words); },
        backwards);
    emulator::launch(
        grid, {kSpanThreads}, kSpanWordBytes<T>,
        [&] { span_words_bwd_kernel<T, V, true>(*args, g, static_cast<T*>(dend), words); },
        backwards);
    emulator::launch(
        {static_cast<uint32_t>(args->num_seqs), chunks, blocks_of(args->label_count, kSpanRows)},
        {kSpanThreads}, kSpanLabelBytes<T>,
        [&] {
          span_labels_bwd_kernel<T, V>(*args, g, static_cast<T*>(dlabels), static_cast<T*>(dbias));
        },
        backwards);
  });
}

// Returns how many candidates there are; writes them where outputs->score is not null.
int64_t candidates_fwd(int dtype, int vectors, const SpanArgs* args,
                       const CandidateOutputs* outputs) {
  int64_t total = -1;
  dispatch(dtype, vectors, [&](auto tag, auto width) {
    using T = decltype(tag);
    constexpr int V = decltype(width)::value;
    if (outputs->score == nullptr) {
      candidates<T, V, 32>(*args, *outputs, false);
      emulator::launch({1}, {kScanThreads}, kScanThreads * 8, [&] {
        scan_kernel(outputs->counts, args->words * args->max_width, &total);
      });
    } else {
      candidates<T, V, 32>(*args, *outputs, true);
    }
  });
  return total;
}
}
