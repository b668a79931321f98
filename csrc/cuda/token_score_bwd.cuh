// Gradients of token_score. Words are taken some at a time, so many that dY, the gradient of their
// hidden rows, fits a workspace that L2 can hold. With X = token_factor * label_factor and G the
// incoming gradient, a pass over the pairs of its words has four steps:
//
//   hidden   dY = G out_weight where the hidden row is positive; parts of dout_weight and dout_bias
//   factors  dX = dY weight
//   weight   dweight += dY^T X, X made again
//   sums     over a word's labels: dtoken, dtoken_factor; over a label's words, one after the
//            other: dlabel, dlabel_factor, so that where a pass ends does not show
//
// Every sum has one order and one owner: no atomics.
#pragma once

#include "token_rows.cuh"

namespace fastenc::cuda {

constexpr int64_t kTokenWorkspace = 1 << 24;  // elements of dY: 32 MB in 16 bits

// Words of a pass, one at least.
constexpr int64_t words_of_pass(int64_t words, int64_t labels, int64_t size) {
  return smaller(words, larger(1, kTokenWorkspace / larger(1, labels * size)));
}

// The words [first, last) and what is kept of their pairs.
struct TokenPass {
  int32_t first, last;
  void* dhidden;    // (pairs, size), the dtype of the call
  float* dfactors;  // (pairs, factors)
};

__device__ __forceinline__ int64_t pairs_of(const TokenPass& pass, const TokenArgs& args) {
  return static_cast<int64_t>(pass.last - pass.first) * args.labels;
}

constexpr int kTokenPartRows = kTokenRows * kTokenColumns / kTokenThreads;
constexpr int kPartsOfTile = kTokenRows / kTokenPartRows;

template <typename T>
constexpr int kTokenHiddenBytes =
    kHiddenBytes<T> + kTokenRows * (static_cast<int>(sizeof(TokenPair)) + kTokenOutputs * 4);

// parts (kPartsOfTile * tiles, 3, size + 1): sums of g y over the rows of each part; the last
// column is dout_bias. Grid: (tiles of the pass, chunks of R, one at least).
template <typename T, int V>
__global__ __launch_bounds__(kTokenThreads, kTokenBlocks<T>) void token_hidden_bwd_kernel(
    const __grid_constant__ TokenArgs args, const TokenPass pass, const T* __restrict__ grad,
    float* __restrict__ parts) {
  constexpr int E = kVector<T>;
  T* memory = reinterpret_cast<T*>(dynamic_shared());
  auto* products = reinterpret_cast<float*>(dynamic_shared());
  auto* pairs = reinterpret_cast<TokenPair*>(dynamic_shared() + kHiddenBytes<T>);
  auto* grads = reinterpret_cast<float*>(pairs + kTokenRows);
  const int64_t base = int64_t{pass.first} * args.labels;
  const int64_t tile = int64_t{blockIdx.x} * kTokenRows;  // within the pass
  const int64_t count = pairs_of(pass, args);
  const int rows = static_cast<int>(smaller(kTokenRows, count - tile));
  const int chunk = blockIdx.y * kTokenColumns;
  locate_pairs<kTokenRows>(pairs, args, base + tile, base + count);
  for (int i = threadIdx.x; i < kTokenRows * kTokenOutputs; i += kTokenThreads) {
    grads[i] = i < rows * kTokenOutputs ? widen<T>(grad[(base + tile) * kTokenOutputs + i]) : 0.0f;
  }
  multiply_factors<V>(memory, pairs, args, chunk);
  __syncthreads();
  T* dhidden = static_cast<T*>(pass.dhidden) + tile * args.size + chunk;
  visit_hidden<V, T>(products, pairs, args, chunk, token_seed(args),
                     [&](int row, int local, float (&y)[E]) {
                       store_as_is<E, kShared>(products + row * kHiddenPitch + local, y);
                       if (row >= rows || chunk + local >= args.size) {
                         return;
                       }
                       float w[kTokenOutputs][E], d[E];
                       load_out_weights<V, E, T>(args, chunk + local, w);
                       const float* g = grads + row * kTokenOutputs;
#pragma unroll
                       for (int j = 0; j < E; ++j) {
                         d[j] = fmaf(g[2], w[2][j], fmaf(g[1], w[1][j], g[0] * w[0][j]));
                         d[j] = y[j] > 0.0f ? d[j] * args.keep_scale : 0.0f;
                       }
                       T* to = dhidden + int64_t{row} * args.size + local;
                       if constexpr (V == 1) {
#pragma unroll
                         for (int j = 0; j < E; ++j) {
                           if (chunk + local + j < args.size) {
                             to[j] = narrow<T>(d[j]);
                           }
                         }
                       } else {
                         store<E>(to, d);
                       }
                     });
  __syncthreads();
  const int local = threadIdx.x % kTokenColumns, part = threadIdx.x / kTokenColumns;
  const bool bias = blockIdx.y == 0 && local == 0;
  float sums[kTokenOutputs] = {}, biases[kTokenOutputs] = {};
  const int end = static_cast<int>(smaller(rows, (part + 1) * kTokenPartRows));
#pragma unroll 4
  for (int row = part * kTokenPartRows; row < end; ++row) {
    const float y = products[row * kHiddenPitch + local];
#pragma unroll
    for (int o = 0; o < kTokenOutputs; ++o) {
      sums[o] = fmaf(grads[row * kTokenOutputs + o], y, sums[o]);
      biases[o] += grads[row * kTokenOutputs + o];
    }
  }
  parts += (int64_t{blockIdx.x} * kPartsOfTile + part) * kTokenOutputs * (args.size + 1);
#pragma unroll
  for (int o = 0; o < kTokenOutputs; ++o) {
    float* of_output = parts + int64_t{o} * (args.size + 1);
    if (chunk + local < args.size) {
      of_output[chunk + local] = sums[o] * args.keep_scale;
    }
    if (bias) {
      of_output[args.size] = biases[o];
    }
  }
}

// sums (elements,) += the parts in order; a thread an element.
__global__ __launch_bounds__(kTokenThreads) void token_parts_sum_kernel(
    const float* __restrict__ parts, int64_t count, int64_t elements, float* __restrict__ sums) {
  const int64_t at = int64_t{blockIdx.x} * kTokenThreads + threadIdx.x;
  if (at < elements) {
    float sum = sums[at];
#pragma unroll 8
    for (int64_t part = 0; part < count; ++part) {
      sum += parts[part * elements + at];
    }
    sums[at] = sum;
  }
}

// ---- the two other products ---------------------------------------------------------------------

// Calls f(row, column, x0, x1) for this warp's 16 rows of accumulators.
template <int kTiles, typename F>
__device__ __forceinline__ void visit_couples(const float (&acc)[kTiles][4], F&& f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f(warp_id() * 16 + group_id() + half * 8, n * 8 + pair_column(), acc[n][2 * half],
        acc[n][2 * half + 1]);
    }
  }
}

