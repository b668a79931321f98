// Disentangled attention backward on NVIDIA GPUs from sm_80. Two kernels that each make the scores
// again, one from the queries' side, one from the keys':
//
//   dq     p = 2^(s - lse),  ds = p (dout v^T - delta)
//          dq += ds k + band(ds) pos_key,       dpos_key += band(ds)^T q
//   dk/dv  the same, transposed
//          dk += ds^T q + band(ds^T) pos_query, dpos_query += band(ds^T)^T k,  dv += p^T dout
//
// where band(ds) is ds by place (../common/disentangled_tiles.h): each row shifted against the next
// by one, zeros elsewhere, as 16-bit operands in shared memory. So the tables' gradients are
// products too. Their sums by distance lie in a table of the block's own, in global memory (L2):
// one thread ever adds to an element, in one order, and a third kernel adds the tables of all
// blocks and the distances of a bucket. A block takes every n-th tile of one head, so there are few
// tables. No atomics: the same bits twice.
//
// Floor, bf16, head_dim 64, both terms, 512 tokens a sequence: mma.m16n8k16 of a 16 x 64 strip: the
// scores 112 and dp 32 in each kernel, ds y 32, band(ds) table 40, its transpose x 40, dv 32: 544
// for both, 3.8 times the forward's: 1.4 ns a token and head at 790 TFLOP/s.
// Prediction (nothing has been measured): shared memory again, about 950 and 1010 wavefronts a
// strip: 4.4 ns on 132 SMs at 1.7 GHz; 5 to 7 ns expected. Each tile adds 128 x 64 fp32 to a
// block's table, 64 KB through L2, as many cycles again where another block does not hide them.
// Carrying the half of the band that the next step meets would save half of that, and takes 32
// registers that are not there.
#pragma once

#include "attention_dq.cuh"
#include "disentangled_tile.cuh"

namespace fastenc::cuda {

template <typename T, int kWidth, Across kRowsAre>
class DisentangledGradTile {
  using Shape = DisentangledShape<sizeof(T), kWidth>;
  static constexpr bool kHalf = Shape::kHalf;
  static constexpr bool kQueryRows = kRowsAre == Across::kQueries;
  static constexpr int kColumns = Shape::kColumns;
  static constexpr int kPitch = Shape::kPitch;
  static constexpr int kShearPitch = Shape::kShearPitch;
  using Left = LeftRows<T, kWidth, false>;

 public:
  __device__ __forceinline__ DisentangledGradTile(const DisentangledGradArgs& call, int head)
      : call_(call), grads_(call.grads), args_(call.grads.forward), head_(head) {
    rows_ = reinterpret_cast<T*>(dynamic_shared());
    row_outs_ = rows_ + kAttentionRows * kPitch;
    columns_ = row_outs_ + kAttentionRows * kPitch;
    column_outs_ = columns_ + kColumns * kPitch;
    row_band_ = column_outs_ + kColumns * kPitch;
    column_band_ = row_band_ + (Shape::kBands - 1) * Shape::kBand * kPitch;
    sheared_ = column_band_ + Shape::kBand * kPitch;
    row_stage_ = reinterpret_cast<float*>(sheared_ + kAttentionRows * kShearPitch);
    column_stage_ = row_stage_ + (Shape::kShared ? 0 : 4 * Shape::kRowStage);
    bases_ = reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(row_stage_) +
                                      Shape::stages_bytes());
    deltas_ = bases_ + kColumns;
    row_stage_ += warp_id() * Shape::kRowStage;
    // What a row never meets stays zero: every tile writes the same places.
    for (int i = threadIdx.x; i < kAttentionRows * kShearPitch; i += kAttentionThreads) {
      sheared_[i] = narrow<T>(0.0f);
    }
  }

  __device__ __forceinline__ void run(const AttentionTile& tile) {
    tile_ = tile;
    turn_ = 0;
    __syncthreads();  // the tile before is done
    load_rows(rows_, kQueryRows ? args_.q : args_.k);
    load_rows(row_outs_, kQueryRows ? grads_.grad_out : args_.v);
    if constexpr (kHalf) {
      fetch(0, Shape::kBand);
    }
    cp_async_commit();
    clear(dx_);
    if constexpr (!kQueryRows) {
      clear(dv_);
    }
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (kQueryRows) {
      read_rows(delta_, base_, row_outs_, kPitch, grads_, tile_, head_, count());
    }
    for (int column = 0; column < tile_.length; column += kColumns) {
      step(column);
    }
    finish();
  }

