// Windowed attention on Hopper, backward, device code (see local_attention_bwd_sm90.cu).
#pragma once

#include "sm90/attention_grad.cuh"

namespace fastenc::cuda::sm90 {

// Where a block keeps its rows: tile rows, from `reach` before its first own row on.
template <typename T>
struct LocalGradMemory {
  unsigned char *q, *k, *v, *grad_out;
  T *cos, *sin;
  float *lse, *delta;  // of the tile's rows; lse in base 2
  uint64_t* full;
  KeptTile* kept;
};

template <typename T, int kHeadDim, int kReach>
__device__ __forceinline__ LocalGradMemory<T> local_grad_memory() {
  using Shape = LocalGradShape<kHeadDim, kReach>;
  unsigned char* shared = aligned_shared();
  return {shared + Shape::kQuery,
          shared + Shape::kKey,
          shared + Shape::kValue,
          shared + Shape::kGrad,
          reinterpret_cast<T*>(shared + Shape::kCos),
          reinterpret_cast<T*>(shared + Shape::kSin),
          reinterpret_cast<float*>(shared + Shape::kLse),
          reinterpret_cast<float*>(shared + Shape::kDelta),
          reinterpret_cast<uint64_t*>(shared + Shape::kBarrier),
          reinterpret_cast<KeptTile*>(shared + Shape::kBarrier + 8)};
}

// lse log2(e), and delta = sum_d out grad_out - grad_lse, of the tile's rows: a thread a row. Rows
// outside of the sequence get what makes their weights and gradients 0.
template <typename T, typename Rows, int kThreads>
__device__ __forceinline__ void local_row_terms(const LocalGradMemory<T>& m,
                                                const AttentionGradArgs& args, int head,
                                                const AttentionTile& tile, int first) {
  constexpr float kLog2e = 1.44269504f;
  const AttentionArgs& forward = args.forward;
#pragma unroll 1
  for (int row = threadIdx.x; row < Rows::kRowCount; row += kThreads) {
    if (first + row < 0 || first + row >= tile.length) {
      m.lse[row] = INFINITY;
      m.delta[row] = 0.0f;
      continue;
    }
    const int64_t token = static_cast<int64_t>(tile.start) + first + row;
    const int64_t at = head * forward.total_tokens + token;
    const T* out = forward.out.at<T>(token, head);
    float delta = args.grad_lse == nullptr ? 0.0f : -args.grad_lse[at];
#pragma unroll 2
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      float x[8], g[8];
      load<8>(out + chunk * 8, x);
      load<8>(reinterpret_cast<const T*>(m.grad_out + Rows::chunk_offset(row, chunk)), g);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        delta = fmaf(x[j], g[j], delta);
      }
    }
    m.lse[row] = forward.lse[at] * kLog2e;
    m.delta[row] = delta;
  }
}

// grad_q of this warpgroup's rows, over the blocks of 64 keys in their reach; or (kOfKeys) grad_k
// and grad_v, over the blocks of 64 queries that may see them, scores transposed, so that the
// weights stay in registers.
template <typename T, int kHeadDim, int kReach, bool kOfKeys>
__device__ __forceinline__ void local_gradients(const LocalGradMemory<T>& m,
                                                const AttentionGradArgs& args, int head,
                                                int group) {
  using Shape = LocalGradShape<kHeadDim, kReach>;
  using Rows = Tile<kHeadDim, Shape::kTileRows>;
  const AttentionArgs& forward = args.forward;
  const AttentionTile tile = reread(*m.kept);
  const int own = kReach + group * kGroupRows, first = tile.first + group * kGroupRows;
  QueryTerms of_row[2];
  Range seen[2];  // a key is seen from `right` before it to `left` after it
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group_row() + half * 8;
    of_row[half] = {m.lse[own + row], m.delta[own + row]};
    seen[half] =
        seen_columns(row, first, tile.length, kReach, kOfKeys ? forward.right : forward.left,
                     kOfKeys ? forward.left : forward.right);
  }
  float first_sum[kHeadDim / 8][4] = {}, second_sum[kHeadDim / 8][4] = {};