// Columns `column` and the next of a row that has `columns`; adds if kAdd.
template <int V, bool kAdd>
__device__ __forceinline__ void write_couple(float* row, int column, int columns, float x0,
                                             float x1) {
  if constexpr (V == 1) {
    if (column < columns) {
      row[column] = kAdd ? row[column] + x0 : x0;
    }
    if (column + 1 < columns) {
      row[column + 1] = kAdd ? row[column + 1] + x1 : x1;
    }
  } else if (column < columns) {
    auto* at = reinterpret_cast<float2*>(row + column);
    const float2 before = kAdd ? *at : float2{0.0f, 0.0f};
    *at = float2{before.x + x0, before.y + x1};
  }
}

template <typename T>
constexpr int kTokenFactorStage =
    kTokenTile<T, kTokenRows, kTokenDepth> + kTokenTile<T, kTokenDepth, kTokenColumns>;

template <typename T>
constexpr int kTokenFactorBytes =
    kTokenStages<T> * kTokenFactorStage<T> * static_cast<int>(sizeof(T));

// dX. Grid: (tiles of the pass, chunks of D).
template <typename T, int V>
__global__ __launch_bounds__(kTokenThreads, kTokenBlocks<T>) void token_factors_bwd_kernel(
    const __grid_constant__ TokenArgs args, const TokenPass pass) {
  constexpr int kPitch = kTokenPitch<T, kTokenDepth>;
  constexpr int kRight = kTokenTile<T, kTokenRows, kTokenDepth>;
  T* memory = reinterpret_cast<T*>(dynamic_shared());
  const int64_t tile = int64_t{blockIdx.x} * kTokenRows;
  const int64_t rows = pairs_of(pass, args) - tile;
  const int chunk = blockIdx.y * kTokenColumns;
  const T* dhidden = static_cast<const T*>(pass.dhidden) + tile * args.size;
  const T* weight = static_cast<const T*>(args.weight);
  float acc[kTokenColumns / 8][4];
  clear(acc);
  run_steps<kTokenStages<T>>(
      ceil_div(args.size, kTokenDepth),
      [&](int64_t step, int stage) {
        T* left = memory + stage * kTokenFactorStage<T>;
        const int column = static_cast<int>(step) * kTokenDepth;
        fetch_rows<kTokenRows, kTokenDepth, V>(left, dhidden, args.size, rows, column, args.size);
        fetch_rows<kTokenDepth, kTokenColumns, V>(
            left + kRight, weight + column * args.weight_stride, args.weight_stride,
            args.size - column, chunk, args.factors);
      },
      [&](int stage) {
        const T* left = memory + stage * kTokenFactorStage<T>;
        multiply_rows<kTokenColumns, kTokenDepth>(
            acc, LeftRows<T, kTokenDepth, false>(left + warp_id() * 16 * kPitch, kPitch),
            left + kRight, kTokenPitch<T, kTokenColumns>);
      });
  visit_couples(acc, [&](int row, int column, float x0, float x1) {
    if (row < rows) {
      write_couple<V, false>(pass.dfactors + (tile + row) * args.factors, chunk + column,
                             args.factors, x0, x1);
    }
  });
}

