// Attention without a window on Hopper, device code (see global_attention_sm90.cu).
#pragma once

#include "sm90/attention.cuh"
#include "sm90/registers.cuh"
#include "sm90/ring.cuh"

namespace fastenc::cuda::sm90 {

struct GlobalAttentionMaps {
  TensorMap q, k, v;
};

// The sequences, longest first, and the tiles before each (`num_seqs` + 1 entries).
struct TileOrder {
  int32_t *sequence, *first_tile;
};

// One block. Sequences are ranked by counting: n^2 / kOrderThreads steps, so past kOrderMost they
// stay in their order.
template <int kRows>
__global__ __launch_bounds__(kOrderThreads) void attention_order_sm90(const int32_t* cu_seqlens,
                                                                      int32_t num_seqs,
                                                                      TileOrder order) {
  int32_t* sums = reinterpret_cast<int32_t*>(dynamic_shared());
  const int thread = threadIdx.x;
  for (int i = thread; i < num_seqs; i += kOrderThreads) {
    const int32_t length = cu_seqlens[i + 1] - cu_seqlens[i];
    int rank = num_seqs <= kOrderMost ? 0 : i;
    for (int j = 0; num_seqs <= kOrderMost && j < num_seqs; ++j) {
      const int32_t other = cu_seqlens[j + 1] - cu_seqlens[j];
      rank += other > length || (other == length && j < i);
    }
    order.sequence[rank] = i;
  }
  __syncthreads();
  // Each thread sums a run of ranks, then the runs before it.
  const int run = static_cast<int>(ceil_div(num_seqs, kOrderThreads));
  const auto tiles = [&](int rank) {
    const int32_t i = order.sequence[rank];
    return static_cast<int32_t>(ceil_div(cu_seqlens[i + 1] - cu_seqlens[i], kRows));
  };
  int32_t sum = 0;
  for (int rank = thread * run; rank < smaller((thread + 1) * run, num_seqs); ++rank) {
    sum += tiles(rank);
  }
  sums[thread] = sum;
  __syncthreads();
  int32_t before = 0;
  for (int i = 0; i < thread; ++i) {
    before += sums[i];
  }
  for (int rank = thread * run; rank < smaller((thread + 1) * run, num_seqs); ++rank) {
    order.first_tile[rank] = before;
    before += tiles(rank);
    if (rank == num_seqs - 1) {
      order.first_tile[num_seqs] = before;
    }
  }
}

// Rotated rows, (total_tokens, heads, head_dim) contiguous: each is read by every tile of the other
// side.
template <typename T, int kHeadDim>
__global__ __launch_bounds__(kRotateThreads) void rotate_rows_sm90(
    const __grid_constant__ AttentionArgs args, HeadRows from, T* out) {
  constexpr int kChunks = kHeadDim / 16;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kRotateThreads + threadIdx.x;
  const int64_t row = item / kChunks, token = row / args.heads;
  if (token >= args.total_tokens) {
    return;
  }
  const int chunk = static_cast<int>(item % kChunks), head = static_cast<int>(row % args.heads);
  const int64_t seq = find_sequence(args.cu_seqlens, args.num_seqs, token);
  const int64_t at = (token - args.cu_seqlens[seq]) * (kHeadDim / 2) + chunk * 8;
  const T* x = from.at<T>(token, head) + chunk * 8;
  rotate_chunk<kGlobal>(x, x + kHeadDim / 2, out + row * kHeadDim + chunk * 8,
                        out + row * kHeadDim + kHeadDim / 2 + chunk * 8,
                        static_cast<const T*>(args.cos.data) + at,
                        static_cast<const T*>(args.sin.data) + at);
}

struct GlobalTile {
  int start, length, first, head;
};

__device__ __forceinline__ void keep_tile(volatile GlobalTile* kept, const GlobalTile& tile) {
  kept->start = tile.start;
  kept->length = tile.length;
  kept->first = tile.first;
  kept->head = tile.head;
}

// Work item `item`: heads of the first sequence in order, each with all its tiles, and so on.
template <int kRows>
__device__ __forceinline__ GlobalTile global_tile(const AttentionArgs& args, const TileOrder& order,
                                                  int64_t item) {
  int low = 0, high = args.num_seqs;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (static_cast<int64_t>(order.first_tile[middle]) * args.heads <= item) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int seq = order.sequence[low];
  const int tiles = order.first_tile[low + 1] - order.first_tile[low];
  const int rest =
      static_cast<int>(item - static_cast<int64_t>(order.first_tile[low]) * args.heads);
  return {args.cu_seqlens[seq], args.cu_seqlens[seq + 1] - args.cu_seqlens[seq],
          rest % tiles * kRows, rest / tiles};
}

template <typename T, int kHeadDim>
struct GlobalMemory {
  using Shape = GlobalShape<kHeadDim>;
  unsigned char *q, *k, *v;
  Ring<1> q_ring;
  Ring<Shape::kStages> k_ring, v_ring;
  volatile GlobalTile* tile;

