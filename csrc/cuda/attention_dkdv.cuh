// The gradients of keys and values: attention_bwd.cuh says how.
#pragma once

#include "attention_dq.cuh"

namespace fastenc::cuda {

template <typename T, int kWidth>
class KeyGradTile {
  using Shape = AttentionShape<sizeof(T), kWidth>;
  static constexpr int kQueries = Shape::kQueries;
  static constexpr int kPitch = Shape::kPitch;

 public:
  __device__ __forceinline__ KeyGradTile(const AttentionGradArgs& grads, const AttentionTile& tile,
                                         int head)
      : grads_(grads), args_(grads.forward), tile_(tile), head_(head) {
    keys_ = reinterpret_cast<T*>(dynamic_shared());
    values_ = keys_ + kAttentionRows * kPitch;
    queries_ = values_ + kAttentionRows * kPitch;
    outs_ = queries_ + Shape::kStages * kQueries * kPitch;
    bases_ = reinterpret_cast<float*>(outs_ + Shape::kStages * kQueries * kPitch);
    deltas_ = bases_ + Shape::kStages * kQueries;
    staging_ = deltas_ + Shape::kStages * kQueries + warp_id() * 16 * (kQueries + 4);
    rows_ = static_cast<int>(smaller(kAttentionRows, tile.length - tile.first));
    // A query sees from `left` before it to `right` after it; a key is seen from the other way.
    seen_ = seen_from(tile.first, tile.first + rows_ - 1, tile.length, args_.right, args_.left);
  }

  __device__ __forceinline__ void run() {
    const int64_t first = tile_.start + tile_.first;
    load_tile<kAttentionRows, kWidth>(keys_, args_.k.template at<T>(first, head_),
                                      args_.k.token_stride, rows_, args_.head_dim, args_.vectors);
    load_tile<kAttentionRows, kWidth>(values_, args_.v.template at<T>(first, head_),
                                      args_.v.token_stride, rows_, args_.head_dim, args_.vectors);
    if constexpr (Shape::kStages == 2) {
      fetch(seen_.begin, 0);
    }
    cp_async_commit();
    if (args_.cos.data != nullptr) {
      cp_async_wait<0>();
      __syncthreads();
      rotate_tile<kAttentionRows, kWidth>(keys_, tile_.first, rows_, args_);
    }
    const LeftRows<T, kWidth, false> keys(keys_ + warp_id() * 16 * kPitch, kPitch);
    const LeftRows<T, kWidth, false> values(values_ + warp_id() * 16 * kPitch, kPitch);
    clear(dk_);
    clear(dv_);
    const uint64_t seed = args_.drop_below ? static_cast<uint64_t>(*args_.seed) : 0;
    int stage = 0;
    for (int query = seen_.begin; query < seen_.end; query += kQueries) {
      await_block<Shape::kStages, kQueries>(query, seen_.end, stage,
                                            [this](int at, int to) { fetch(at, to); });
      rotate_block<kQueries, kWidth>(queries_ + stage * kQueries * kPitch, query, seen_.end - query,
                                     args_);
      step(keys, values, query, stage, seed);
      stage = Shape::kStages - 1 - stage;
    }
    finish();
  }

 private:
  __device__ __forceinline__ void fetch(int query, int stage) {
    const int rows = seen_.end - query;
    const int64_t first = tile_.start + query;
    load_tile<kQueries, kWidth>(queries_ + stage * kQueries * kPitch,
                                args_.q.template at<T>(first, head_), args_.q.token_stride, rows,
                                args_.head_dim, args_.vectors);
    load_tile<kQueries, kWidth>(outs_ + stage * kQueries * kPitch,
                                grads_.grad_out.template at<T>(first, head_),
                                grads_.grad_out.token_stride, rows, args_.head_dim, args_.vectors);
    if (threadIdx.x < kQueries) {
      const bool inside = threadIdx.x < rows;
      const int64_t at = head_ * args_.total_tokens + first + threadIdx.x;
      bases_[stage * kQueries + threadIdx.x] = inside ? exponent_base(args_.lse[at]) : INFINITY;
      deltas_[stage * kQueries + threadIdx.x] = inside ? grads_.delta[at] : 0.0f;
    }
  }