#pragma unroll 1
  for (int block = 0; block < Shape::kBlocks; ++block) {
    const int met = (group + block) * kGroupRows;  // of the tile
    const GradBlocks blocks = kOfKeys ? GradBlocks{m.k, m.v, own, m.q, m.grad_out, met}
                                      : GradBlocks{m.q, m.grad_out, own, m.k, m.v, met};
    add_block<T, Rows, Rows, kOfKeys>(
        first_sum, second_sum, blocks, forward.scale_log2,
        [&](int half, int column) {
          return kOfKeys ? QueryTerms{m.lse[met + column], m.delta[met + column]} : of_row[half];
        },
        [&](int half, int column) {
          column += block * kGroupRows;
          return column >= seen[half].begin && column < seen[half].end;
        });
  }
  store_gradients<T, kOfKeys>(
      first_sum, second_sum, args, m.cos, m.sin,
      [&](int half) { return spread_slot(own + group_row() + half * 8) * (kHeadDim / 2); }, head,
      tile, first);
}

template <typename T, int kHeadDim, int kReach>
__global__ __launch_bounds__(
    LocalGradShape<kHeadDim, kReach>::kThreads,
    1) void local_attention_bwd_sm90(const __grid_constant__ GradMaps maps,
                                     const __grid_constant__ AttentionGradArgs args,
                                     int heads_per_block) {
#ifdef FASTENC_SM90
  using Shape = LocalGradShape<kHeadDim, kReach>;
  using Rows = Tile<kHeadDim, Shape::kTileRows>;
  constexpr int kThreads = Shape::kThreads;
  const AttentionArgs& forward = args.forward;
  const AttentionTile found =
      locate_tile(forward.cu_seqlens, forward.num_seqs, blockIdx.x, Shape::kRows);
  if (found.first >= found.length) {
    return;
  }
  const int first_head = blockIdx.y * heads_per_block;
  const int last_head = static_cast<int>(smaller(first_head + heads_per_block, forward.heads));
  const LocalGradMemory<T> m = local_grad_memory<T, kHeadDim, kReach>();
  const auto load = [&](const AttentionTile& tile, int head) {
    const int first = tile.first - kReach;
    mbarrier_expect(m.full,
                    4 * boxes_inside<Shape::kTileRows>(first, tile.length) * Rows::kBoxBytes);
    load_rows<Rows>(m.q, maps.q, m.full, head, tile, first);
    load_rows<Rows>(m.k, maps.k, m.full, head, tile, first);
    load_rows<Rows>(m.v, maps.v, m.full, head, tile, first);
    load_rows<Rows>(m.grad_out, maps.grad_out, m.full, head, tile, first);
  };
  if (threadIdx.x == 0) {
    mbarrier_init(m.full, 1);
    mbarrier_publish();
    load(found, first_head);
    *m.kept = {found.start, found.length, found.first, last_head};
  }
  const bool rotary = forward.cos.data != nullptr;
  if (rotary) {
    stage_rotation<kHeadDim, Shape::kTileRows, kThreads>(m.cos, m.sin, forward,
                                                         found.first - kReach, found.length);
  }
  __syncthreads();
  uint32_t parity = 0;
#pragma unroll 1
  for (int head = first_head; head < last(*m.kept); ++head, parity ^= 1) {
    mbarrier_wait(m.full, parity);
    {
      const AttentionTile tile = reread(*m.kept);
      const int first = tile.first - kReach;
      if (rotary) {
        rotate<T, Rows, kThreads>(m.q, m.cos, m.sin, 0, first, tile.length);
        rotate<T, Rows, kThreads>(m.k, m.cos, m.sin, 0, first, tile.length);
      }
      if (first < 0 || first + Shape::kTileRows > tile.length) {
        clear_outside<Rows, kThreads>(m.q, first, tile.length);
        clear_outside<Rows, kThreads>(m.k, first, tile.length);
        clear_outside<Rows, kThreads>(m.v, first, tile.length);
        clear_outside<Rows, kThreads>(m.grad_out, first, tile.length);
      }
      local_row_terms<T, Rows, kThreads>(m, args, head, tile, first);
      fence_async_proxy();
      __syncthreads();
    }
    local_gradients<T, kHeadDim, kReach, false>(m, args, head, group_id());
    local_gradients<T, kHeadDim, kReach, true>(m, args, head, group_id());
    __syncthreads();  // everything is read
    if (threadIdx.x == 0 && head + 1 < last(*m.kept)) {
      load(reread(*m.kept), head + 1);
    }
  }
#endif
}

}  // namespace fastenc::cuda::sm90