  __device__ __forceinline__ GlobalMemory() {
    unsigned char* shared = aligned_shared();
    q = shared + Shape::kQuery;
    k = shared + Shape::kKey;
    v = shared + Shape::kValue;
    auto* barriers = reinterpret_cast<uint64_t*>(shared + Shape::kBarriers);
    q_ring = {barriers, barriers + 1};
    k_ring = {barriers + 2, barriers + 2 + Shape::kStages};
    v_ring = {barriers + 2 + 2 * Shape::kStages, barriers + 2 + 3 * Shape::kStages};
    tile = reinterpret_cast<GlobalTile*>(shared + Shape::kTile);
  }
  __device__ __forceinline__ void init() {
    q_ring.init(Shape::kGroups * 4);
    k_ring.init(Shape::kGroups * 4);
    v_ring.init(Shape::kGroups * 4);
    mbarrier_publish();
  }
};

// One thread: walks the same work items as the consumers, ahead of them.
template <typename T, int kHeadDim>
__device__ __forceinline__ void global_produce(GlobalMemory<T, kHeadDim>& m,
                                               const GlobalAttentionMaps& maps,
                                               const AttentionArgs& args, const TileOrder& order,
                                               int64_t items) {
  using Shape = GlobalShape<kHeadDim>;
  using Query = Tile<kHeadDim, Shape::kRows>;
  using Key = Tile<kHeadDim, Shape::kKeys>;
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const GlobalTile t = global_tile<Shape::kRows>(args, order, item);
    const AttentionTile where{0, t.start, t.length, t.first};
    uint64_t* full = m.q_ring.await_empty();
    keep_tile(m.tile, t);
    mbarrier_expect(full, boxes_inside<Shape::kRows>(t.first, t.length) * Query::kBoxBytes);
    load_rows<Query>(m.q, maps.q, full, t.head, where, t.first);
    ++m.q_ring.count;
#pragma unroll 1
    for (int key = 0; key < t.length; key += Shape::kKeys) {
      const uint32_t bytes = boxes_inside<Shape::kKeys>(key, t.length) * Key::kBoxBytes;
      full = m.k_ring.await_empty();
      mbarrier_expect(full, bytes);
      load_rows<Key>(m.k + m.k_ring.stage() * Key::kBytes, maps.k, full, t.head, where, key);
      ++m.k_ring.count;
      full = m.v_ring.await_empty();
      mbarrier_expect(full, bytes);
      load_rows<Key>(m.v + m.v_ring.stage() * Key::kBytes, maps.v, full, t.head, where, key);
      ++m.v_ring.count;
    }
  }
}

// Scores of a block to weights in place; the rows' maxima and sums go on. Returns what earlier
// outputs are to be scaled by.
struct Rescale {
  float by[2];
};

template <int kTiles>
__device__ __forceinline__ Rescale online_softmax(float (&s)[kTiles][4], RowStatistics& rows,
                                                  float scale_log2) {
  Rescale scale;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = s[0][half * 2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      largest = fmaxf(largest, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    }
    largest = fmaxf(rows.largest[half], quad_max(largest) * scale_log2);
    scale.by[half] = fast_exp2(rows.largest[half] - largest);
    rows.largest[half] = largest;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = half * 2; i < half * 2 + 2; ++i) {
        s[n][i] = fast_exp2(fmaf(s[n][i], scale_log2, -largest));
        sum += s[n][i];
      }
    }
    rows.sum[half] = fmaf(rows.sum[half], scale.by[half], sum);  // of this lane; the quad's at last
  }
  return scale;
}

template <int kTiles>
__device__ __forceinline__ void mask_from(float (&s)[kTiles][4], int end) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = n * 8 + pair_of_lane() + i % 2 < end ? s[n][i] : -INFINITY;
    }
  }
}

template <typename T, typename Query, typename Key, int kTiles>
__device__ __forceinline__ void issue_scores(float (&s)[kTiles][4], uint32_t q, int row,
                                             uint32_t k) {
#pragma unroll
  for (int step = 0; step < Query::kChunks / 2; ++step) {
    wgmma<T, false, false>(s, Query::along_rows(q, row, step), Key::along_rows(k, 0, step),
                           step > 0);
  }
  wgmma_commit();
}

template <typename T, typename Key, int kTiles, int kSteps>
__device__ __forceinline__ void issue_outputs(float (&o)[kTiles][4], const uint32_t (&p)[kSteps][4],
                                              uint32_t v, bool onto) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma<T, true>(o, p[step], Key::across_rows(v, step * 16), onto || step > 0);
  }
  wgmma_commit();
}

