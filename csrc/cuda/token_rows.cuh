// Pairs of a word and a label as rows of products: X = token_factor * label_factor and the hidden
// rows relu(token + label + weight X), made where they are multiplied; never in global memory.
//
// Pairs are numbered word * labels + label over the packed batch, and a tile is kTokenRows of them
// in turn, whatever the sequences they come from: a row of a product never sees another row.
#pragma once

#include "cp_async.cuh"
#include "dropout.cuh"
#include "products.cuh"

namespace fastenc::cuda {

constexpr int kTokenThreads = 256;
constexpr int kTokenRows = 128;     // of a product's tile: 16 a warp
constexpr int kTokenColumns = 128;  // of a product's tile
constexpr int kTokenDepth = 64;     // of one step of a product
constexpr int kTokenOutputs = 3;
constexpr uint32_t kTokenTag = 2;  // fastenc/ops/token_score.py

// Blocks that a multiprocessor holds: 128 registers a thread, of which fp32 needs more.
template <typename T>
constexpr int kTokenBlocks = sizeof(T) == 2 ? 2 : 1;

struct TokenArgs {
  const void *token, *token_factor;  // (words, size), (words, factors)
  const void *label, *label_factor;  // (num_seqs, labels, size), (num_seqs, labels, factors)
  const void* weight;                // (size, factors)
  const void* out_weight;            // (kTokenOutputs, size), dense
  const void* out_bias;              // (kTokenOutputs,), or null
  int64_t token_stride, token_factor_stride, weight_stride;
  int64_t label_seq_stride, label_stride, label_factor_seq_stride, label_factor_stride;
  const int32_t* cu_words;
  int32_t num_seqs, labels, size, factors;
  int64_t words;
  const int64_t* seed;
  uint32_t drop_below;  // as in AttentionArgs
  float keep_scale;
};

struct TokenPair {
  int32_t word, label, seq;
};

__device__ __forceinline__ uint64_t token_seed(const TokenArgs& args) {
  return args.drop_below ? static_cast<uint64_t>(*args.seed) : 0;
}

__device__ __forceinline__ int32_t sequence_of(const TokenArgs& args, int32_t word) {
  int32_t low = 0, high = args.num_seqs;  // cu_words[low] <= word < cu_words[high]
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (args.cu_words[middle] <= word) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// kRows pairs from `first` on into shared memory; those from `last` on are the one before it.
template <int kRows>
__device__ __forceinline__ void locate_pairs(TokenPair* pairs, const TokenArgs& args, int64_t first,
                                             int64_t last) {
  if (threadIdx.x < kRows) {
    const int64_t pair = smaller(first + threadIdx.x, last - 1);
    const auto word = static_cast<int32_t>(pair / args.labels);
    pairs[threadIdx.x] = {word, static_cast<int32_t>(pair - int64_t{word} * args.labels),
                          sequence_of(args, word)};
  }
}

// ---- tiles in shared memory ---------------------------------------------------------------------

// Odd in units of 16 bytes: no bank conflict.
template <typename T, int kColumns>
constexpr int kTokenPitch = kColumns + kVector<T>;

template <typename T, int kRows, int kColumns>
constexpr int kTokenTile = kRows * kTokenPitch<T, kColumns>;

template <typename T>
constexpr int kTokenStages = sizeof(T) == 2 ? 2 : 1;

template <int V, typename T>
__device__ __forceinline__ void store_shared(T* p, const float (&x)[V]) {
  if constexpr (V == 1) {
    *p = narrow<T>(x[0]);
  } else if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint4*>(p) = {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]),
                                    pack_pair<T>(x[4], x[5]), pack_pair<T>(x[6], x[7])};
  } else {
    *reinterpret_cast<float4*>(p) = {x[0], x[1], x[2], x[3]};
  }
}

