// Rotate-half of (total_tokens, n, heads, head_dim) by each token's position. x has any strides
// with unit stride inside a head (packed qkv is read in place); the output is contiguous. The
// backward is the same kernel with -sin.
//
// A thread takes one vector of the first half and the same one of the second, of up to four heads
// of a token, so that it reads position, cos and sin once for them.
#pragma once

#include "vectors.cuh"

namespace fastenc::cuda {

struct RopeArgs {
  RopeTiles tiles;
  int64_t half;
  int64_t stride_token, stride_n, stride_head;  // of x, in elements
  const void* positions;
  bool wide_positions;  // int64, else int32
  float sign;           // of sin: -1 rotates back
};

template <typename T, typename C, int V>
__global__ __launch_bounds__(FlatTiles::kThreads) void rope_kernel(
    const T* __restrict__ x, T* __restrict__ y, const C* __restrict__ cos,
    const C* __restrict__ sin, const __grid_constant__ RopeArgs args) {
  const RopeTiles& tiles = args.tiles;
  const Place place = tiles.flat.locate(blockIdx.y, blockIdx.x, threadIdx.x);
  if (!place.inside) {
    return;
  }
  const int64_t token = place.row;
  const RopeItem item = tiles.item(place.column);
  const int64_t column = static_cast<int64_t>(item.vector) * V;
  const int64_t position = args.wide_positions ? static_cast<const int64_t*>(args.positions)[token]
                                               : static_cast<const int32_t*>(args.positions)[token];
  Pack<T, V> first[RopeTiles::kHeads], second[RopeTiles::kHeads];
#pragma unroll
  for (int i = 0; i < RopeTiles::kHeads; ++i) {
    const uint32_t head = tiles.head(item.first_head, i);
    if (head < tiles.all_heads) {
      const uint32_t k = tiles.by_heads.quotient(head);
      const uint32_t h = tiles.by_heads.remainder(head, k);
      const T* row = x + token * args.stride_token + k * args.stride_n + h * args.stride_head;
      first[i] = load<V>(row + column);
      second[i] = load<V>(row + args.half + column);
    }
  }
  float c[V], s[V];
  load<V>(cos + position * args.half + column, c);
  load<V>(sin + position * args.half + column, s);
  T* out = y + token * tiles.all_heads * 2 * args.half + column;
#pragma unroll
  for (int i = 0; i < RopeTiles::kHeads; ++i) {
    const uint32_t head = tiles.head(item.first_head, i);
    if (head < tiles.all_heads) {
      float a[V], b[V], turned_a[V], turned_b[V];
      unpack(first[i], a);
      unpack(second[i], b);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float signed_sin = args.sign * s[j];
        turned_a[j] = fmaf(-b[j], signed_sin, a[j] * c[j]);
        turned_b[j] = fmaf(a[j], signed_sin, b[j] * c[j]);
      }
      store<V>(out + head * 2 * args.half, turned_a);
      store<V>(out + head * 2 * args.half + args.half, turned_b);
    }
  }
}

}  // namespace fastenc::cuda