 private:
  __device__ __forceinline__ const HeadRows& row_table() const {
    return kQueryRows ? call_.positions.key : call_.positions.query;
  }
  __device__ __forceinline__ const HeadRows& column_table() const {
    return kQueryRows ? call_.positions.query : call_.positions.key;
  }
  // First query - first key.
  __device__ __forceinline__ int32_t base_distance(int column) const {
    return kQueryRows ? tile_.first - column : column - tile_.first;
  }
  static constexpr int kSign = kQueryRows ? 1 : -1;
  // Of a row of the sequence. Unsigned, as the head is: upper halves take no registers.
  __device__ __forceinline__ int64_t token(int row) const {
    return static_cast<uint32_t>(tile_.start + row);
  }
  __device__ __forceinline__ T* row(const HeadRows& source, int row) const {
    return source.template at<T>(token(row), 0) + static_cast<uint32_t>(head_) * source.head_stride;
  }
  // The tile's rows. Their first token is not kept over the loop: the widest kernel is out of
  // registers.
  __device__ __forceinline__ T* own(const HeadRows& source) const {
    return row(source, 0) + static_cast<uint32_t>(tile_.first) * source.token_stride;
  }
  __device__ __forceinline__ int count() const {
    return static_cast<int>(smaller(kAttentionRows, tile_.length - tile_.first));
  }

  __device__ __forceinline__ void load_rows(T* to, const HeadRows& source) {
    load_tile<kAttentionRows, kWidth>(to, own(source), source.token_stride, count(), args_.head_dim,
                                      args_.vectors);
  }
  __device__ __forceinline__ void load_columns(T* to, const HeadRows& source, int column) {
    load_tile<kColumns, kWidth>(to, row(source, column), source.token_stride, tile_.length - column,
                                args_.head_dim, args_.vectors);
  }
  __device__ __forceinline__ void fetch_band(T* band, const HeadRows& table, int column,
                                             int places) {
    if (table.data != nullptr) {
      load_band<kWidth>(band, table, head_, places, base_distance(column), kSign, turn_,
                        call_.positions, args_.head_dim, args_.vectors);
    }
  }
  __device__ __forceinline__ void fetch_columns(int column) {
    load_columns(columns_, kQueryRows ? args_.k : args_.q, column);
    load_columns(column_outs_, kQueryRows ? args_.v : grads_.grad_out, column);
    if (!kQueryRows && threadIdx.x < kColumns) {
      const bool inside = column + static_cast<int>(threadIdx.x) < tile_.length;
      const int64_t at =
          static_cast<uint32_t>(head_) * args_.total_tokens + token(column) + threadIdx.x;
      bases_[threadIdx.x] = inside ? exponent_base(args_.lse[at]) : INFINITY;
      deltas_[threadIdx.x] = inside ? grads_.delta[at] : 0.0f;
    }
  }
  __device__ __forceinline__ void fetch(int column, int places) {
    fetch_columns(column);
    fetch_band(row_band_, row_table(), column, places);
    fetch_band(column_band_, column_table(), column, places);
  }
  __device__ __forceinline__ void arrive() {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ uint64_t seed() const { return static_cast<uint64_t>(*args_.seed); }

  // Scores, both terms included.
  __device__ __forceinline__ void score(float (&s)[kColumns / 8][4], const Left& rows, int column) {
    const bool by_row = row_table().data != nullptr, by_column = column_table().data != nullptr;
    clear(s);
    if constexpr (kHalf) {
      arrive();
      multiply_transposed<kColumns, kWidth>(s, rows, columns_, kPitch);
      if (by_row) {
        add_row_term<kWidth>(s, rows, row_band_, turn_, row_stage_);
      }
      if (by_column) {
        stage_column_term<kWidth>(columns_, column_band_, turn_, column_stage_);
        __syncthreads();
        add_column_term<kWidth, T>(s, column_stage_);
      }
    } else {
      // The tables pass through one band's memory; the row table stays, for its gradients.
      __syncthreads();
      fetch_columns(column);
      fetch_band(column_band_, column_table(), column, Shape::kBand);
      arrive();
      multiply_transposed<kColumns, kWidth>(s, rows, columns_, kPitch);
      if (by_column) {
        stage_column_term<kWidth>(columns_, column_band_, turn_, column_stage_);
        __syncthreads();
        add_column_term<kWidth, T>(s, column_stage_);
      }
      if (by_row) {
        fetch_band(row_band_, row_table(), column, Shape::kBand);
        arrive();
        add_row_term<kWidth>(s, rows, row_band_, turn_, row_stage_);
      }
    }
  }

  __device__ __forceinline__ void step(int column) {
    const Left rows(rows_ + warp_id() * 16 * kPitch, kPitch);
    float p[kColumns / 8][4];
    score(p, rows, column);
    const auto place = place_scores<kRowsAre>(tile_.first, column);
    if (args_.prescale) {
      scale_all(p, args_.scale_log2);
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[n][i] = fast_exp2(fmaf(p[n][i], args_.factor, -base(n, i)));
      }
    }
    // Queries past the end have no weight: their base is infinite.
    if ((kQueryRows ? column + kColumns : tile_.first + kAttentionRows) > tile_.length) {
      mask(p, place, tile_, args_, 0.0f);
    }
    differentiate(p, place);
    multiply<kWidth, kColumns>(dx_, p, columns_, kPitch, row_stage_);
    if (partials() != nullptr) {
      shear(p);
      add_positions();
    }
    __syncthreads();
    const int32_t base = base_distance(column);
    if constexpr (kHalf) {
      if (column + kColumns < tile_.length) {
        turn_ = next_turn(turn_, kColumns, Shape::kBand);
        fetch(column + kColumns, kColumns);
      }
    }
    if (partials() != nullptr) {
      add_table(base);
    }
  }

