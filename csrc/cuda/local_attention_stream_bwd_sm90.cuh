// Windowed attention on Hopper, backward in a stream, device code (see
// local_attention_stream_bwd_sm90.cu).
//
// A pair of blocks goes through three hands: the loader brings it (`loaded`), the preparers rotate
// it and clear what is not of the sequence (`ready`), both consumer warpgroups read it (`empty`).
// All three walk the same list: of each head, the tile, then the halo of its queries, then the halo
// of its keys.
#pragma once

#include "sm90/attention_grad.cuh"
#include "sm90/registers.cuh"
#include "sm90/ring.cuh"

namespace fastenc::cuda::sm90 {

// Of the tile's operands, two blocks each.
enum StayPart { kStayQuery = 0, kStayKey = 2, kStayValue = 4, kStayGrad = 6 };

template <int kHeadDim>
struct LocalStreamMemory {
  using Shape = LocalStreamShape<kHeadDim>;
  using Block = Tile<kHeadDim, kBoxRows>;
  static_assert(Block::kBytes == Shape::kBlockBytes);
  Ring<Shape::kStays> stay;  // this thread's view: what it awaits, and what it frees
  Ring<Shape::kStages> stream;

  static __device__ __forceinline__ uint64_t* barriers(int which) {
    return reinterpret_cast<uint64_t*>(aligned_shared() + Shape::kBarriers) +
           which * (Shape::kStays + Shape::kStages);
  }
  __device__ __forceinline__ explicit LocalStreamMemory(bool consumer) {
    uint64_t *full = barriers(consumer ? 1 : 0), *empty = barriers(2);
    stay = {full, empty};
    stream = {full + Shape::kStays, empty + Shape::kStays};
  }
  // Of the block, for the consumers, whose registers are full.
  static __device__ __forceinline__ KeptTile& kept() {
    return *reinterpret_cast<KeptTile*>(aligned_shared() + Shape::kTile);
  }
  static __device__ __forceinline__ void init() {
    for (int i = 0; i < Shape::kStays + Shape::kStages; ++i) {
      mbarrier_init(barriers(0) + i, 1);
      mbarrier_init(barriers(1) + i, Shape::kPreparers);
      mbarrier_init(barriers(2) + i, Shape::kGroups * 4);
    }
    mbarrier_publish();
  }
  __device__ __forceinline__ unsigned char* stay_block(int part, int block) const {
    return aligned_shared() + stay.stage() * Shape::kStayBytes +
           (part + block) * Shape::kBlockBytes;
  }
  __device__ __forceinline__ unsigned char* stream_block(int which) const {
    return aligned_shared() + Shape::kStream + stream.stage() * Shape::kStageBytes +
           which * Shape::kBlockBytes;
  }
  // lse in base 2 of `rows` rows, then their delta.
  __device__ __forceinline__ float* stay_terms() const {
    return reinterpret_cast<float*>(aligned_shared() + Shape::kStayTerms) +
           stay.stage() * 2 * Shape::kRows;
  }
  __device__ __forceinline__ float* stream_terms() const {
    return reinterpret_cast<float*>(aligned_shared() + Shape::kStreamTerms) +
           stream.stage() * 2 * kBoxRows;
  }
};

// What the tile's rows see as queries, or what sees them as keys.
__device__ __forceinline__ Halo tile_halo(const AttentionArgs& args, const AttentionTile& tile,
                                          bool of_keys) {
  return halo_of(tile.first, tile.length, of_keys ? args.right : args.left,
                 of_keys ? args.left : args.right);
}

// One thread.
template <int kHeadDim>
__device__ __forceinline__ void local_stream_load(const GradMaps& maps, const AttentionArgs& args,
                                                  const AttentionTile& tile, int first_head,
                                                  int last_head) {
  using Shape = LocalStreamShape<kHeadDim>;
  using Block = Tile<kHeadDim, kBoxRows>;
  LocalStreamMemory<kHeadDim> m(false);
#pragma unroll 1
  for (int head = first_head; head < last_head; ++head) {
    uint64_t* loaded = m.stay.await_empty();
    mbarrier_expect(loaded,
                    4 * boxes_inside<Shape::kRows>(tile.first, tile.length) * Block::kBoxBytes);
#pragma unroll
    for (int block = 0; block < Shape::kGroups; ++block) {
      const int row = tile.first + block * kBoxRows;
      load_rows<Block>(m.stay_block(kStayQuery, block), maps.q, loaded, head, tile, row);
      load_rows<Block>(m.stay_block(kStayKey, block), maps.k, loaded, head, tile, row);
      load_rows<Block>(m.stay_block(kStayValue, block), maps.v, loaded, head, tile, row);
      load_rows<Block>(m.stay_block(kStayGrad, block), maps.grad_out, loaded, head, tile, row);
    }
    ++m.stay.count;
#pragma unroll 1
    for (int of_keys = 0; of_keys < 2; ++of_keys) {
      const Halo halo = tile_halo(args, tile, of_keys);
      const TensorMap &map1 = of_keys ? maps.q : maps.k, &map2 = of_keys ? maps.grad_out : maps.v;
#pragma unroll 1
      for (int i = 0; i < halo.count; ++i) {
        const int row = halo_row(halo, tile.first, i);
        loaded = m.stream.await_empty();
        mbarrier_expect(loaded, 2 * Block::kBoxBytes);
        load_rows<Block>(m.stream_block(0), map1, loaded, head, tile, row);
        load_rows<Block>(m.stream_block(1), map2, loaded, head, tile, row);
        ++m.stream.count;
      }
    }
  }
}

// Rotates a block in place, kBatch chunks a thread at a time: their cos and sin are read together.
template <typename T, typename Block, int kThreads>
__device__ __forceinline__ void rotate_block(unsigned char* block, const AttentionArgs& args,
                                             int first, int length, int thread) {
  constexpr int kChunks = Block::kChunks / 2, kItems = kBoxRows * kChunks, kBatch = 3;
#pragma unroll 1
  for (int start = thread; start < kItems; start += kBatch * kThreads) {
    uint4 cos[kBatch] = {}, sin[kBatch] = {};
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = start + j * kThreads;
      const int row = first + spread_row(i / kChunks);
      if (i < kItems && row < length) {
        const int64_t at = static_cast<int64_t>(row) * kChunks + i % kChunks;
        cos[j] = static_cast<const uint4*>(args.cos.data)[at];
        sin[j] = static_cast<const uint4*>(args.sin.data)[at];
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = start + j * kThreads;
      const int row = spread_row(i / kChunks);
      if (i < kItems && first + row < length) {
        T* low = reinterpret_cast<T*>(block + Block::chunk_offset(row, i % kChunks));
        T* high = reinterpret_cast<T*>(block + Block::chunk_offset(row, i % kChunks + kChunks));
        rotate_chunk(low, high, low, high, reinterpret_cast<const T*>(&cos[j]),
                     reinterpret_cast<const T*>(&sin[j]));
      }
    }
  }
}

// lse log2(e) and delta of `kRows` rows from row `first` of the sequence on; those past its end get
// what makes their weights and gradients 0.
template <int kRows, int kThreads>
__device__ __forceinline__ void stage_terms(float* terms, const AttentionGradArgs& args, int head,
                                            const AttentionTile& tile, int first, int thread) {
  constexpr float kLog2e = 1.44269504f;
  const int64_t at = head * args.forward.total_tokens + tile.start + first;
#pragma unroll 1
  for (int row = thread; row < kRows; row += kThreads) {
    const bool in = first + row < tile.length;
    terms[row] = in ? args.forward.lse[at + row] * kLog2e : INFINITY;
    terms[kRows + row] = in ? args.delta[at + row] : 0.0f;
  }
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void local_stream_prepare(const AttentionGradArgs& args,
                                                     const AttentionTile& tile, int first_head,
                                                     int last_head, int thread) {
  using Shape = LocalStreamShape<kHeadDim>;
  using Block = Tile<kHeadDim, kBoxRows>;
  constexpr int kThreads = Shape::kPreparers;
  LocalStreamMemory<kHeadDim> m(false);
  const bool rotary = args.forward.cos.data != nullptr;
  const auto prepare = [&](unsigned char* block, int row, bool turn) {
    if (turn && rotary) {
      rotate_block<T, Block, kThreads>(block, args.forward, row, tile.length, thread);
    }
    if (row + kBoxRows > tile.length) {
      clear_outside<Block, kThreads>(block, row, tile.length, thread);
    }
  };
  uint64_t* ready = m.barriers(1);
#pragma unroll 1
  for (int head = first_head; head < last_head; ++head) {
    m.stay.await_full();
    stage_terms<Shape::kRows, kThreads>(m.stay_terms(), args, head, tile, tile.first, thread);
#pragma unroll 1
    for (int i = 0; i < 4 * Shape::kGroups; ++i) {
      prepare(m.stay_block(0, i), tile.first + i % Shape::kGroups * kBoxRows, i < kStayValue);
    }
    fence_async_proxy();
    mbarrier_arrive(ready + m.stay.stage());
    ++m.stay.count;
#pragma unroll 1
    for (int of_keys = 0; of_keys < 2; ++of_keys) {
      const Halo halo = tile_halo(args.forward, tile, of_keys);
#pragma unroll 1
      for (int i = 0; i < halo.count; ++i) {
        const int row = halo_row(halo, tile.first, i);
        m.stream.await_full();
        prepare(m.stream_block(0), row, true);
        prepare(m.stream_block(1), row, false);
        if (of_keys) {
          stage_terms<kBoxRows, kThreads>(m.stream_terms(), args, head, tile, row, thread);
        }
        fence_async_proxy();
        mbarrier_arrive(ready + Shape::kStays + m.stream.stage());
        ++m.stream.count;
      }
    }
  }
}

// A consumer warpgroup's 64 rows. They are queries: first_sum = grad_q, against the keys that they
// see; or keys: first_sum = grad_k, second_sum = grad_v, against the queries that see them, scores
// transposed. Sums go by the tile's own blocks, then by the halo's.
template <typename T, int kHeadDim, bool kOfKeys>
__device__ __forceinline__ void local_stream_walk(LocalStreamMemory<kHeadDim>& m,
                                                  const AttentionGradArgs& args, int head,
                                                  int group) {
  using Shape = LocalStreamShape<kHeadDim>;
  using Block = Tile<kHeadDim, kBoxRows>;
  const AttentionArgs& forward = args.forward;
  const int back = kOfKeys ? forward.right : forward.left;
  const int ahead = kOfKeys ? forward.left : forward.right;
  const AttentionTile tile = reread(m.kept());
  const int first = tile.first + group * kGroupRows;
  const Halo halo = tile_halo(forward, tile, kOfKeys);
  const unsigned char* own1 = m.stay_block(kOfKeys ? kStayKey : kStayQuery, group);
  const unsigned char* own2 = m.stay_block(kOfKeys ? kStayValue : kStayGrad, group);
  QueryTerms of_row[2];
  Range seen[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group_row() + half * 8;
    const float* terms = m.stay_terms() + group * kGroupRows + row;
    of_row[half] = {terms[0], terms[Shape::kRows]};
    seen[half] = {first + row - back,
                  static_cast<int>(smaller(tile.length, int64_t{first} + row + ahead + 1))};
  }
  float first_sum[kHeadDim / 8][4] = {}, second_sum[kHeadDim / 8][4] = {};
#pragma unroll 1
  for (int i = 0; i < Shape::kGroups + halo.count; ++i) {
    const bool streamed = i >= Shape::kGroups;
    int row = tile.first + i * kBoxRows;
    const unsigned char* met1 = m.stay_block(kOfKeys ? kStayQuery : kStayKey, i);
    const unsigned char* met2 = m.stay_block(kOfKeys ? kStayGrad : kStayValue, i);
    const float* lse = m.stay_terms() + i * kBoxRows;
    const float* delta = lse + Shape::kRows;
    if (streamed) {
      m.stream.await_full();
      row = halo_row(halo, tile.first, i - Shape::kGroups);
      met1 = m.stream_block(0);
      met2 = m.stream_block(1);
      lse = m.stream_terms();
      delta = lse + kBoxRows;
    }
    if (blocks_meet(first, row, tile.length, back, ahead)) {
      add_block<T, Block, Block, kOfKeys>(
          first_sum, second_sum, {own1, own2, 0, met1, met2, 0}, forward.scale_log2,
          [&](int half, int column) {
            return kOfKeys ? QueryTerms{lse[column], delta[column]} : of_row[half];
          },
          [&](int half, int column) {
            return row + column >= seen[half].begin && row + column < seen[half].end;
          });
    }
    if (streamed) {
      m.stream.release();
    }
  }
  const AttentionTile again = reread(m.kept());
  store_gradients<T, kOfKeys>(first_sum, second_sum, args, head, again,
                              again.first + group * kGroupRows);
}

template <typename T, int kHeadDim>
__global__ __launch_bounds__(
    LocalStreamShape<kHeadDim>::kThreads,
    1) void local_attention_stream_bwd_sm90(const __grid_constant__ GradMaps maps,
                                            const __grid_constant__ AttentionGradArgs args,
                                            int heads_per_block) {
#ifdef FASTENC_SM90
  using Shape = LocalStreamShape<kHeadDim>;
  const AttentionArgs& forward = args.forward;
  const AttentionTile tile =
      locate_tile(forward.cu_seqlens, forward.num_seqs, blockIdx.x, Shape::kRows);
  if (tile.first >= tile.length) {
    return;
  }
  const int first_head = blockIdx.y * heads_per_block;
  const int last_head = static_cast<int>(smaller(first_head + heads_per_block, forward.heads));
  if (threadIdx.x == 0) {
    LocalStreamMemory<kHeadDim>::init();
    LocalStreamMemory<kHeadDim>::kept() = {tile.start, tile.length, tile.first, last_head};
  }
  __syncthreads();
  const int group = group_id();
  if (group == 0) {
    release_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) {
      local_stream_load<kHeadDim>(maps, forward, tile, first_head, last_head);
    } else if (threadIdx.x >= 32) {
      local_stream_prepare<T, kHeadDim>(args, tile, first_head, last_head, threadIdx.x - 32);
    }
  } else {
    claim_registers<Shape::kConsumerRegisters>();
    LocalStreamMemory<kHeadDim> m(true);
#pragma unroll 1
    for (int head = first_head; head < last(m.kept()); ++head) {
      m.stay.await_full();
      local_stream_walk<T, kHeadDim, false>(m, args, head, group_id() - 1);
      local_stream_walk<T, kHeadDim, true>(m, args, head, group_id() - 1);
      m.stay.release();
    }
  }
#endif
}

}  // namespace fastenc::cuda::sm90
