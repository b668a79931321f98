// Segment pooling on NVIDIA GPUs (sm_80 and up): one row for each packed sequence, and its
// gradient.
//
// Forward: a block takes 128 bytes of columns of one sequence; 32 slices of its tokens are summed
// (or their maximum is found) side by side and put together in order: no atomics, and a sequence's
// row does not depend on its neighbours. "cls" and "last" are the mean of one token.
// Backward: linear in tokens, so one long sequence is no longer than many short ones; a block
// finds the sequences of its 32 tokens by binary search, once.
//
// Floor: forward one read of x, backward one write of dx, at the bandwidth of memory. Prediction,
// H200: backward near copy speed; forward likewise from some ten sequences up, but a single
// sequence of 768 columns keeps only 12 blocks busy, perhaps a tenth of the bandwidth: pooling is
// one pass at the end of a model, so it is not split further. Has not run on a GPU.
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "launch.cuh"

namespace fastenc::cuda {
namespace {

enum class Mode { kMean, kCls, kMax, kLast };

// ---- device -------------------------------------------------------------------------------------

template <typename T, int V>
__global__ __launch_bounds__(PoolTiles::kThreads) void segment_pool_mean_kernel(
    const T* __restrict__ x, const int32_t* __restrict__ edges, T* __restrict__ out, int64_t hidden,
    int64_t first_seq, Mode mode) {
  __shared__ float sums[PoolTiles::kSlices][PoolTiles::kLanes][V];
  const int lane = threadIdx.x % PoolTiles::kLanes, slice = threadIdx.x / PoolTiles::kLanes;
  const int64_t seq = first_seq + blockIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * PoolTiles::kLanes + lane) * V;
  int64_t begin = edges[seq], end = edges[seq + 1];
  if (mode == Mode::kCls) {
    end = smaller(end, begin + 1);
  } else if (mode == Mode::kLast) {
    begin = larger(begin, end - 1);
  }
  float sum[V] = {};
  if (column < hidden) {
    for (int64_t token = begin + slice; token < end; token += PoolTiles::kSlices) {
      float value[V];
      load<V>(x + token * hidden + column, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[i] += value[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    sums[slice][lane][i] = sum[i];
  }
  __syncthreads();
  if (slice == 0 && column < hidden) {
    const float scale = end > begin ? 1.0f / static_cast<float>(end - begin) : 0.0f;
    const int filled = static_cast<int>(smaller(end - begin, PoolTiles::kSlices));
    for (int other = 1; other < filled; ++other) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[i] += sums[other][lane][i];
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sum[i] *= scale;
    }
    store<V>(out + seq * hidden + column, sum);
  }
}

template <typename T, int V>
__global__ __launch_bounds__(PoolTiles::kThreads) void segment_pool_max_kernel(
    const T* __restrict__ x, const int32_t* __restrict__ edges, T* __restrict__ out,
    int32_t* __restrict__ index, int64_t hidden, int64_t first_seq) {
  __shared__ float values[PoolTiles::kSlices][PoolTiles::kLanes][V];
  __shared__ int32_t tokens[PoolTiles::kSlices][PoolTiles::kLanes][V];
  const int lane = threadIdx.x % PoolTiles::kLanes, slice = threadIdx.x / PoolTiles::kLanes;
  const int64_t seq = first_seq + blockIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * PoolTiles::kLanes + lane) * V;
  const int64_t begin = edges[seq], end = edges[seq + 1];
  Peak peak[V];
  if (column < hidden) {
    for (int64_t token = begin + slice; token < end; token += PoolTiles::kSlices) {
      float value[V];
      load<V>(x + token * hidden + column, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        peak[i] = higher(peak[i], {value[i], static_cast<int32_t>(token)});
      }
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    values[slice][lane][i] = peak[i].value;
    tokens[slice][lane][i] = peak[i].token;
  }
  __syncthreads();
  if (slice == 0 && column < hidden) {
    for (int other = 1; other < PoolTiles::kSlices; ++other) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        peak[i] = higher(peak[i], {values[other][lane][i], tokens[other][lane][i]});
      }
    }
    float best[V];
    int32_t winners[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      best[i] = peak[i].value;
      winners[i] = peak[i].token;
    }
    store<V>(out + seq * hidden + column, best);
    store_as_is<V>(index + seq * hidden + column, winners);
  }
}

template <typename T, int V>
__global__ __launch_bounds__(PoolTiles::kThreads) void segment_pool_bwd_kernel(
    const T* __restrict__ grad, const int32_t* __restrict__ index,
    const int32_t* __restrict__ edges, T* __restrict__ dx, int64_t total_tokens, int64_t hidden,
    int64_t num_seqs, Divider by_vectors, Mode mode) {
  __shared__ int64_t seqs[PoolTiles::kTokens];
  __shared__ float scales[PoolTiles::kTokens];  // of a token's gradient: 0, 1 or 1 / length
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * PoolTiles::kTokens;
  if (threadIdx.x < PoolTiles::kTokens) {
    const int64_t token = smaller(first_token + threadIdx.x, total_tokens - 1);
    const int64_t seq = find_sequence(edges, num_seqs, token);
    const int64_t begin = edges[seq], end = edges[seq + 1];
    const bool chosen = mode == Mode::kMax || token == (mode == Mode::kCls ? begin : end - 1);
    seqs[threadIdx.x] = seq;
    scales[threadIdx.x] = mode == Mode::kMean ? 1.0f / static_cast<float>(end - begin)
                          : chosen            ? 1.0f
                                              : 0.0f;
  }
  __syncthreads();
  const uint32_t items = PoolTiles::kTokens * by_vectors.divisor;
  for (uint32_t item = threadIdx.x; item < items; item += PoolTiles::kThreads) {
    const uint32_t t = by_vectors.quotient(item);
    const int64_t column = static_cast<int64_t>(by_vectors.remainder(item, t)) * V;
    const int64_t token = first_token + t;
    if (token >= total_tokens) {
      return;
    }
    const int64_t at = seqs[t] * hidden + column;
    const float scale = scales[t];
    float g[V] = {};
    if (scale != 0.0f) {
      load<V>(grad + at, g);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        g[i] *= scale;
      }
    }
    if (mode == Mode::kMax) {
      const auto winners = load<V>(index + at);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        g[i] = winners.items[i] == token ? g[i] : 0.0f;
      }
    }
    store<V>(dx + token * hidden + column, g);
  }
}