  __device__ __forceinline__ float base(int n, int i) const {
    return kQueryRows ? base_[i / 2] : bases_[pair_column() + n * 8 + i % 2];
  }
  __device__ __forceinline__ float delta(int n, int i) const {
    return kQueryRows ? delta_[i / 2] : deltas_[pair_column() + n * 8 + i % 2];
  }

  // Which of this thread's weights dropout keeps, four bits a tile of eight columns.
  __device__ __forceinline__ uint32_t kept_bits(const ScorePlace<kRowsAre>& place) const {
    static_assert(kColumns <= 64);
    uint32_t tiles[kColumns / 8], bits = 0;
    kept_transposed(tiles, place, tile_.start, head_, seed(), args_.drop_below);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      bits |= tiles[n] << (4 * n);
    }
    return bits;
  }

  // Weights to the gradients of their scores, but for the scale; dv on the way.
  __device__ __forceinline__ void differentiate(float (&p)[kColumns / 8][4],
                                                const ScorePlace<kRowsAre>& place) {
    const Left outs(row_outs_ + warp_id() * 16 * kPitch, kPitch);
    float dp[kColumns / 8][4];
    if constexpr (kQueryRows) {
      clear(dp);
      multiply_transposed<kColumns, kWidth>(dp, outs, column_outs_, kPitch);
      if (args_.drop_below) {
        drop(dp, place, tile_.start, head_, seed(), args_.drop_below);
      }
    } else {
      const uint32_t kept = args_.drop_below ? kept_bits(place) : ~0u;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dp[n][i] = kept >> (4 * n + i) & 1u ? p[n][i] : 0.0f;
        }
      }
      multiply<kWidth, kColumns>(dv_, dp, column_outs_, kPitch, row_stage_);
      clear(dp);
      multiply_transposed<kColumns, kWidth>(dp, outs, column_outs_, kPitch);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dp[n][i] = kept >> (4 * n + i) & 1u ? dp[n][i] : 0.0f;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[n][i] *= fmaf(dp[n][i], args_.keep_scale, -delta(n, i));
      }
    }
  }

  // This warp's rows of ds by place.
  __device__ __forceinline__ void shear(const float (&ds)[kColumns / 8][4]) {
    T* to =
        sheared_ + (warp_id() * 16 + group_id()) * (kShearPitch + 1) - pair_column() + kColumns - 1;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[i / 2 * 8 * (kShearPitch + 1) - n * 8 - i % 2] = narrow<T>(ds[n][i]);
      }
    }
    __syncwarp();
  }

  // dx += band(ds) table, over the places that this warp's rows meet.
  __device__ __forceinline__ void add_positions() {
    const int first = warp_id() * 16;
    const T* own = sheared_ + first * kShearPitch + first;
#pragma unroll
    for (int b = 0; b < Shape::kRowBlocks; ++b) {
      const int place = b * kPlaceBlock;
      multiply_rows<kWidth, kPlaceBlock>(
          dx_, LeftRows<T, kPlaceBlock, false>(own + place, kShearPitch),
          row_band_ + ring_row(first + place, turn_, Shape::kBand) * kPitch, kPitch);
    }
  }

  // The block's table += band(ds)^T x: 16 places a warp at a time, 64 of head_dim.
  __device__ __forceinline__ void add_table(int32_t base) {
    constexpr int kPart = 64;
#pragma unroll 1
    for (int first = warp_id() * kPlaceBlock; first < Shape::kBand; first += 4 * kPlaceBlock) {
      const int32_t nearest = place_distance(base, kSign, first, kColumns);
      if (!inside(nearest) && !inside(nearest + kSign * (kPlaceBlock - 1)) &&
          (nearest < 0) == (nearest + kSign * kPlaceBlock < 0)) {
        continue;
      }
      const int place = first + group_id();
      float* upper = row_of(nearest + kSign * group_id(), place);
      float* lower = row_of(nearest + kSign * (group_id() + 8), place + 8);
      // The rows that meet these places.
      const int begin = static_cast<int>(larger(0, first - kColumns));
      const int end = static_cast<int>(smaller(kAttentionRows, first + kPlaceBlock));
#pragma unroll 1
      for (int part = 0; part < kWidth; part += kPart) {
        float acc[kPart / 8][4];
        clear(acc);
#pragma unroll 1
        for (int row = begin; row < end; row += 16) {
          multiply_columns<kPart, 16>(acc, sheared_ + row * kShearPitch + first,
                                      rows_ + row * kPitch + part, kShearPitch, kPitch);
        }
        add_to(upper, part, acc, 0);
        add_to(lower, part, acc, 2);
      }
    }
  }

  __device__ __forceinline__ float* partials() const {
    return kQueryRows ? call_.key_partials : call_.query_partials;
  }
  // Whether a query and a key of the sequence can be so far apart.
  __device__ __forceinline__ bool inside(int32_t distance) const {
    return distance > -tile_.length && distance < tile_.length;
  }
  __device__ __forceinline__ float* row_of(int32_t distance, int place) const {
    const int32_t row = inside(distance) ? call_.rows.of(distance, place) : -1;
    const int64_t table = int64_t{blockIdx.x} * call_.rows.count();
    return row < 0 ? nullptr : partials() + (table + row) * kWidth + pair_column();
  }

  template <int kTiles>
  __device__ __forceinline__ void add_to(float* row, int part, const float (&acc)[kTiles][4],
                                         int half) {
    if (row != nullptr) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float2* at = reinterpret_cast<float2*>(row + part + n * 8);
        const float2 before = *at;
        *at = {before.x + (half == 0 ? acc[n][0] : acc[n][2]),
               before.y + (half == 0 ? acc[n][1] : acc[n][3])};
      }
    }
  }

  __device__ __forceinline__ void finish() {
    __syncthreads();
    stage_rows<kWidth>(rows_ + warp_id() * 16 * kPitch, kPitch, dx_, grads_.scale, grads_.scale);
    if constexpr (!kQueryRows) {
      stage_rows<kWidth>(row_outs_ + warp_id() * 16 * kPitch, kPitch, dv_, args_.keep_scale,
                         args_.keep_scale);
    }
    __syncthreads();
    store(rows_, kQueryRows ? grads_.dq : grads_.dk);
    if constexpr (!kQueryRows) {
      store(row_outs_, grads_.dv);
    }
  }
  __device__ __forceinline__ void store(const T* tile, const HeadRows& target) {
    store_tile<kWidth>(tile, own(target), target.token_stride, count(), args_.head_dim,
                       args_.vectors);
  }

  const DisentangledGradArgs& call_;
  const AttentionGradArgs& grads_;
  const AttentionArgs& args_;
  const int head_;
  AttentionTile tile_;
  T *rows_, *row_outs_, *columns_, *column_outs_, *row_band_, *column_band_, *sheared_;
  float *row_stage_, *column_stage_, *bases_, *deltas_;
  int turn_;
  float dx_[kWidth / 8][4];
  float dv_[kQueryRows ? 1 : kWidth / 8][4];
  float delta_[2], base_[2];
};

