// Disentangled attention forward on NVIDIA GPUs from sm_80 (mma.sync, cp.async, ldmatrix): head_dim
// up to 128, either position term, dropout. fastenc/ops/disentangled_attention.py says what is
// computed, ../common/disentangled_tiles.h what a band is.
//
// A block takes 64 queries of one sequence and head, 16 a warp, and walks over the keys. A step
// makes q k^T, q band^T (each warp against the places that its 16 queries meet) and k band^T (each
// warp for 16 keys), both picked into the scores through shared memory, then the online softmax and
// p v. The next keys and the part of the bands that is new arrive during softmax and p v, the
// values during the products: one buffer of each.
//
// Floor, bf16, head_dim 64, both terms, 512 tokens a sequence: a 16 x 64 strip of scores takes 32
// mma.m16n8k16 for q k^T, 32 for p v and 40 a term (80 places for 64 keys), 576 FLOPs a query-key
// pair where plain attention has 256: 295 kFLOP a token and head, 0.37 ns at the 790 TFLOP/s of a
// large product on an H200; q, k, v and out are 512 bytes, 0.12 ns at 4.3 TB/s.
// Prediction (nothing has been measured): shared memory bounds it. A strip costs about 320
// wavefronts of ldmatrix, 200 of products put down and picked up, 70 of arriving tiles: 2300 cycles
// for 64 x 64 pairs on an SM, 1.3 ns a token and head on 132 SMs at 1.7 GHz; 1.5 to 2 ns expected.
#pragma once

#include "disentangled_tile.cuh"

namespace fastenc::cuda {

template <typename T, int kWidth>
class DisentangledTile {
  using Shape = DisentangledShape<sizeof(T), kWidth>;
  static constexpr bool kHalf = Shape::kHalf;
  static constexpr int kKeys = Shape::kColumns;
  static constexpr int kPitch = Shape::kPitch;
  using Queries = LeftRows<T, kWidth, kHalf>;

 public:
  __device__ __forceinline__ DisentangledTile(const DisentangledArgs& args,
                                              const AttentionTile& tile, int head)
      : args_(args.attention), positions_(args.positions), tile_(tile), head_(head) {
    unsigned char* memory = dynamic_shared();
    queries_ = reinterpret_cast<T*>(memory);
    row_stage_ = reinterpret_cast<float*>(kHalf ? queries_ : queries_ + kAttentionRows * kPitch);
    column_stage_ = row_stage_ + (Shape::kShared ? 0 : 4 * Shape::kRowStage);
    row_stage_ += warp_id() * Shape::kRowStage;
    keys_ = reinterpret_cast<T*>(memory + Shape::queries_bytes());
    values_ = keys_ + kKeys * kPitch;
    key_band_ = values_ + kKeys * kPitch;
    query_band_ = key_band_ + (Shape::kBands - 1) * Shape::kBand * kPitch;
    rows_ = static_cast<int>(smaller(kAttentionRows, tile.length - tile.first));
  }