// A consumer warpgroup's 64 queries of one tile: the next block's scores and this block's outputs
// are under way while this block's weights are made (FlashAttention-3, Shah et al. 2024).
template <typename T, int kHeadDim>
__device__ __forceinline__ void global_consume(GlobalMemory<T, kHeadDim>& m,
                                               const AttentionArgs& args, int group) {
  using Shape = GlobalShape<kHeadDim>;
  using Query = Tile<kHeadDim, Shape::kRows>;
  using Key = Tile<kHeadDim, Shape::kKeys>;
  m.q_ring.await_full();
  const GlobalTile t{m.tile->start, m.tile->length, m.tile->first, m.tile->head};
  const int first = t.first + group * kGroupRows;
  if (args.cos.data != nullptr) {
    rotate_own_rows<T, Query>(m.q, group * kGroupRows, args, t.first, t.length);
    fence_async_proxy();
    named_barrier(1 + group, kGroupThreads);
  }
  const uint32_t q = shared_address(m.q);
  RowStatistics rows{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  float s[Shape::kKeys / 8][4] = {}, o[kHeadDim / 8][4] = {};
  uint32_t p[Shape::kKeys / 16][4];
  m.k_ring.await_full();
  hold(s);
  wgmma_fence();
  issue_scores<T, Query, Key>(s, q, group * kGroupRows,
                              shared_address(m.k) + m.k_ring.stage() * Key::kBytes);
  wgmma_wait<0>();
  hold(s);
  m.k_ring.release();
  if (t.length < Shape::kKeys) {
    mask_from(s, t.length);
  }
  online_softmax(s, rows, args.scale_log2);
  pack_left<T>(p, s);
#pragma unroll 1
  for (int key = Shape::kKeys; key < t.length; key += Shape::kKeys) {
    m.k_ring.await_full();
    hold(s);
    hold(o);
    wgmma_fence();
    issue_scores<T, Query, Key>(s, q, group * kGroupRows,
                                shared_address(m.k) + m.k_ring.stage() * Key::kBytes);
    m.v_ring.await_full();
    wgmma_fence();
    issue_outputs<T, Key>(o, p, shared_address(m.v) + m.v_ring.stage() * Key::kBytes,
                          key > Shape::kKeys);
    wgmma_wait<1>();
    hold(s);
    m.k_ring.release();
    if (key + Shape::kKeys > t.length) {
      mask_from(s, t.length - key);
    }
    const Rescale scale = online_softmax(s, rows, args.scale_log2);
    wgmma_wait_after<0>(rows.sum[0] + rows.sum[1]);
    hold(o);
    m.v_ring.release();
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        o[n][i] *= scale.by[i / 2];
      }
    }
    pack_left<T>(p, s);
  }
  m.q_ring.release();
  m.v_ring.await_full();
  unsigned char* values = m.v + m.v_ring.stage() * Key::kBytes;
  const int last_block = (t.length - 1) / Shape::kKeys * Shape::kKeys;
  if (last_block + Shape::kKeys > t.length) {
    clear_outside<Key, Shape::kGroups * kGroupThreads>(values, last_block, t.length,
                                                       threadIdx.x - kGroupThreads);
    fence_async_proxy();
    named_barrier(1 + Shape::kGroups, Shape::kGroups * kGroupThreads);
  }
  hold(o);
  wgmma_fence();
  issue_outputs<T, Key>(o, p, shared_address(values), last_block > 0);
  wgmma_wait<0>();
  hold(o);
  m.v_ring.release();
  rows.sum[0] = quad_sum(rows.sum[0]);
  rows.sum[1] = quad_sum(rows.sum[1]);
  store_rows<T>(o, rows, args, t.head, {0, t.start, t.length, t.first}, first);
}

// Warpgroup 0 is the producer; a block walks work items blockIdx.x, blockIdx.x + gridDim.x, ...
template <typename T, int kHeadDim>
__global__ __launch_bounds__(GlobalShape<kHeadDim>::kThreads, 1) void global_attention_fwd_sm90(
    const __grid_constant__ GlobalAttentionMaps maps, const __grid_constant__ AttentionArgs args,
    TileOrder order) {
#ifdef FASTENC_SM90
  using Shape = GlobalShape<kHeadDim>;
  GlobalMemory<T, kHeadDim> m;
  if (threadIdx.x == 0) {
    m.init();
  }
  __syncthreads();
  const int64_t items = static_cast<int64_t>(order.first_tile[args.num_seqs]) * args.heads;
  const int group = group_id();
  if (group == 0) {
    release_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) {
      global_produce(m, maps, args, order, items);
    }
  } else {
    claim_registers<Shape::kConsumerRegisters>();
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      global_consume(m, args, group - 1);
    }
  }
#endif
}

}  // namespace fastenc::cuda::sm90