// Block (split, head) with the head fastest.
template <typename T, int kWidth, Across kRowsAre>
__device__ __forceinline__ void disentangled_grads(const DisentangledGradArgs& call) {
  const AttentionArgs& args = call.grads.forward;
  const int split = blockIdx.x / args.heads, head = blockIdx.x % args.heads;
  DisentangledGradTile<T, kWidth, kRowsAre> grads(call, head);
#pragma unroll 1
  for (int slot = split; slot < call.slots; slot += call.splits) {
    const AttentionTile tile = locate_tile(args.cu_seqlens, args.num_seqs, slot, kAttentionRows);
    if (tile.first < tile.length) {
      grads.run(tile);
    }
  }
}

template <typename T, int kWidth>
__global__
__launch_bounds__(kAttentionThreads, kWidth <= 64 ? 2 : 1) void disentangled_attention_dq_kernel(
    const __grid_constant__ DisentangledGradArgs call) {
  disentangled_grads<T, kWidth, Across::kQueries>(call);
}

template <typename T, int kWidth>
__global__
__launch_bounds__(kAttentionThreads, kWidth <= 64 ? 2 : 1) void disentangled_attention_dkdv_kernel(
    const __grid_constant__ DisentangledGradArgs call) {
  disentangled_grads<T, kWidth, Across::kKeys>(call);
}

}  // namespace fastenc::cuda
