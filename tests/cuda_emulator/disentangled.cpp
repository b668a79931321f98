// The disentangled attention kernels, for every dtype and padded width, behind one plain C function
// each.
#include "csrc/cuda/disentangled_bwd.cuh"
#include "csrc/cuda/disentangled_table.cuh"
#include "csrc/cuda/disentangled_fwd.cuh"

using namespace fastenc;
using namespace fastenc::cuda;

namespace {

template <typename F>
void for_kernel(int dtype, int head_dim, F&& f) {
  const auto for_width = [&](auto tag) {
    head_dim <= 64 ? f(tag, Width<64>{}) : f(tag, Width<128>{});
  };
  dtype == 0 ? for_width(float{}) : dtype == 1 ? for_width(bf16{}) : for_width(fp16{});
}

}  // namespace

extern "C" {

int64_t bank_conflicts() { return emulator::machine().conflicts; }

void disentangled_fwd(int dtype, const DisentangledArgs* args, int backwards) {
  const AttentionArgs& a = args->attention;
  for_kernel(dtype, a.head_dim, [&](auto tag, auto width) {
    using T = decltype(tag);
    constexpr int kWidth = decltype(width)::value;
    const auto slots = attention_slots(a.total_tokens, a.num_seqs, kAttentionRows);
    emulator::launch(
        {static_cast<uint32_t>(slots * a.heads)}, {kAttentionThreads},
        DisentangledShape<sizeof(T), kWidth>::forward_bytes(),
        [&] { disentangled_attention_fwd_kernel<T, kWidth>(*args); }, backwards);
  });
}

// Both sides' kernels; a gradient of a table is given where its partials are.
void disentangled_bwd(int dtype, const DisentangledGradArgs* call, void* key_grad, void* query_grad,
                      int backwards) {
  const AttentionArgs& a = call->grads.forward;
  for_kernel(dtype, a.head_dim, [&](auto tag, auto width) {
    using T = decltype(tag);
    constexpr int kWidth = decltype(width)::value;
    const dim3 grid{static_cast<uint32_t>(call->splits * a.heads)};
    const int bytes = DisentangledShape<sizeof(T), kWidth>::backward_bytes();
    emulator::launch(
        grid, {kAttentionThreads}, bytes,
        [&] { disentangled_attention_dq_kernel<T, kWidth>(*call); }, backwards);
    emulator::launch(
        grid, {kAttentionThreads}, bytes,
        [&] { disentangled_attention_dkdv_kernel<T, kWidth>(*call); }, backwards);
    const auto add = [&](const float* partials, void* grad) {
      if (partials != nullptr) {
        emulator::launch(
            {static_cast<uint32_t>(call->positions.size * a.heads)}, {kWarp * kTableSlices},
            kTableSlices * kWidth * sizeof(float),
            [&] { disentangled_table_kernel<T, kWidth>(partials, static_cast<T*>(grad), *call); });
      }
    };
    add(call->key_partials, key_grad);
    add(call->query_partials, query_grad);
  });
}

void distance_rows_of(int64_t radius, int64_t max_seqlen, int32_t* out) {
  const DistanceRows rows = distance_rows(radius, max_seqlen);
  out[0] = rows.reach;
  out[1] = rows.far;
  out[2] = rows.count();
}

int64_t grad_args_size() { return sizeof(DisentangledGradArgs); }
int64_t args_size() { return sizeof(DisentangledArgs); }
}
