// The Hopper attention kernels as functions to call from Python.
#include "csrc/cuda/local_attention_bwd_sm90.cuh"
#include "csrc/cuda/local_attention_sm90.cuh"
#include "csrc/cuda/local_attention_stream_bwd_sm90.cuh"
#include "sm90_launch.h"

using namespace fastenc;
using namespace fastenc::cuda;
using namespace fastenc::cuda::sm90;
using emulator::map_of;
using emulator::run;

namespace {

template <typename T, int kHeadDim, int kReach>
int local_fwd(const AttentionArgs& args, int heads_per_block, bool backwards) {
  using Shape = LocalShape<kHeadDim, kReach>;
  const LocalAttentionMaps maps{map_of(args.q, args), map_of(args.k, args), map_of(args.v, args)};
  run(attention_slots(args.total_tokens, args.num_seqs, Shape::kRows),
      ceil_div(args.heads, heads_per_block), Shape::kThreads, Shape::kBytes, backwards,
      [&] { local_attention_fwd_sm90<T, kHeadDim, kReach>(maps, args, heads_per_block); });
  return 1;
}

template <typename T, int kHeadDim, int kReach>
int local_bwd(const AttentionGradArgs& grads, int heads_per_block, bool backwards) {
  using Shape = LocalGradShape<kHeadDim, kReach>;
  const AttentionArgs& args = grads.forward;
  const GradMaps maps{map_of(args.q, args), map_of(args.k, args), map_of(args.v, args),
                      map_of(grads.grad_out, args)};
  run(attention_slots(args.total_tokens, args.num_seqs, Shape::kRows),
      ceil_div(args.heads, heads_per_block), Shape::kThreads, Shape::kBytes, backwards,
      [&] { local_attention_bwd_sm90<T, kHeadDim, kReach>(maps, grads, heads_per_block); });
  return 1;
}

template <typename T, int kHeadDim>
int local_stream_bwd(const AttentionGradArgs& grads, int heads_per_block, bool backwards) {
  using Shape = LocalStreamShape<kHeadDim>;
  const AttentionArgs& args = grads.forward;
  run(rotate_blocks(args.total_tokens * args.heads), 1, kRotateThreads, 0, backwards,
      [&] { attention_delta_sm90<T, kHeadDim>(grads); });
  const GradMaps maps{map_of(args.q, args), map_of(args.k, args), map_of(args.v, args),
                      map_of(grads.grad_out, args)};
  run(attention_slots(args.total_tokens, args.num_seqs, Shape::kRows),
      ceil_div(args.heads, heads_per_block), Shape::kThreads, Shape::kBytes, backwards,
      [&] { local_attention_stream_bwd_sm90<T, kHeadDim>(maps, grads, heads_per_block); });
  return 1;
}

}  // namespace

extern "C" {

int64_t grad_args_size() { return sizeof(AttentionGradArgs); }

int64_t args_size() { return sizeof(AttentionArgs); }

// Return whether there is such a kernel here. dtype: 1 bf16, 2 fp16, for one shape: the dtypes
// differ in the arithmetic of single values only, and each kernel costs a second of compilation.
int run_local_fwd(const AttentionArgs* args, int dtype, int reach, int heads_per_block, int late,
                  int backwards) {
  ::emulator::hopper().late = late;
  switch (dtype * 1000000 + args->head_dim * 1000 + reach) {
    case 1032064:
      return local_fwd<bf16, 32, 64>(*args, heads_per_block, backwards);
    case 1032128:
      return local_fwd<bf16, 32, 128>(*args, heads_per_block, backwards);
    case 1064064:
      return local_fwd<bf16, 64, 64>(*args, heads_per_block, backwards);
    case 1064128:
      return local_fwd<bf16, 64, 128>(*args, heads_per_block, backwards);
    case 1128064:
      return local_fwd<bf16, 128, 64>(*args, heads_per_block, backwards);
    case 2064064:
      return local_fwd<fp16, 64, 64>(*args, heads_per_block, backwards);
  }
  return 0;
}

int run_local_bwd(const AttentionGradArgs* grads, int dtype, int reach, int heads_per_block,
                  int late, int backwards) {
  ::emulator::hopper().late = late;
  switch (dtype * 1000000 + grads->forward.head_dim * 1000 + reach) {
    case 1032064:
      return local_bwd<bf16, 32, 64>(*grads, heads_per_block, backwards);
    case 1032128:
      return local_bwd<bf16, 32, 128>(*grads, heads_per_block, backwards);
    case 1064064:
      return local_bwd<bf16, 64, 64>(*grads, heads_per_block, backwards);
    case 2064064:
      return local_bwd<fp16, 64, 64>(*grads, heads_per_block, backwards);
  }
  return 0;
}

// Any window; `delta` is needed.
int run_local_stream_bwd(const AttentionGradArgs* grads, int dtype, int heads_per_block, int late,
                         int backwards) {
  ::emulator::hopper().late = late;
  switch (dtype * 1000 + grads->forward.head_dim) {
    case 1064:
      return local_stream_bwd<bf16, 64>(*grads, heads_per_block, backwards);
    case 2064:
      return local_stream_bwd<fp16, 64>(*grads, heads_per_block, backwards);
  }
  return 0;
}
}
