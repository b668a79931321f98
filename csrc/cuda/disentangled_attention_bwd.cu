// Disentangled attention on NVIDIA GPUs, backward: check, launch. The device code is in
// disentangled_bwd.cuh and disentangled_table.cuh. Has not run on a GPU:
// tests/test_cuda_disentangled_model.py runs the same sources on the CPU.
#include <tuple>

#include "disentangled_bwd.cuh"
#include "disentangled_table.cuh"
#include "disentangled_problem.cuh"

namespace fastenc::cuda {
namespace {

// As many tables of sums as there are blocks at a time: each block keeps one, whatever it walks
// over. Without a table every tile has a block of its own.
int32_t table_splits(const Launcher& launcher, const DisentangledGradArgs& call, int width,
                     bool table) {
  const int64_t resident = (width <= 64 ? 2 : 1) * launcher.sm_count();
  const int64_t blocks = larger(1, resident / call.grads.forward.heads);
  return static_cast<int32_t>(table ? smaller(call.slots, blocks) : call.slots);
}

// One side's kernel, then the gradient of its table.
template <typename T, int kWidth>
void launch_side(const Launcher& launcher, const char* op, void (*kernel)(DisentangledGradArgs),
                 DisentangledGradArgs call, float* DisentangledGradArgs::* partials,
                 const Tensor& grad) {
  const AttentionArgs& a = call.grads.forward;
  const bool table = grad.numel() > 0;
  call.splits = table_splits(launcher, call, kWidth, table);
  std::optional<Tensor> sums;
  if (table) {
    sums = torch::stable::new_empty(grad, {call.splits, a.heads, call.rows.count(), kWidth},
                                    ScalarType::Float);
    torch::stable::zero_(*sums);
    call.*partials = mutable_data<float>(*sums);
  }
  launch_tiles(launcher, op, kernel, int64_t{call.splits} * a.heads,
               DisentangledShape<sizeof(T), kWidth>::backward_bytes(), call);
  if (table) {
    constexpr int kBytes = kTableSlices * kWidth * sizeof(float);
    launch_kernel(launcher, op, disentangled_table_kernel<T, kWidth>,
                  dim3(grad.size(0) * grad.size(1)), kWarp * kTableSlices, kBytes,
                  data<float>(*sums), mutable_data<T>(grad), call);
  }
}

Tensor like_table(const std::optional<Tensor>& table, const Tensor& q) {
  return table.has_value() ? torch::stable::new_empty(q, shape_of(*table))
                           : torch::stable::new_empty(q, {0});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> disentangled_attention_bwd(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> pos_key,
    std::optional<Tensor> pos_query, Tensor out, Tensor lse, Tensor rel_index, Tensor cu_seqlens,
    int64_t max_seqlen, double scale, double dropout_p, std::optional<Tensor> seed) {
  FASTENC_COUNT_LAUNCH("disentangled_attention_bwd");
  const char* op = "disentangled_attention_bwd";
  const Launcher launcher(grad_out);
  DisentangledCall checked = disentangled_call(q, k, v, pos_key, pos_query, rel_index, cu_seqlens,
                                               max_seqlen, scale, dropout_p, seed);
  AttentionCall& attention = checked.attention;
  AttentionArgs& a = attention.args;
  DisentangledGradArgs call{};
  call.grads.grad_out = head_rows(check_like_out(&attention, "grad_out", grad_out, q));
  a.out = head_rows(check_like_out(&attention, "out", out, q));
  a.lse = mutable_data<float>(check_stats(&attention, "lse", lse, q));
  const Tensor dq = torch::stable::new_empty(q, shape_of(q)),
               dk = torch::stable::new_empty(q, shape_of(q)),
               dv = torch::stable::new_empty(q, shape_of(q));
  const Tensor dpos_key = like_table(pos_key, q), dpos_query = like_table(pos_query, q);
  if (attention.empty()) {
    Tensor tables[] = {dpos_key, dpos_query};
    for (Tensor& table : tables) {
      torch::stable::zero_(table);
    }
    return {dq, dk, dv, dpos_key, dpos_query};
  }
  const Tensor delta = torch::stable::new_empty(q, {a.heads, a.total_tokens}, ScalarType::Float);
  a.vectors = a.vectors && rows_keep_vectors(dq);
  call.grads.dq = head_rows(dq);
  call.grads.dk = head_rows(dk);
  call.grads.dv = head_rows(dv);
  call.grads.delta = mutable_data<float>(delta);
  call.grads.scale = static_cast<float>(scale);
  call.grads.forward = a;
  call.positions = checked.positions;
  call.rows = distance_rows(checked.positions.radius, max_seqlen);
  call.slots = static_cast<int32_t>(attention.slots());
  dispatch_dtype("q", attention.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_disentangled(a.head_dim, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      launch_side<T, kWidth>(launcher, op, disentangled_attention_dq_kernel<T, kWidth>, call,
                             &DisentangledGradArgs::key_partials, dpos_key);
      launch_side<T, kWidth>(launcher, op, disentangled_attention_dkdv_kernel<T, kWidth>, call,
                             &DisentangledGradArgs::query_partials, dpos_query);
    });
  });
  return {dq, dk, dv, dpos_key, dpos_query};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("disentangled_attention_bwd", TORCH_BOX(&disentangled_attention_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("disentangled_attention_bwd", TORCH_BOX(&disentangled_attention_bwd));
}

}  // namespace fastenc::cuda
