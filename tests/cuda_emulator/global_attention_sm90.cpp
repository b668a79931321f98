// Attention without a window on Hopper as functions to call from Python.
#include <vector>

#include "csrc/cuda/global_attention_sm90.cuh"
#include "sm90_launch.h"

using namespace fastenc;
using namespace fastenc::cuda;
using namespace fastenc::cuda::sm90;
using emulator::map_of;
using emulator::run;

namespace {

// As the launch code does it: order, rotated keys, attention on `blocks` blocks.
template <typename T, int kHeadDim>
void global_fwd(AttentionArgs args, int blocks, bool backwards) {
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
        [&] { rotate_keys_sm90<T, kHeadDim>(args, out); });
    args.k = {out, row, kHeadDim};
  }
  const GlobalAttentionMaps maps{map_of(args.q, args), map_of(args.k, args), map_of(args.v, args)};
  run(blocks, 1, Shape::kThreads, Shape::kBytes, backwards,
      [&] { global_attention_fwd_sm90<T, kHeadDim>(maps, args, order); });
}

}  // namespace

extern "C" {

int64_t args_size() { return sizeof(AttentionArgs); }

void run_order(const int32_t* cu_seqlens, int32_t* sequence, int32_t* first_tile, int num_seqs) {
  run(1, 1, kOrderThreads, kOrderThreads * 4, false,
      [&] { attention_order_sm90<128>(cu_seqlens, num_seqs, TileOrder{sequence, first_tile}); });
}

int run_global_fwd(const AttentionArgs* args, int dtype, int blocks, int late, int backwards) {
  ::emulator::hopper().late = late;
#define FASTENC_GLOBAL_CASE(D)                                  \
  case D:                                                       \
    dtype == 1 ? global_fwd<bf16, D>(*args, blocks, backwards)  \
               : global_fwd<fp16, D>(*args, blocks, backwards); \
    return 1;
  switch (args->head_dim) {
    FASTENC_GLOBAL_CASE(32)
    FASTENC_GLOBAL_CASE(64)
    FASTENC_GLOBAL_CASE(128)
  }
  return 0;
}
}
