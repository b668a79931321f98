// The gradient of the queries (and of a relative bias): attention_bwd.cuh says how.
#pragma once

#include "attention_tile.cuh"

namespace fastenc::cuda {

constexpr float kLog2e = 1.44269504f;

// lse in units of the exponent; +inf, whose weights are zero, for a row without keys.
__device__ __forceinline__ float exponent_base(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kLog2e;
}

// delta, also kept for the other kernel, and lse of this thread's two rows; four lanes share a sum
// over head_dim. `grad_out`: the tile's rows in shared memory.
template <typename T>
__device__ __forceinline__ void read_rows(float (&delta)[2], float (&base)[2], const T* grad_out,
                                          int pitch, const AttentionGradArgs& grads,
                                          const AttentionTile& tile, int head, int rows) {
  const AttentionArgs& args = grads.forward;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = warp_id() * 16 + group_id() + half * 8;
    const bool inside = own < rows;
    const int64_t token = tile.start + tile.first + own;
    const int64_t at = head * args.total_tokens + token;
    float sum = 0.0f;
    if (inside) {
      const T* out = args.out.template at<T>(token, head);
      const T* grad = grad_out + own * pitch;
      if (args.vectors) {
        for (int column = lane_id() % 4 * kVector<T>; column < args.head_dim;
             column += 4 * kVector<T>) {
          float a[kVector<T>], b[kVector<T>];
          load<kVector<T>>(out + column, a);
          load<kVector<T>>(grad + column, b);
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) {
            sum = fmaf(a[i], b[i], sum);
          }
        }
      } else {
        for (int column = lane_id() % 4; column < args.head_dim; column += 4) {
          sum = fmaf(widen<T>(out[column]), widen<T>(grad[column]), sum);
        }
      }
    }
    sum = row_sum(sum);
    if (inside && grads.grad_lse != nullptr) {
      sum -= grads.grad_lse[at];
    }
    if (inside && lane_id() % 4 == 0) {
      grads.delta[at] = sum;
    }
    delta[half] = sum;
    base[half] = inside ? exponent_base(args.lse[at]) : INFINITY;
  }
}

template <typename T, int kWidth>
class QueryGradTile {
  using Shape = AttentionShape<sizeof(T), kWidth>;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kPitch = Shape::kPitch;

 public:
  __device__ __forceinline__ QueryGradTile(const AttentionGradArgs& grads,
                                           const AttentionTile& tile, int head)
      : grads_(grads), args_(grads.forward), tile_(tile), head_(head) {
    queries_ = reinterpret_cast<T*>(dynamic_shared());
    outs_ = queries_ + kAttentionRows * kPitch;
    keys_ = outs_ + kAttentionRows * kPitch;
    values_ = keys_ + Shape::kStages * kKeys * kPitch;
    staging_ = reinterpret_cast<float*>(values_ + Shape::kStages * kKeys * kPitch) +
               warp_id() * 16 * (kKeys + 4);
    rows_ = static_cast<int>(smaller(kAttentionRows, tile.length - tile.first));
    seen_ = seen_from(tile.first, tile.first + rows_ - 1, tile.length, args_.left, args_.right);
  }

