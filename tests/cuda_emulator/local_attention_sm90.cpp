// The Hopper attention kernels as functions to call from Python.
#include "csrc/cuda/local_attention_bwd_sm90.cuh"
#include "csrc/cuda/local_attention_sm90.cuh"
#include "sm90_launch.h"

using namespace fastenc;
using namespace fastenc::cuda;
using namespace fastenc::cuda::sm90;
using emulator::map_of;
using emulator::run;

namespace {

template <typename T, int kHeadDim, int kReach>
void local_fwd(const AttentionArgs& args, int heads_per_block, bool backwards) {
  using Shape = LocalShape<kHeadDim, kReach>;
  const LocalAttentionMaps maps{map_of(args.q, args), map_of(args.k, args), map_of(args.v, args)};
  run(attention_slots(args.total_tokens, args.num_seqs, Shape::kRows),
      ceil_div(args.heads, heads_per_block), Shape::kThreads, Shape::kBytes, backwards,
      [&] { local_attention_fwd_sm90<T, kHeadDim, kReach>(maps, args, heads_per_block); });
}

template <typename T, int kHeadDim, int kReach>
void local_bwd(const AttentionGradArgs& grads, int heads_per_block, bool backwards) {
  using Shape = LocalGradShape<kHeadDim, kReach>;
  const AttentionArgs& args = grads.forward;
  const LocalGradMaps maps{map_of(args.q, args), map_of(args.k, args), map_of(args.v, args),
                           map_of(grads.grad_out, args)};
  run(attention_slots(args.total_tokens, args.num_seqs, Shape::kRows),
      ceil_div(args.heads, heads_per_block), Shape::kThreads, Shape::kBytes, backwards,
      [&] { local_attention_bwd_sm90<T, kHeadDim, kReach>(maps, grads, heads_per_block); });
}

}  // namespace

extern "C" {

int64_t grad_args_size() { return sizeof(AttentionGradArgs); }

int64_t args_size() { return sizeof(AttentionArgs); }

// Returns whether there is such a kernel. dtype: 1 bf16, 2 fp16.
int run_local_fwd(const AttentionArgs* args, int dtype, int reach, int heads_per_block, int late,
                  int backwards) {
  ::emulator::hopper().late = late;
  const int which = args->head_dim * 1000 + reach;
#define FASTENC_CASE(D, REACH)                                                 \
  case D * 1000 + REACH:                                                       \
    dtype == 1 ? local_fwd<bf16, D, REACH>(*args, heads_per_block, backwards)  \
               : local_fwd<fp16, D, REACH>(*args, heads_per_block, backwards); \
    return 1;
  switch (which) {
    FASTENC_CASE(32, 64)
    FASTENC_CASE(64, 64)
    FASTENC_CASE(128, 64)
    FASTENC_CASE(32, 128)
    FASTENC_CASE(64, 128)
  }
  return 0;
}

int run_local_bwd(const AttentionGradArgs* grads, int dtype, int reach, int heads_per_block,
                  int late, int backwards) {
  ::emulator::hopper().late = late;
#define FASTENC_GRAD_CASE(D, REACH)                                             \
  case D * 1000 + REACH:                                                        \
    dtype == 1 ? local_bwd<bf16, D, REACH>(*grads, heads_per_block, backwards)  \
               : local_bwd<fp16, D, REACH>(*grads, heads_per_block, backwards); \
    return 1;
  switch (grads->forward.head_dim * 1000 + reach) {
    FASTENC_GRAD_CASE(32, 64)
    FASTENC_GRAD_CASE(64, 64)
    FASTENC_GRAD_CASE(32, 128)
  }
  return 0;
}
}
