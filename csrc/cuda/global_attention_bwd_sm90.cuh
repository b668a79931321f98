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
#include "sm90/attention_grad.cuh"

namespace fastenc::cuda::sm90 {

struct GlobalGradMaps {
  TensorMap stay1, stay2, stream1, stream2;
};

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
  QueryTerms of_row[2] = {};
  if constexpr (!kOfKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + group_row() + half * 8;
      if (row < t.length) {
        of_row[half] = {forward.lse[stats + row] * kLog2e, args.delta[stats + row]};
      }
    }
  }
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
    add_block<T, Stay, Stream, kOfKeys>(
        first_sum, second_sum, {m.stay1, m.stay2, own, stream1, stream2, 0}, forward.scale_log2,
        [&](int half, int column) {
          if (!kOfKeys || block + column >= t.length) {
            return of_row[half];
          }
          const int64_t at = stats + block + column;
          return QueryTerms{forward.lse[at] * kLog2e, args.delta[at]};
        },
        [&](int, int column) { return block + column < t.length; });
    m.stream.release();
  }
  m.stay.release();
  store_gradients<T, kOfKeys>(first_sum, second_sum, args, t.head, {0, t.start, t.length, t.first},
                              first);
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