  template <typename Left>
  __device__ __forceinline__ void step(const Left& keys, const Left& values, int query, int stage,
                                       uint64_t seed) {
    const T* queries = queries_ + stage * kQueries * kPitch;
    const T* outs = outs_ + stage * kQueries * kPitch;
    const float* base = bases_ + stage * kQueries + pair_column();
    const float* delta = deltas_ + stage * kQueries + pair_column();
    float p[kQueries / 8][4];
    clear(p);
    multiply_transposed<kQueries, kWidth>(p, keys, queries, kPitch);
    const auto place = place_scores<Across::kKeys>(tile_.first, query);
    if (args_.prescale) {
      prescale(p, place, args_, head_);
    }
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[n][i] = fast_exp2(fmaf(p[n][i], args_.factor, -base[n * 8 + i % 2]));
      }
    }
    if (!fully_seen(query, kQueries, tile_.first, kAttentionRows, tile_.length, args_.left,
                    args_.right)) {
      mask(p, place, tile_, args_, 0.0f);
    }
    if (args_.drop_below) {
      step_dropped(values, place, p, queries, outs, delta, seed);
      return;
    }
    multiply<kWidth, kQueries>(dv_, p, outs, kPitch, staging_);
    float dp[kQueries / 8][4];
    clear(dp);
    multiply_transposed<kQueries, kWidth>(dp, values, outs, kPitch);
    add_keys(p, dp, queries, delta);
  }

  template <typename Left>
  __device__ __forceinline__ void step_dropped(const Left& values,
                                               const ScorePlace<Across::kKeys>& place,
                                               float (&p)[kQueries / 8][4], const T* queries,
                                               const T* outs, const float* delta, uint64_t seed) {
    uint32_t kept[kQueries / 8];
    kept_transposed(kept, place, tile_.start, head_, seed, args_.drop_below);
    float x[kQueries / 8][4];
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[n][i] = kept[n] >> i & 1u ? p[n][i] : 0.0f;
      }
    }
    multiply<kWidth, kQueries>(dv_, x, outs, kPitch, staging_);
    clear(x);
    multiply_transposed<kQueries, kWidth>(x, values, outs, kPitch);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[n][i] = kept[n] >> i & 1u ? x[n][i] : 0.0f;
      }
    }
    add_keys(p, x, queries, delta);
  }

  // dk += (p (dp - delta))^T Q
  __device__ __forceinline__ void add_keys(float (&p)[kQueries / 8][4],
                                           const float (&dp)[kQueries / 8][4], const T* queries,
                                           const float* delta) {
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[n][i] *= fmaf(dp[n][i], args_.keep_scale, -delta[n * 8 + i % 2]);
      }
    }
    multiply<kWidth, kQueries>(dk_, p, queries, kPitch, staging_);
  }

  __device__ __forceinline__ void finish() {
    __syncthreads();
    T* own_keys = keys_ + warp_id() * 16 * kPitch;
    stage_rows<kWidth>(own_keys, kPitch, dk_, grads_.scale, grads_.scale);
    stage_rows<kWidth>(values_ + warp_id() * 16 * kPitch, kPitch, dv_, args_.keep_scale,
                       args_.keep_scale);
    __syncthreads();
    if (args_.cos.data != nullptr) {
      rotate_tile<kAttentionRows, kWidth>(keys_, tile_.first, rows_, args_, -1.0f);
      __syncthreads();
    }
    const int64_t first = tile_.start + tile_.first;
    store_tile<kWidth>(keys_, grads_.dk.template at<T>(first, head_), grads_.dk.token_stride, rows_,
                       args_.head_dim, args_.vectors);
    store_tile<kWidth>(values_, grads_.dv.template at<T>(first, head_), grads_.dv.token_stride,
                       rows_, args_.head_dim, args_.vectors);
  }

  const AttentionGradArgs& grads_;
  const AttentionArgs& args_;
  const AttentionTile tile_;
  const int head_;
  T *keys_, *values_, *queries_, *outs_;
  float *bases_, *deltas_, *staging_;
  int rows_;
  Range seen_;
  float dk_[kWidth / 8][4], dv_[kWidth / 8][4];
};

template <typename T, int kWidth>
__global__ __launch_bounds__(kAttentionThreads, 2) void varlen_attention_dkdv_kernel(
    const __grid_constant__ AttentionGradArgs grads) {
  const AttentionArgs& args = grads.forward;
  const int slot = blockIdx.x / args.heads, head = blockIdx.x % args.heads;
  const AttentionTile tile = locate_tile(args.cu_seqlens, args.num_seqs, slot, kAttentionRows);
  if (tile.first < tile.length) {
    KeyGradTile<T, kWidth>(grads, tile, head).run();
  }
}

}  // namespace fastenc::cuda
