// Packed attention forward on NVIDIA GPUs from sm_80 (mma.sync, cp.async, ldmatrix): any window,
// head_dim up to 128, RoPE, dropout, relative bias. fastenc/ops/varlen_attention.py says what is
// computed.
//
// A block takes 64 queries of one sequence and head, 16 a warp, and walks over the keys that they
// see, 64 at a time (fp32: 32), two blocks of K and V in shared memory: the next arrives while this
// one is worked on, with one barrier a block. Online softmax in base 2, statistics in fp32.
// RoPE turns q and k in shared memory, after they have arrived: no turned copy in global memory.
#pragma once

#include "attention_tile.cuh"

namespace fastenc::cuda {

template <typename T, int kWidth>
class ForwardTile {
  using Shape = AttentionShape<sizeof(T), kWidth>;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kPitch = Shape::kPitch;

 public:
  __device__ __forceinline__ ForwardTile(const AttentionArgs& args, const AttentionTile& tile,
                                         int head)
      : args_(args), tile_(tile), head_(head) {
    auto* memory = dynamic_shared();
    queries_ = reinterpret_cast<T*>(memory);
    keys_ = queries_ + kAttentionRows * kPitch;
    values_ = keys_ + Shape::kStages * kKeys * kPitch;
    staging_ = reinterpret_cast<float*>(values_ + Shape::kStages * kKeys * kPitch) +
               warp_id() * 16 * (kKeys + 4);
    rows_ = static_cast<int>(smaller(kAttentionRows, tile.length - tile.first));
    seen_ = seen_from(tile.first, tile.first + rows_ - 1, tile.length, args.left, args.right);
  }

  __device__ __forceinline__ void run() {
    load_tile<kAttentionRows, kWidth>(queries_,
                                      args_.q.template at<T>(tile_.start + tile_.first, head_),
                                      args_.q.token_stride, rows_, args_.head_dim, args_.vectors);
    if constexpr (Shape::kStages == 2) {
      fetch(seen_.begin, 0);
    }
    cp_async_commit();
    if (args_.cos.data != nullptr) {
      cp_async_wait<0>();
      __syncthreads();
      rotate_tile<kAttentionRows, kWidth>(queries_, tile_.first, rows_, args_);
    }
    cp_async_wait<0>();
    __syncthreads();
    const LeftRows<T, kWidth, kWidth <= 64> queries(queries_ + warp_id() * 16 * kPitch, kPitch);
    clear(out_);
    const uint64_t seed = args_.drop_below ? static_cast<uint64_t>(*args_.seed) : 0;
    int stage = 0;
    for (int key = seen_.begin; key < seen_.end; key += kKeys) {
      await_block<Shape::kStages, kKeys>(key, seen_.end, stage,
                                         [this](int at, int to) { fetch(at, to); });
      rotate_block<kKeys, kWidth>(keys_ + stage * kKeys * kPitch, key, seen_.end - key, args_);
      step(queries, key, keys_ + stage * kKeys * kPitch, values_ + stage * kKeys * kPitch, seed);
      stage = Shape::kStages - 1 - stage;
    }
    finish_tile<kWidth>(queries_, rows_, out_, top_, sum_, args_, tile_, head_);
  }

 private:
  __device__ __forceinline__ void fetch(int key, int stage) {
    load_keys<kKeys, kWidth>(keys_ + stage * kKeys * kPitch, values_ + stage * kKeys * kPitch,
                             args_, tile_, head_, key, seen_.end - key);
  }

  template <typename Left>
  __device__ __forceinline__ void step(const Left& queries, int key, const T* keys, const T* values,
                                       uint64_t seed) {
    float s[kKeys / 8][4];
    clear(s);
    multiply_transposed<kKeys, kWidth>(s, queries, keys, kPitch);
    const auto place = place_scores<Across::kQueries>(tile_.first, key);
    if (args_.prescale) {
      prescale(s, place, args_, head_);
    }
    if (!fully_seen(tile_.first, kAttentionRows, key, kKeys, tile_.length, args_.left,
                    args_.right)) {
      mask(s, place, tile_, args_, -INFINITY);
    }
    soften_rows(s, top_, sum_, out_, args_.factor);
    if (args_.drop_below) {
      drop(s, place, tile_.start, head_, seed, args_.drop_below);
    }
    multiply<kWidth, kKeys>(out_, s, values, kPitch, staging_);
  }

  const AttentionArgs& args_;
  const AttentionTile tile_;
  const int head_;
  T *queries_, *keys_, *values_;
  float* staging_;
  int rows_;
  Range seen_;
  float out_[kWidth / 8][4];
  float top_[2] = {-INFINITY, -INFINITY};
  float sum_[2] = {0.0f, 0.0f};
};

// Block (slot, head) with the head fastest: the heads of a tile share the pages of their rows.
template <typename T, int kWidth>
__global__ __launch_bounds__(
    kAttentionThreads,
    kWidth <= 64 ? 3
                 : 2) void varlen_attention_fwd_kernel(const __grid_constant__ AttentionArgs args) {
  const int slot = blockIdx.x / args.heads, head = blockIdx.x % args.heads;
  const AttentionTile tile = locate_tile(args.cu_seqlens, args.num_seqs, slot, kAttentionRows);
  if (tile.first >= tile.length) {
    return;
  }
  ForwardTile<T, kWidth>(args, tile, head).run();
}

}  // namespace fastenc::cuda