// kRows rows of `from`, kColumns of their columns from `column` on; zeros past `rows` and
// `columns`. Complete after cp_async_wait and __syncthreads.
template <int kRows, int kColumns, int V, typename T>
__device__ __forceinline__ void fetch_rows(T* tile, const T* from, int64_t stride, int64_t rows,
                                           int column, int columns) {
  constexpr int kVectors = kColumns / V, kApart = kTokenThreads / kVectors;
  static_assert(kTokenThreads % kVectors == 0, "a thread keeps its columns from row to row");
  const int local = threadIdx.x % kVectors * V;
  const bool some = column + local < columns;
  int row = threadIdx.x / kVectors;
  const T* at = from + row * stride + column + local;
  T* to = tile + row * kTokenPitch<T, kColumns> + local;
#pragma unroll(V == 1 ? 1 : 4)
  for (; row < kRows;
       row += kApart, at += kApart * stride, to += kApart * kTokenPitch<T, kColumns>) {
    const bool inside = some && row < rows;
    if constexpr (V == 1) {
      *to = inside ? *at : narrow<T>(0.0f);
    } else {
      cp_async_16(to, inside ? at : from, inside);
    }
  }
}

// X of kRows pairs, kTokenDepth of its columns from `column` on, rounded to T; zeros past the last
// column.
template <int kRows, int V, typename T>
__device__ __forceinline__ void make_factors(T* tile, const TokenPair* pairs, const TokenArgs& args,
                                             int column) {
  constexpr int kVectors = kTokenDepth / V;
  const T* of_words = static_cast<const T*>(args.token_factor);
  const T* of_labels = static_cast<const T*>(args.label_factor);
#pragma unroll(V == 1 ? 1 : 2)
  for (int i = threadIdx.x; i < kRows * kVectors; i += kTokenThreads) {
    const int row = i / kVectors, local = i % kVectors * V;
    float x[V] = {};
    if (column + local < args.factors) {
      const TokenPair pair = pairs[row];
      float t[V];
      load<V>(of_words + pair.word * args.token_factor_stride + column + local, x);
      load<V>(of_labels + pair.seq * args.label_factor_seq_stride +
                  pair.label * args.label_factor_stride + column + local,
              t);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        x[j] *= t[j];
      }
    }
    store_shared<V>(tile + row * kTokenPitch<T, kTokenDepth> + local, x);
  }
}

// The steps of a product: fill(step, stage) brings a step's operands into a stage of shared memory,
// use(stage) multiplies them. With two stages the next step arrives while this one is worked on.
template <int kStages, typename Fill, typename Use>
__device__ __forceinline__ void run_steps(int64_t steps, Fill&& fill, Use&& use) {
  __syncthreads();
  if (kStages == 2 && steps > 0) {
    fill(0, 0);
    cp_async_commit();
  }
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    const int stage = kStages == 2 ? step % 2 : 0;
    if (kStages == 1) {
      fill(step, 0);
      cp_async_commit();
    }
    cp_async_wait<0>();
    __syncthreads();
    if (kStages == 2 && step + 1 < steps) {
      fill(step + 1, 1 - stage);
      cp_async_commit();
    }
    use(stage);
    if (kStages == 1) {
      __syncthreads();
    }
  }
}

// ---- hidden rows --------------------------------------------------------------------------------

template <typename T>
constexpr int kHiddenStage = 2 * kTokenTile<T, kTokenRows, kTokenDepth>;  // elements

// fp32 rows (kTokenRows, kTokenColumns) in shared memory, in place of the operands.
constexpr int kHiddenPitch = kTokenColumns + 8;

template <typename T>
constexpr int kHiddenBytes = static_cast<int>(larger(kTokenStages<T> * kHiddenStage<T> * sizeof(T),
                                                     kTokenRows * kHiddenPitch * sizeof(float)));

