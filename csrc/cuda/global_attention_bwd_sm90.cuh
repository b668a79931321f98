// Attention without a window on Hopper, backward, device code (see global_attention_bwd_sm90.cu).
//
// grad_q and the gradients of k and v are the same walk with the roles of queries and keys changed:
//   a tile of 128 rows stays, blocks of 64 stream by:   grad_q: q, grad_out | k, v
//                                                       grad_k, grad_v: k, v | q, grad_out
//   scores = stay1 stream1^T, dp = stay2 stream2^T, ds = p (dp - delta)
//   first += ds stream1, second += p stream2 (grad_v)
// so that every gradient is a sum in one warpgroup's registers, in order.
#pragma once

#include "global_attention_sm90.cuh"

namespace fastenc::cuda::sm90 {

struct GlobalGradMaps {
  TensorMap stay1, stay2, stream1, stream2;
};

// delta = sum_d out grad_out - grad_lse, of every row.
template <typename T, int kHeadDim>
__global__ __launch_bounds__(kRotateThreads) void attention_delta_sm90(
    const __grid_constant__ AttentionGradArgs args) {
  const AttentionArgs& forward = args.forward;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRotateThreads + threadIdx.x;
  const int64_t token = row / forward.heads;
  if (token >= forward.total_tokens) {
    return;
  }
  const int head = static_cast<int>(row % forward.heads);
  const int64_t at = head * forward.total_tokens + token;
  const T *out = forward.out.at<T>(token, head), *grad = args.grad_out.at<T>(token, head);
  float delta = args.grad_lse == nullptr ? 0.0f : -args.grad_lse[at];
#pragma unroll 4
  for (int column = 0; column < kHeadDim; column += 8) {
    float x[8], g[8];
    load<8>(out + column, x);
    load<8>(grad + column, g);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      delta = fmaf(x[j], g[j], delta);
    }
  }
  args.delta[at] = delta;
}

template <int kHeadDim>
struct GlobalGradMemory {
  using Shape = GlobalGradShape<kHeadDim>;
  unsigned char *stay1, *stay2, *stream1, *stream2;
  Ring<1> stay;
  Ring<Shape::kStages> stream;
  volatile GlobalTile* tile;

  __device__ __forceinline__ GlobalGradMemory() {
    unsigned char* shared = aligned_shared();
    stay1 = shared + Shape::kStay1;
    stay2 = shared + Shape::kStay2;
    stream1 = shared + Shape::kStream1;
    stream2 = shared + Shape::kStream2;
    auto* barriers = reinterpret_cast<uint64_t*>(shared + Shape::kBarriers);
    stay = {barriers, barriers + 1};
    stream = {barriers + 2, barriers + 2 + Shape::kStages};
    tile = reinterpret_cast<GlobalTile*>(shared + Shape::kTile);
  }
  __device__ __forceinline__ void init() {
    stay.init(Shape::kGroups * 4);
    stream.init(Shape::kGroups * 4);
    mbarrier_publish();
  }
};

template <int kHeadDim>
__device__ __forceinline__ void global_grad_produce(GlobalGradMemory<kHeadDim>& m,
                                                    const GlobalGradMaps& maps,
                                                    const AttentionArgs& args,
                                                    const TileOrder& order, int64_t items) {
  using Shape = GlobalGradShape<kHeadDim>;
  using Stay = Tile<kHeadDim, Shape::kRows>;
  using Stream = Tile<kHeadDim, Shape::kBlock>;
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const GlobalTile t = global_tile<Shape::kRows>(args, order, item);
    const AttentionTile where{0, t.start, t.length, t.first};
    uint64_t* full = m.stay.await_empty();
    keep_tile(m.tile, t);
    mbarrier_expect(full, 2 * boxes_inside<Shape::kRows>(t.first, t.length) * Stay::kBoxBytes);
    load_rows<Stay>(m.stay1, maps.stay1, full, t.head, where, t.first);
    load_rows<Stay>(m.stay2, maps.stay2, full, t.head, where, t.first);
    ++m.stay.count;
#pragma unroll 1
    for (int row = 0; row < t.length; row += Shape::kBlock) {
      full = m.stream.await_empty();
      const int stage = m.stream.stage() * Stream::kBytes;
      mbarrier_expect(full, 2 * Stream::kBoxBytes);
      load_rows<Stream>(m.stream1 + stage, maps.stream1, full, t.head, where, row);
      load_rows<Stream>(m.stream2 + stage, maps.stream2, full, t.head, where, row);
      ++m.stream.count;
    }
  }
}