  __device__ __forceinline__ void run() {
    load_tile<kAttentionRows, kWidth>(queries_,
                                      args_.q.template at<T>(tile_.start + tile_.first, head_),
                                      args_.q.token_stride, rows_, args_.head_dim, args_.vectors);
    if constexpr (kHalf) {
      fetch_keys(0, Shape::kBand);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const Queries queries(queries_ + warp_id() * 16 * kPitch, kPitch);
    clear(out_);
    seed_ = args_.drop_below ? static_cast<uint64_t>(*args_.seed) : 0;
    for (int key = 0; key < tile_.length; key += kKeys) {
      float s[kKeys / 8][4];
      if constexpr (kHalf) {
        score_in_rings(s, queries, key);
      } else {
        score_in_turns(s, queries, key);
      }
      if (positions_.query.data != nullptr) {
        add_column_term<kWidth, T>(s, column_stage_);
      }
      soften(s, key);
      if constexpr (kHalf) {
        cp_async_wait<1>();  // the values; the next keys may still be under way
        __syncthreads();
      }
      multiply<kWidth, kKeys>(out_, s, values_, kPitch, row_stage_);
    }
    finish_tile<kWidth>(queries_, rows_, out_, top_, sum_, args_, tile_, head_);
  }

 private:
  __device__ __forceinline__ void fetch(T* tile, const HeadRows& source, int key) {
    load_tile<kKeys, kWidth>(tile, source.template at<T>(tile_.start + key, head_),
                             source.token_stride, tile_.length - key, args_.head_dim,
                             args_.vectors);
  }
  __device__ __forceinline__ void fetch_band(T* band, const HeadRows& table, int key, int places) {
    if (table.data != nullptr) {
      load_band<kWidth>(band, table, head_, places, tile_.first - key, 1, turn_, positions_,
                        args_.head_dim, args_.vectors);
    }
  }
  __device__ __forceinline__ void fetch_keys(int key, int places) {
    fetch(keys_, args_.k, key);
    fetch_band(key_band_, positions_.key, key, places);
    fetch_band(query_band_, positions_.query, key, places);
  }

  // Keys and bands are there or arrive; leaves with the column term staged and the next on its way.
  __device__ __forceinline__ void score_in_rings(float (&s)[kKeys / 8][4], const Queries& queries,
                                                 int key) {
    cp_async_wait<0>();
    __syncthreads();
    fetch(values_, args_.v, key);
    cp_async_commit();
    clear(s);
    multiply_transposed<kKeys, kWidth>(s, queries, keys_, kPitch);
    if (positions_.key.data != nullptr) {
      add_row_term<kWidth>(s, queries, key_band_, turn_, row_stage_);
    }
    if (positions_.query.data != nullptr) {
      stage_column_term<kWidth>(keys_, query_band_, turn_, column_stage_);
    }
    __syncthreads();
    if (key + kKeys < tile_.length) {
      turn_ = next_turn(turn_, kKeys, Shape::kBand);
      fetch_keys(key + kKeys, kKeys);
    }
    cp_async_commit();
  }

  // fp32: the tables pass through one band's memory, one after the other.
  __device__ __forceinline__ void score_in_turns(float (&s)[kKeys / 8][4], const Queries& queries,
                                                 int key) {
    __syncthreads();
    fetch(keys_, args_.k, key);
    fetch(values_, args_.v, key);
    fetch_band(query_band_, positions_.query, key, Shape::kBand);
    arrive();
    clear(s);
    multiply_transposed<kKeys, kWidth>(s, queries, keys_, kPitch);
    if (positions_.query.data != nullptr) {
      stage_column_term<kWidth>(keys_, query_band_, turn_, column_stage_);
      __syncthreads();
    }
    if (positions_.key.data != nullptr) {
      fetch_band(key_band_, positions_.key, key, Shape::kBand);
      arrive();
      add_row_term<kWidth>(s, queries, key_band_, turn_, row_stage_);
    }
  }

  __device__ __forceinline__ void arrive() {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }

  // Scores to weights: scale, mask, the online softmax, dropout.
  __device__ __forceinline__ void soften(float (&s)[kKeys / 8][4], int key) {
    const auto place = place_scores<Across::kQueries>(tile_.first, key);
    if (args_.prescale) {
      scale_all(s, args_.scale_log2);
    }
    if (key + kKeys > tile_.length) {
      mask(s, place, tile_, args_, -INFINITY);
    }
    soften_rows(s, top_, sum_, out_, args_.factor);
    if (args_.drop_below) {
      drop(s, place, tile_.start, head_, seed_, args_.drop_below);
    }
  }

  const AttentionArgs& args_;
  const PositionArgs& positions_;
  const AttentionTile tile_;
  const int head_;
  T *queries_, *keys_, *values_, *key_band_, *query_band_;
  float *row_stage_, *column_stage_;
  int rows_;
  int turn_ = 0;
  uint64_t seed_ = 0;
  float out_[kWidth / 8][4];
  float top_[2] = {-INFINITY, -INFINITY};
  float sum_[2] = {0.0f, 0.0f};
};

// Block (slot, head) with the head fastest, as in varlen_attention_fwd_kernel.
template <typename T, int kWidth>
__global__ __launch_bounds__(kAttentionThreads, 2) void disentangled_attention_fwd_kernel(
    const __grid_constant__ DisentangledArgs args) {
  const AttentionArgs& a = args.attention;
  const int slot = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const AttentionTile tile = locate_tile(a.cu_seqlens, a.num_seqs, slot, kAttentionRows);
  if (tile.first < tile.length) {
    DisentangledTile<T, kWidth>(args, tile, head).run();
  }
}

}  // namespace fastenc::cuda
