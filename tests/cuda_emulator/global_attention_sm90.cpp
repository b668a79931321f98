// Attention without a window on Hopper as functions to call from Python.
#include <vector>

#include "csrc/cuda/global_attention_bwd_sm90.cuh"
#include "sm90_launch.h"

using namespace fastenc;
using namespace fastenc::cuda;
using namespace fastenc::cuda::sm90;
using emulator::map_of;
using emulator::run;

namespace {

// As the launch code does it: order, rotated keys, attention on `blocks` blocks.
template <typename T, int kHeadDim>
int global_fwd(AttentionArgs args, int blocks, bool backwards) {
  using Shape = GlobalShape<kHeadDim>;
  std::vector<int32_t> sequence(args.num_seqs, -1), first_tile(args.num_seqs + 1, -1);
  const TileOrder order{sequence.data(), first_tile.data()};
  run(1, 1, kOrderThreads, kOrderThreads * 4, backwards,
      [&] { attention_order_sm90<Shape::kRows>(args.cu_seqlens, args.num_seqs, order); });
  const int64_t row = args.heads * kHeadDim;
  std::vector<uint4> keys(args.total_tokens * row / 8 + 1, uint4{~0u, ~0u, ~0u, ~0u});
  if (args.cos.data != nullptr) {
    T* out = reinterpret_cast<T*>(keys.data());
    run(ceil_div(args.total_tokens * row / 16, kRotateThreads), 1, kRotateThreads, 0, backwards,
        [&] { rotate_rows_sm90<T, kHeadDim>(args, args.k, out); });
    args.k = {out, row, kHeadDim};
  }
  const GlobalAttentionMaps maps{map_of(args.q, args), map_of(args.k, args), map_of(args.v, args)};
  run(blocks, 1, Shape::kThreads, Shape::kBytes, backwards,
      [&] { global_attention_fwd_sm90<T, kHeadDim>(maps, args, order); });
  return 1;
}

template <typename T, int kHeadDim>
int global_bwd(AttentionGradArgs grads, int blocks, bool backwards) {
  using Shape = GlobalGradShape<kHeadDim>;
  AttentionArgs& args = grads.forward;
  std::vector<int32_t> sequence(args.num_seqs, -1), first_tile(args.num_seqs + 1, -1);
  const TileOrder order{sequence.data(), first_tile.data()};
  run(1, 1, kOrderThreads, kOrderThreads * 4, backwards,
      [&] { attention_order_sm90<Shape::kRows>(args.cu_seqlens, args.num_seqs, order); });
  run(ceil_div(args.total_tokens * args.heads, kRotateThreads), 1, kRotateThreads, 0, backwards,
      [&] { attention_delta_sm90<T, kHeadDim>(grads); });
  const int64_t row = args.heads * kHeadDim;
  std::vector<uint4> rotated[2];
  if (args.cos.data != nullptr) {
    for (int i = 0; i < 2; ++i) {
      rotated[i].assign(args.total_tokens * row / 8 + 1, uint4{~0u, ~0u, ~0u, ~0u});
      T* out = reinterpret_cast<T*>(rotated[i].data());
      HeadRows& rows = i == 0 ? args.q : args.k;
      run(ceil_div(args.total_tokens * row / 16, kRotateThreads), 1, kRotateThreads, 0, backwards,
          [&] { rotate_rows_sm90<T, kHeadDim>(args, rows, out); });
      rows = {out, row, kHeadDim};
    }
  }
  const TensorMap q = map_of(args.q, args), k = map_of(args.k, args), v = map_of(args.v, args);
  const TensorMap grad = map_of(grads.grad_out, args);
  const GlobalGradMaps of_queries{q, grad, k, v}, of_keys{k, v, q, grad};
  run(blocks, 1, Shape::kThreads, Shape::kBytes, backwards,
      [&] { global_attention_bwd_sm90<T, kHeadDim, false>(of_queries, grads, order); });
  run(blocks, 1, Shape::kThreads, Shape::kBytes, backwards,
      [&] { global_attention_bwd_sm90<T, kHeadDim, true>(of_keys, grads, order); });
  return 1;
}

}  // namespace

extern "C" {

int64_t args_size() { return sizeof(AttentionArgs); }

void run_order(const int32_t* cu_seqlens, int32_t* sequence, int32_t* first_tile, int num_seqs) {
  run(1, 1, kOrderThreads, kOrderThreads * 4, false,
      [&] { attention_order_sm90<128>(cu_seqlens, num_seqs, TileOrder{sequence, first_tile}); });
}

// Return whether there is such a kernel here. dtype: 1 bf16, 2 fp16, for one shape (see
// local_attention_sm90.cpp).
int run_global_fwd(const AttentionArgs* args, int dtype, int blocks, int late, int backwards) {
  ::emulator::hopper().late = late;
  switch (dtype * 1000 + args->head_dim) {
    case 1032:
      return global_fwd<bf16, 32>(*args, blocks, backwards);
    case 1064:
      return global_fwd<bf16, 64>(*args, blocks, backwards);
    case 1128:
      return global_fwd<bf16, 128>(*args, blocks, backwards);
    case 2064:
      return global_fwd<fp16, 64>(*args, blocks, backwards);
  }
  return 0;
}

int run_global_bwd(const AttentionGradArgs* grads, int dtype, int blocks, int late, int backwards) {
  ::emulator::hopper().late = late;
  switch (dtype * 1000 + grads->forward.head_dim) {
    case 1032:
      return global_bwd<bf16, 32>(*grads, blocks, backwards);
    case 1064:
      return global_bwd<bf16, 64>(*grads, blocks, backwards);
    case 1128:
      return global_bwd<bf16, 128>(*grads, blocks, backwards);
    case 2064:
      return global_bwd<fp16, 64>(*grads, blocks, backwards);
  }
  return 0;
}
}