template <typename T>
constexpr int kTokenWeightStage =
    kTokenTile<T, kTokenDepth, kTokenRows> + kTokenTile<T, kTokenDepth, kTokenDepth>;

template <typename T>
constexpr int kTokenWeightBytes =
    kTokenStages<T> * kTokenWeightStage<T> * static_cast<int>(sizeof(T)) +
    2 * kTokenDepth * static_cast<int>(sizeof(TokenPair));

// dweight (size, factors) +=. Grid: (128 rows of R, 64 columns of D).
template <typename T, int V>
__global__ __launch_bounds__(kTokenThreads, kTokenBlocks<T>) void token_weight_bwd_kernel(
    const __grid_constant__ TokenArgs args, const TokenPass pass, float* __restrict__ dweight) {
  constexpr int kRight = kTokenTile<T, kTokenDepth, kTokenRows>;
  T* memory = reinterpret_cast<T*>(dynamic_shared());
  auto* pairs = reinterpret_cast<TokenPair*>(memory + kTokenStages<T> * kTokenWeightStage<T>);
  const int row = blockIdx.x * kTokenRows, chunk = blockIdx.y * kTokenDepth;
  const int64_t base = int64_t{pass.first} * args.labels, count = pairs_of(pass, args);
  const T* dhidden = static_cast<const T*>(pass.dhidden);
  float acc[kTokenDepth / 8][4];
  clear(acc);
  locate_pairs<kTokenDepth>(pairs, args, base, base + count);
  run_steps<kTokenStages<T>>(
      ceil_div(count, kTokenDepth),
      [&](int64_t step, int stage) {
        T* left = memory + stage * kTokenWeightStage<T>;
        const int64_t first = step * kTokenDepth;
        fetch_rows<kTokenDepth, kTokenRows, V>(left, dhidden + first * args.size, args.size,
                                               count - first, row, args.size);
        make_factors<kTokenDepth, V>(left + kRight, pairs + step % 2 * kTokenDepth, args, chunk);
        locate_pairs<kTokenDepth>(pairs + (step + 1) % 2 * kTokenDepth, args,
                                  base + first + kTokenDepth, base + count);
      },
      [&](int stage) {
        const T* left = memory + stage * kTokenWeightStage<T>;
        multiply_columns<kTokenDepth, kTokenDepth>(acc, left + warp_id() * 16, left + kRight,
                                                   kTokenPitch<T, kTokenRows>,
                                                   kTokenPitch<T, kTokenDepth>);
      });
  visit_couples(acc, [&](int local, int column, float x0, float x1) {
    if (row + local < args.size) {
      write_couple<V, true>(dweight + int64_t{row + local} * args.factors, chunk + column,
                            args.factors, x0, x1);
    }
  });
}