template <typename T, int kHeadDim, bool kOfKeys>
__device__ __forceinline__ void global_grad_consume(GlobalGradMemory<kHeadDim>& m,
                                                    const AttentionGradArgs& args, int group) {
  using Shape = GlobalGradShape<kHeadDim>;
  using Stay = Tile<kHeadDim, Shape::kRows>;
  using Stream = Tile<kHeadDim, Shape::kBlock>;
  constexpr float kLog2e = 1.44269504f;
  constexpr int kConsumers = Shape::kGroups * kGroupThreads;
  const AttentionArgs& forward = args.forward;
  m.stay.await_full();
  const GlobalTile t{m.tile->start, m.tile->length, m.tile->first, m.tile->head};
  const int own = group * kGroupRows, first = t.first + own;
  const int64_t stats = t.head * forward.total_tokens + t.start;
  float lse[2] = {}, delta[2] = {};
  if constexpr (!kOfKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + group_row() + half * 8;
      if (row < t.length) {
        lse[half] = forward.lse[stats + row] * kLog2e;
        delta[half] = args.delta[stats + row];
      }
    }
  }
  const uint32_t stay1 = shared_address(m.stay1), stay2 = shared_address(m.stay2);
  float first_sum[kHeadDim / 8][4] = {}, second_sum[kHeadDim / 8][4] = {};
#pragma unroll 1
  for (int block = 0; block < t.length; block += Shape::kBlock) {
    m.stream.await_full();
    unsigned char* stream1 = m.stream1 + m.stream.stage() * Stream::kBytes;
    unsigned char* stream2 = m.stream2 + m.stream.stage() * Stream::kBytes;
    if (block + Shape::kBlock > t.length) {
      clear_outside<Stream, kConsumers>(stream1, block, t.length, threadIdx.x - kGroupThreads);
      clear_outside<Stream, kConsumers>(stream2, block, t.length, threadIdx.x - kGroupThreads);
      fence_async_proxy();
      named_barrier(1 + Shape::kGroups, kConsumers);
    }
    float s[8][4] = {}, dp[8][4] = {};
    hold(s);
    hold(dp);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      wgmma<T, false, false>(s, Stay::along_rows(stay1, own, k),
                             Stream::along_rows(shared_address(stream1), 0, k), k > 0);
      wgmma<T, false, false>(dp, Stay::along_rows(stay2, own, k),
                             Stream::along_rows(shared_address(stream2), 0, k), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
    hold(dp);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = block + n * 8 + pair_of_lane() + j;
        const bool in = column < t.length;
        float column_lse = 0.0f, column_delta = 0.0f;
        if constexpr (kOfKeys) {
          column_lse = in ? forward.lse[stats + column] * kLog2e : 0.0f;
          column_delta = in ? args.delta[stats + column] : 0.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = half * 2 + j;
          const float p =
              fast_exp2(fmaf(s[n][i], forward.scale_log2, kOfKeys ? -column_lse : -lse[half]));
          s[n][i] = in ? p : 0.0f;
          dp[n][i] = in ? p * (dp[n][i] - (kOfKeys ? column_delta : delta[half])) : 0.0f;
        }
      }
    }
    uint32_t p[4][4], ds[4][4];
    pack_left<T>(ds, dp);
    if constexpr (kOfKeys) {
      pack_left<T>(p, s);
      hold(second_sum);
    }
    hold(first_sum);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma<T, true>(first_sum, ds[k], Stream::across_rows(shared_address(stream1), k * 16), true);
      if constexpr (kOfKeys) {
        wgmma<T, true>(second_sum, p[k], Stream::across_rows(shared_address(stream2), k * 16),
                       true);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(first_sum);
    if constexpr (kOfKeys) {
      hold(second_sum);
    }
    m.stream.release();
  }
  m.stay.release();
  if (forward.cos.data != nullptr) {
    const T *cos = static_cast<const T*>(forward.cos.data),
            *sin = static_cast<const T*>(forward.sin.data);
    rotate_back(first_sum, cos, sin, [&](int half) {
      const int row = first + group_row() + half * 8;
      return static_cast<int64_t>(row < t.length ? row : 0) * (kHeadDim / 2);
    });
  }
  const float factor[2] = {args.scale, args.scale}, one[2] = {1.0f, 1.0f};
  store_accumulators<T>(first_sum, factor, kOfKeys ? args.dk : args.dq, t.head, t.start, first,
                        t.length);
  if constexpr (kOfKeys) {
    store_accumulators<T>(second_sum, one, args.dv, t.head, t.start, first, t.length);
  }
}

// Warpgroup 0 is the producer; work items as in the forward.
template <typename T, int kHeadDim, bool kOfKeys>
__global__ __launch_bounds__(GlobalGradShape<kHeadDim>::kThreads, 1) void global_attention_bwd_sm90(
    const __grid_constant__ GlobalGradMaps maps, const __grid_constant__ AttentionGradArgs args,
    TileOrder order) {
#ifdef FASTENC_SM90
  using Shape = GlobalGradShape<kHeadDim>;
  GlobalGradMemory<kHeadDim> m;
  if (threadIdx.x == 0) {
    m.init();
  }
  __syncthreads();
  const AttentionArgs& forward = args.forward;
  const int64_t items = static_cast<int64_t>(order.first_tile[forward.num_seqs]) * forward.heads;
  const int group = group_id();
  if (group == 0) {
    release_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) {
      global_grad_produce(m, maps, forward, order, items);
    }
  } else {
    claim_registers<Shape::kConsumerRegisters>();
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      global_grad_consume<T, kHeadDim, kOfKeys>(m, args, group - 1);
    }
  }
#endif
}

}  // namespace fastenc::cuda::sm90