// ---- check, choose, launch ----------------------------------------------------------------------

Mode parse_mode(const std::string& mode) {
  if (mode == "mean") {
    return Mode::kMean;
  }
  if (mode == "cls") {
    return Mode::kCls;
  }
  if (mode == "max") {
    return Mode::kMax;
  }
  STD_TORCH_CHECK(mode == "last", "mode: expected mean, cls, max or last, got ", mode);
  return Mode::kLast;
}

std::tuple<Tensor, Tensor> segment_pool_fwd(const Tensor& x_in, const Tensor& cu_seqlens,
                                            std::string mode_name) {
  FASTENC_COUNT_LAUNCH("segment_pool");
  const Mode mode = parse_mode(mode_name);
  const Launcher launcher(x_in);
  check_dim("x", x_in, 2);
  const Tensor x = dense(x_in);
  const int32_t* edges = cu_seqlens_data(cu_seqlens, x);
  const int64_t hidden = x.size(1), num_seqs = cu_seqlens.size(0) - 1;
  Tensor out = torch::stable::new_empty(x, {num_seqs, hidden});
  const std::vector<int64_t> index_shape =
      mode == Mode::kMax ? std::vector<int64_t>{num_seqs, hidden} : std::vector<int64_t>{0};
  Tensor index = torch::stable::new_empty(x, index_shape, ScalarType::Int);
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors =
        vectors_fit(hidden, kVector<T>, address(x) | address(out) | address(index));
    dispatch_width<kVector<T>>(vectors, [&](auto width) {
      constexpr int V = decltype(width)::value;
      const int64_t blocks = ceil_div(hidden, V * PoolTiles::kLanes);
      STD_TORCH_CHECK(blocks <= kInt32Max, "segment_pool: hidden is too large");
      if (blocks == 0) {
        return;
      }
      for (int64_t first = 0; first < num_seqs; first += kGridY) {
        const dim3 grid(static_cast<unsigned>(blocks),
                        static_cast<unsigned>(smaller(kGridY, num_seqs - first)));
        if (mode == Mode::kMax) {
          segment_pool_max_kernel<T, V><<<grid, PoolTiles::kThreads, 0, launcher.stream()>>>(
              data<T>(x), edges, mutable_data<T>(out), mutable_data<int32_t>(index), hidden, first);
        } else {
          segment_pool_mean_kernel<T, V><<<grid, PoolTiles::kThreads, 0, launcher.stream()>>>(
              data<T>(x), edges, mutable_data<T>(out), hidden, first, mode);
        }
        Launcher::check_launch("segment_pool");
      }
    });
  });
  return {out, index};
}