// ---- sums over labels and over words ------------------------------------------------------------

constexpr int kTokenSumThreads = 128;

// out (words, columns): a word's rows of `rows` (pairs of the pass, columns), times label_factor if
// kFactor, added over its labels. Grid: (words of the pass, blocks of V columns a thread).
template <typename T, int V, typename In, bool kFactor>
__global__ __launch_bounds__(kTokenSumThreads) void token_labels_sum_kernel(
    const __grid_constant__ TokenArgs args, const TokenPass pass, const In* __restrict__ rows,
    int columns, T* __restrict__ out) {
  const int column = (blockIdx.y * kTokenSumThreads + threadIdx.x) * V;
  if (column >= columns) {
    return;
  }
  const int32_t word = pass.first + blockIdx.x;
  const T* factors = static_cast<const T*>(args.label_factor) + column;
  if constexpr (kFactor) {
    factors += sequence_of(args, word) * args.label_factor_seq_stride;
  }
  rows += int64_t{blockIdx.x} * args.labels * columns + column;
  float sum[V] = {};
#pragma unroll 4
  for (int64_t label = 0; label < args.labels; ++label) {
    float x[V], t[V];
    load<V>(rows + label * columns, x);
    if constexpr (kFactor) {
      load<V>(factors + label * args.label_factor_stride, t);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sum[j] = kFactor ? fmaf(x[j], t[j], sum[j]) : sum[j] + x[j];
    }
  }
  store<V>(out + int64_t{word} * columns + column, sum);
}

// out (num_seqs, labels, columns) +=: a label's rows, times token_factor if kFactor, over those of
// its words that are in the pass. Grid: (num_seqs * labels, blocks of V columns a thread).
template <typename T, int V, typename In, bool kFactor>
__global__ __launch_bounds__(kTokenSumThreads) void token_words_sum_kernel(
    const __grid_constant__ TokenArgs args, const TokenPass pass, const In* __restrict__ rows,
    int columns, float* __restrict__ out) {
  const int column = (blockIdx.y * kTokenSumThreads + threadIdx.x) * V;
  const int32_t seq = blockIdx.x / args.labels, label = blockIdx.x % args.labels;
  const auto begin = static_cast<int32_t>(larger(args.cu_words[seq], pass.first));
  const auto end = static_cast<int32_t>(smaller(args.cu_words[seq + 1], pass.last));
  if (column >= columns || begin >= end) {
    return;
  }
  const T* factors = static_cast<const T*>(args.token_factor) + column;
  rows += label * static_cast<int64_t>(columns) + column;
  out += int64_t{blockIdx.x} * columns + column;
  float sum[V];
  load<V>(out, sum);
#pragma unroll 8
  for (int32_t word = begin; word < end; ++word) {
    float x[V], t[V];
    load<V>(rows + static_cast<int64_t>(word - pass.first) * args.labels * columns, x);
    if constexpr (kFactor) {
      load<V>(factors + word * args.token_factor_stride, t);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sum[j] = kFactor ? fmaf(x[j], t[j], sum[j]) : sum[j] + x[j];
    }
  }
  store<V>(out, sum);
}

}  // namespace fastenc::cuda