  __device__ __forceinline__ void run(int64_t slot) {
    const int64_t first = tile_.start + tile_.first;
    load_tile<kAttentionRows, kWidth>(queries_, args_.q.template at<T>(first, head_),
                                      args_.q.token_stride, rows_, args_.head_dim, args_.vectors);
    load_tile<kAttentionRows, kWidth>(outs_, grads_.grad_out.template at<T>(first, head_),
                                      grads_.grad_out.token_stride, rows_, args_.head_dim,
                                      args_.vectors);
    if constexpr (Shape::kStages == 2) {
      fetch(seen_.begin, 0);
    }
    cp_async_commit();
    clear_bias();
    cp_async_wait<0>();
    __syncthreads();
    if (args_.cos.data != nullptr) {
      rotate_tile<kAttentionRows, kWidth>(queries_, tile_.first, rows_, args_);
      __syncthreads();
    }
    read_rows(delta_, base_, outs_, kPitch, grads_, tile_, head_, rows_);
    const LeftRows<T, kWidth, kWidth <= 64> queries(queries_ + warp_id() * 16 * kPitch, kPitch);
    const LeftRows<T, kWidth, kWidth <= 64> outs(outs_ + warp_id() * 16 * kPitch, kPitch);
    clear(dq_);
    const uint64_t seed = args_.drop_below ? static_cast<uint64_t>(*args_.seed) : 0;
    int stage = 0;
    for (int key = seen_.begin; key < seen_.end; key += kKeys) {
      await_block<Shape::kStages, kKeys>(key, seen_.end, stage,
                                         [this](int at, int to) { fetch(at, to); });
      rotate_block<kKeys, kWidth>(keys_ + stage * kKeys * kPitch, key, seen_.end - key, args_);
      step(queries, outs, key, keys_ + stage * kKeys * kPitch, values_ + stage * kKeys * kPitch,
           seed);
      stage = Shape::kStages - 1 - stage;
    }
    finish(slot);
  }

 private:
  __device__ __forceinline__ void fetch(int key, int stage) {
    load_keys<kKeys, kWidth>(keys_ + stage * kKeys * kPitch, values_ + stage * kKeys * kPitch,
                             args_, tile_, head_, key, seen_.end - key);
  }