// weight X of a tile of pairs and kTokenColumns columns from `chunk` on: fp32 rows in `memory`
// (kHiddenBytes), complete after __syncthreads.
template <int V, typename T>
__device__ __forceinline__ void multiply_factors(T* memory, const TokenPair* pairs,
                                                 const TokenArgs& args, int chunk) {
  constexpr int kPitch = kTokenPitch<T, kTokenDepth>;
  constexpr int kTile = kTokenTile<T, kTokenRows, kTokenDepth>;
  static_assert(kTokenRows == kTokenColumns, "a stage is two tiles of one shape");
  const T* weight = static_cast<const T*>(args.weight) + chunk * args.weight_stride;
  float acc[kTokenColumns / 8][4];
  clear(acc);
  run_steps<kTokenStages<T>>(
      ceil_div(args.factors, kTokenDepth),
      [&](int64_t step, int stage) {
        T* factors = memory + stage * kHiddenStage<T>;
        const int column = static_cast<int>(step) * kTokenDepth;
        fetch_rows<kTokenColumns, kTokenDepth, V>(factors + kTile, weight, args.weight_stride,
                                                  args.size - chunk, column, args.factors);
        make_factors<kTokenRows, V>(factors, pairs, args, column);
      },
      [&](int stage) {
        const T* factors = memory + stage * kHiddenStage<T>;
        const LeftRows<T, kTokenDepth, false> rows(factors + warp_id() * 16 * kPitch, kPitch);
        multiply_transposed<kTokenColumns, kTokenDepth>(acc, rows, factors + kTile, kPitch);
      });
  __syncthreads();
  stage_rows<kTokenColumns>(reinterpret_cast<float*>(memory) + warp_id() * 16 * kHiddenPitch,
                            kHiddenPitch, acc, 1.0f, 1.0f);
}

// kVector<T> elements of a row from `column` on, zeros past the last column.
template <int V, int E, typename T>
__device__ __forceinline__ void load_columns(const T* row, int column, int columns, float (&x)[E]) {
  if constexpr (V == 1) {
#pragma unroll
    for (int j = 0; j < E; ++j) {
      x[j] = column + j < columns ? widen<T>(row[column + j]) : 0.0f;
    }
  } else {
    load<E>(row + column, x);
  }
}

// Calls f(row, column, y) for all of a tile's hidden rows, kVector<T> elements y in a call, zeros
// past the last column; what dropout keeps is not scaled yet. Neighbouring lanes have neighbouring
// columns, and a row lies in one warp. `products`: of multiply_factors.
template <int V, typename T, typename F>
__device__ __forceinline__ void visit_hidden(const float* products, const TokenPair* pairs,
                                             const TokenArgs& args, int chunk, uint64_t seed,
                                             F&& f) {
  constexpr int E = kVector<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTokenRows * kTokenColumns / E; i += kTokenThreads) {
    const int row = i / (kTokenColumns / E), local = i % (kTokenColumns / E) * E;
    const int column = chunk + local;
    float y[E] = {};
    if (column < args.size) {
      const TokenPair pair = pairs[row];
      float token[E], label[E];
      load<E>(products + row * kHiddenPitch + local, y);
      load_columns<V>(static_cast<const T*>(args.token) + pair.word * args.token_stride, column,
                      args.size, token);
      load_columns<V>(static_cast<const T*>(args.label) + pair.seq * args.label_seq_stride +
                          pair.label * args.label_stride,
                      column, args.size, label);
#pragma unroll
      for (int j = 0; j < E; ++j) {
        const float sum = y[j] + token[j] + label[j];
        y[j] = sum < 0.0f ? 0.0f : sum;  // keeps NaN
      }
      if (args.drop_below) {
#pragma unroll
        for (int group = 0; group < E / 4; ++group) {
          const PhiloxWords words =
              philox_words((column >> 2) + group, static_cast<uint32_t>(pair.word),
                           static_cast<uint32_t>(pair.label), kTokenTag, seed);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            y[group * 4 + j] = words.word[j] >= args.drop_below ? y[group * 4 + j] : 0.0f;
          }
        }
      }
    }
    f(row, local, y);
  }
}

// Out weights of kVector<T> columns from `column` on.
template <int V, int E, typename T>
__device__ __forceinline__ void load_out_weights(const TokenArgs& args, int column,
                                                 float (&w)[kTokenOutputs][E]) {
#pragma unroll
  for (int o = 0; o < kTokenOutputs; ++o) {
    load_columns<V>(static_cast<const T*>(args.out_weight) + int64_t{o} * args.size, column,
                    args.size, w[o]);
  }
}

}  // namespace fastenc::cuda
