// act(x[:, :I]) * x[:, I:] over (rows, 2 I), and its gradient.
//
// A thread takes one vector of `a` and the same one of `gate`: 16-byte loads and stores, fp32
// between them. Where I or an address does not allow that, the same kernel with scalar accesses.
#pragma once

#include "../common/activation_kinds.h"
#include "vectors.cuh"

namespace fastenc::cuda {

constexpr float kSqrtHalf = 0.707106781f;
constexpr float kInvSqrt2Pi = 0.398942280f;
constexpr float kSqrt2OverPi = 0.797884561f;
constexpr float kCubic = 0.044715f;

struct ActivationAndSlope {
  float value, slope;
};

// A caller that needs no slope does not pay for it: the compiler drops it.
template <Activation kActivation>
__device__ __forceinline__ ActivationAndSlope activate(float a) {
  if constexpr (kActivation == Activation::kSilu) {
    const float s = 1.0f / (1.0f + expf(-a));
    return {a * s, s * fmaf(a, 1.0f - s, 1.0f)};
  } else if constexpr (kActivation == Activation::kGelu) {
    const float cdf = fmaf(0.5f, erff(a * kSqrtHalf), 0.5f);
    const float pdf = kInvSqrt2Pi * expf(-0.5f * a * a);
    return {a * cdf, fmaf(a, pdf, cdf)};
  } else {
    const float t = tanhf(kSqrt2OverPi * fmaf(kCubic * a * a, a, a));
    const float inner = kSqrt2OverPi * fmaf(3.0f * kCubic * a, a, 1.0f);
    const float cdf = fmaf(0.5f, t, 0.5f);
    return {a * cdf, fmaf(0.5f * a * fmaf(-t, t, 1.0f), inner, cdf)};
  }
}

// Where a thread's vectors lie: in y, `a` in x, and its gate `inner` elements behind.
template <int V>
struct GatedPlace {
  bool inside;
  int64_t inner, at, input_at;

  __device__ __forceinline__ explicit GatedPlace(const FlatTiles& tiles) {
    const Place place = tiles.locate(blockIdx.y, blockIdx.x, threadIdx.x);
    inside = place.inside;
    inner = static_cast<int64_t>(tiles.columns) * V;
    at = place.row * inner + static_cast<int64_t>(place.column) * V;
    input_at = at + place.row * inner;
  }
};

template <typename T, int V, Activation kActivation>
__global__ __launch_bounds__(FlatTiles::kThreads) void geglu_fwd_kernel(
    const T* __restrict__ x, T* __restrict__ y, const __grid_constant__ FlatTiles tiles) {
  const GatedPlace<V> place(tiles);
  if (!place.inside) {
    return;
  }
  const T* from = x + place.input_at;
  float a[V], gate[V], out[V];
  const auto packed_a = load<V>(from), packed_gate = load<V>(from + place.inner);
  unpack(packed_a, a);
  unpack(packed_gate, gate);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    out[i] = activate<kActivation>(a[i]).value * gate[i];
  }
  store<V>(y + place.at, out);
}

template <typename T, int V, Activation kActivation>
__global__ __launch_bounds__(FlatTiles::kThreads) void geglu_bwd_kernel(
    const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ dx,
    const __grid_constant__ FlatTiles tiles) {
  const GatedPlace<V> place(tiles);
  if (!place.inside) {
    return;
  }
  const T* from = x + place.input_at;
  T* to = dx + place.input_at;
  float g[V], a[V], gate[V], to_input[V], to_gate[V];
  const auto packed_g = load<V>(grad + place.at);
  const auto packed_a = load<V>(from), packed_gate = load<V>(from + place.inner);
  unpack(packed_g, g);
  unpack(packed_a, a);
  unpack(packed_gate, gate);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const ActivationAndSlope f = activate<kActivation>(a[i]);
    to_input[i] = g[i] * gate[i] * f.slope;
    to_gate[i] = g[i] * f.value;
  }
  store<V>(to, to_input);
  store<V>(to + place.inner, to_gate);
}

}  // namespace fastenc::cuda