  template <typename Left>
  __device__ __forceinline__ void step(const Left& queries, const Left& outs, int key,
                                       const T* keys, const T* values, uint64_t seed) {
    float p[kKeys / 8][4], dp[kKeys / 8][4];
    clear(p);
    multiply_transposed<kKeys, kWidth>(p, queries, keys, kPitch);
    const auto place = place_scores<Across::kQueries>(tile_.first, key);
    if (args_.prescale) {
      prescale(p, place, args_, head_);
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[n][i] = fast_exp2(fmaf(p[n][i], args_.factor, -base_[i / 2]));
      }
    }
    if (!fully_seen(tile_.first, kAttentionRows, key, kKeys, tile_.length, args_.left,
                    args_.right)) {
      mask(p, place, tile_, args_, 0.0f);
    }
    clear(dp);
    multiply_transposed<kKeys, kWidth>(dp, outs, values, kPitch);
    if (args_.drop_below) {
      drop(dp, place, tile_.start, head_, seed, args_.drop_below);
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[n][i] *= fmaf(dp[n][i], args_.keep_scale, -delta_[i / 2]);
      }
    }
    if (grads_.bias_partials != nullptr) {
      add_bias(p, key);
    }
    multiply<kWidth, kKeys>(dq_, p, keys, kPitch, staging_);
  }

  // ---- the gradient of the relative bias: sums along the diagonals of a block -------------------

  static constexpr int kScorePitch = kKeys + 1;
  static constexpr int kDiagonals = kAttentionRows + kKeys - 1;

  __device__ __forceinline__ float* scores() const {
    return reinterpret_cast<float*>(dynamic_shared() + Shape::dq_bytes());
  }
  __device__ __forceinline__ float* diagonals() const {
    return scores() + kAttentionRows * kScorePitch;
  }
  __device__ __forceinline__ float* distances() const { return diagonals() + kDiagonals + 1; }

  __device__ __forceinline__ void clear_bias() {
    if (grads_.bias_partials != nullptr) {
      for (int i = threadIdx.x; i < 2 * args_.bias_radius + 1; i += kAttentionThreads) {
        distances()[i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void add_bias(const float (&ds)[kKeys / 8][4], int key) {
    float* own = scores() + (warp_id() * 16 + group_id()) * kScorePitch + pair_column();
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        own[i / 2 * 8 * kScorePitch + n * 8 + i % 2] = ds[n][i];
      }
    }
    __syncthreads();
    const int radius = args_.bias_radius;
    const int lowest = key - tile_.first - (kAttentionRows - 1);  // distance of diagonal 0
    for (int d = threadIdx.x; d < kDiagonals; d += kAttentionThreads) {
      const int shift = d - (kAttentionRows - 1);  // key - query, within the block
      const int from = shift < 0 ? -shift : 0;
      const int to = static_cast<int>(smaller(kAttentionRows, kKeys - shift));
      float sum = 0.0f;
      for (int row = from; row < to; ++row) {
        sum += scores()[row * kScorePitch + row + shift];
      }
      diagonals()[d] = sum;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < kDiagonals; d += kAttentionThreads) {
      const int distance = lowest + d;
      if (distance > -radius && distance < radius) {
        distances()[distance + radius] += diagonals()[d];
      }
    }
    if (threadIdx.x < 2) {  // all that lies beyond the radius, on either side
      float sum = 0.0f;
      for (int d = 0; d < kDiagonals; ++d) {
        const int distance = lowest + d;
        if (threadIdx.x == 0 ? distance <= -radius : distance >= radius && radius > 0) {
          sum += diagonals()[d];
        }
      }
      distances()[threadIdx.x == 0 ? 0 : 2 * radius] += sum;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void finish(int64_t slot) {
    __syncthreads();
    if (grads_.bias_partials != nullptr) {
      const int64_t count = 2 * args_.bias_radius + 1;
      for (int i = threadIdx.x; i < count; i += kAttentionThreads) {
        grads_.bias_partials[(slot * args_.heads + head_) * count + i] = distances()[i];
      }
    }
    stage_rows<kWidth>(queries_ + warp_id() * 16 * kPitch, kPitch, dq_, grads_.scale, grads_.scale);
    __syncthreads();
    if (args_.cos.data != nullptr) {
      rotate_tile<kAttentionRows, kWidth>(queries_, tile_.first, rows_, args_, -1.0f);
      __syncthreads();
    }
    store_tile<kWidth>(queries_, grads_.dq.template at<T>(tile_.start + tile_.first, head_),
                       grads_.dq.token_stride, rows_, args_.head_dim, args_.vectors);
  }

  const AttentionGradArgs& grads_;
  const AttentionArgs& args_;
  const AttentionTile tile_;
  const int head_;
  T *queries_, *outs_, *keys_, *values_;
  float* staging_;
  int rows_;
  Range seen_;
  float dq_[kWidth / 8][4];
  float delta_[2], base_[2];
};

template <typename T, int kWidth>
__global__ __launch_bounds__(kAttentionThreads, 2) void varlen_attention_dq_kernel(
    const __grid_constant__ AttentionGradArgs grads) {
  const AttentionArgs& args = grads.forward;
  const int64_t slot = blockIdx.x / args.heads;
  const int head = blockIdx.x % args.heads;
  const AttentionTile tile = locate_tile(args.cu_seqlens, args.num_seqs, slot, kAttentionRows);
  if (tile.first < tile.length) {
    QueryGradTile<T, kWidth>(grads, tile, head).run(slot);
    return;
  }
  if (grads.bias_partials != nullptr) {
    const int64_t count = 2 * args.bias_radius + 1;
    for (int i = threadIdx.x; i < count; i += kAttentionThreads) {
      grads.bias_partials[(slot * args.heads + head) * count + i] = 0.0f;
    }
  }
}

// The partial sums of all slots: a block takes 32 entries of (heads, 2 radius + 1), eight warps
// take every eighth slot; always in the same order.
constexpr int kBiasSlices = 8;

template <typename T>
__global__ __launch_bounds__(kWarp* kBiasSlices) void bias_grad_kernel(
    const float* __restrict__ partials, T* __restrict__ out, int64_t slots, int64_t entries) {
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  const int64_t entry = int64_t{blockIdx.x} * kWarp + lane_id();
  float sum = 0.0f;
  if (entry < entries) {
    for (int64_t slot = warp_id(); slot < slots; slot += kBiasSlices) {
      sum += partials[slot * entries + entry];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp_id() == 0 && entry < entries) {
    for (int slice = 1; slice < kBiasSlices; ++slice) {
      sum += sums[slice * kWarp + lane_id()];
    }
    out[entry] = narrow<T>(sum);
  }
}

}  // namespace fastenc::cuda