Tensor segment_pool_bwd(const Tensor& grad_in, const Tensor& index_in, const Tensor& cu_seqlens,
                        int64_t total_tokens, std::string mode_name) {
  FASTENC_COUNT_LAUNCH("segment_pool_bwd");
  const Mode mode = parse_mode(mode_name);
  const Launcher launcher(grad_in);
  check_dim("grad", grad_in, 2);
  const Tensor grad = dense(grad_in), index = dense(index_in);
  const int64_t hidden = grad.size(1), num_seqs = grad.size(0);
  const int32_t* edges = cu_seqlens_data(cu_seqlens, grad);
  check_numel("cu_seqlens", cu_seqlens, num_seqs + 1);
  STD_TORCH_CHECK(total_tokens >= 0 && (total_tokens == 0 || num_seqs > 0),
                  "total_tokens: expected 0 without sequences, got ", total_tokens);
  if (mode == Mode::kMax) {
    check_cuda("index", index, grad);
    check_dtype("index", index, ScalarType::Int);
    check_numel("index", index, grad.numel());
  }
  Tensor dx = torch::stable::new_empty(grad, {total_tokens, hidden});
  dispatch_dtype("grad", grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors =
        vectors_fit(hidden, kVector<T>, address(grad) | address(index) | address(dx));
    dispatch_width<kVector<T>>(vectors, [&](auto width) {
      constexpr int V = decltype(width)::value;
      if (dx.numel() == 0) {
        return;
      }
      const int64_t columns = hidden / V, blocks = ceil_div(total_tokens, PoolTiles::kTokens);
      STD_TORCH_CHECK(columns <= kInt32Max / (2 * PoolTiles::kTokens) && blocks <= kInt32Max,
                      "segment_pool_bwd: ", total_tokens, " tokens of ", hidden,
                      " columns are more than one launch can cover");
      segment_pool_bwd_kernel<T, V>
          <<<static_cast<unsigned>(blocks), PoolTiles::kThreads, 0, launcher.stream()>>>(
              data<T>(grad), data<int32_t>(index), edges, mutable_data<T>(dx), total_tokens, hidden,
              num_seqs, Divider(static_cast<uint32_t>(columns)), mode);
      Launcher::check_launch("segment_pool_bwd");
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cuda, CUDA, m) {
  m.impl("segment_pool_fwd", TORCH_BOX(&segment_pool_fwd));
  m.impl("segment_pool_bwd", TORCH_BOX(&segment_pool_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CUDA, m) {
  m.impl("segment_pool_fwd", TORCH_BOX(&segment_pool_fwd));
  m.impl("segment_pool_bwd", TORCH_BOX(&segment_pool_bwd));
}

}  // namespace fastenc::cuda
