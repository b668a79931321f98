// The kernels of geglu, rope and segment_pool, for every dtype and vector width, behind plain C
// functions. On how many blocks they run is for csrc/common/row_tiles.h to say, as on a GPU.
#include "csrc/cuda/geglu.cuh"
#include "csrc/cuda/rope.cuh"
#include "csrc/cuda/segment_pool.cuh"
#include "rows.h"

using namespace fastenc;
using namespace fastenc::cuda;

namespace {

template <typename F>
void dispatch_activation(int activation, F&& f) {
  activation == 0   ? f(std::integral_constant<Activation, Activation::kGelu>{})
  : activation == 1 ? f(std::integral_constant<Activation, Activation::kGeluTanh>{})
                    : f(std::integral_constant<Activation, Activation::kSilu>{});
}

// With at most `rows` rows a group, if not 0: of itself a group holds 2^31 items.
FlatTiles regrouped(FlatTiles tiles, int64_t rows) {
  if (rows > 0) {
    tiles.rows_per_group = smaller(rows, tiles.rows_per_group);
    tiles.blocks = blocks_of(tiles.rows_per_group * tiles.columns, FlatTiles::kThreads);
    tiles.groups = blocks_of(tiles.rows, tiles.rows_per_group);
  }
  return tiles;
}

}  // namespace

// Every function returns the elements that a thread moves at once.
extern "C" {

int geglu_fwd(int dtype, int activation, const void* x, void* y, int64_t rows, int64_t inner,
              int64_t group, int backwards) {
  int used = 0;
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    dispatch_width<kVector<T>>(vectors_fit(inner, kVector<T>, address(x, y)), [&](auto width) {
      constexpr int V = decltype(width)::value;
      used = V;
      const FlatTiles tiles = regrouped(make_flat_tiles(rows, inner / V), group);
      dispatch_activation(activation, [&](auto act) {
        emulator::launch(
            {tiles.blocks, tiles.groups}, {FlatTiles::kThreads}, 0,
            [&] {
              geglu_fwd_kernel<T, V, decltype(act)::value>(static_cast<const T*>(x),
                                                           static_cast<T*>(y), tiles);
            },
            backwards);
      });
    });
  });
  return used;
}

int geglu_bwd(int dtype, int activation, const void* grad, const void* x, void* dx, int64_t rows,
              int64_t inner, int64_t group, int backwards) {
  int used = 0;
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    dispatch_width<kVector<T>>(
        vectors_fit(inner, kVector<T>, address(grad, x, dx)), [&](auto width) {
          constexpr int V = decltype(width)::value;
          used = V;
          const FlatTiles tiles = regrouped(make_flat_tiles(rows, inner / V), group);
          dispatch_activation(activation, [&](auto act) {
            emulator::launch(
                {tiles.blocks, tiles.groups}, {FlatTiles::kThreads}, 0,
                [&] {
                  geglu_bwd_kernel<T, V, decltype(act)::value>(static_cast<const T*>(grad),
                                                               static_cast<const T*>(x),
                                                               static_cast<T*>(dx), tiles);
                },
                backwards);
          });
        });
  });
  return used;
}

// Tables in fp32 or in the dtype of x. strides: of token, n and head.
int rope(int dtype, int table_dtype, const void* x, void* y, const void* cos, const void* sin,
         const void* positions, int wide_positions, int64_t tokens, int64_t n, int64_t heads,
         int64_t head_dim, const int64_t* strides, float sign, int64_t group, int backwards) {
  int used = 0;
  const int64_t half = head_dim / 2;
  const uint64_t bits =
      (tokens > 1 ? strides[0] : 0) | (n > 1 ? strides[1] : 0) | (heads > 1 ? strides[2] : 0);
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool vectors = vectors_fit(half, kVector<T>, address(x, y, cos, sin) | bits * sizeof(T));
    const auto run = [&](auto table) {
      using C = decltype(table);
      dispatch_width<kVector<T>>(vectors, [&](auto width) {
        constexpr int V = decltype(width)::value;
        used = V;
        RopeArgs args{make_rope_tiles(tokens, n, heads, half / V),
                      half,
                      strides[0],
                      strides[1],
                      strides[2],
                      positions,
                      wide_positions != 0,
                      sign};
        args.tiles.flat = regrouped(args.tiles.flat, group);
        emulator::launch(
            {args.tiles.flat.blocks, args.tiles.flat.groups}, {FlatTiles::kThreads}, 0,
            [&] {
              rope_kernel<T, C, V>(static_cast<const T*>(x), static_cast<T*>(y),
                                   static_cast<const C*>(cos), static_cast<const C*>(sin), args);
            },
            backwards);
      });
    };
    table_dtype == 0 ? run(float{}) : run(tag);
  });
  return used;
}

// most: sequences of one launch, kGridY on a GPU. index: null unless the mode is max.
int segment_pool_fwd(int dtype, int mode, const void* x, const int32_t* edges, void* out,
                     int32_t* index, int64_t num_seqs, int64_t hidden, int64_t most,
                     int backwards) {
  int used = 0;
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    dispatch_width<kVector<T>>(
        vectors_fit(hidden, kVector<T>, address(x, out, index)), [&](auto width) {
          constexpr int V = decltype(width)::value;
          used = V;
          const T* from = static_cast<const T*>(x);
          T* to = static_cast<T*>(out);
          for (int64_t first = 0; first < num_seqs; first += most) {
            const dim3 grid{blocks_of(hidden, V * PoolTiles::kLanes),
                            static_cast<uint32_t>(smaller(most, num_seqs - first))};
            emulator::launch(
                grid, {PoolTiles::kThreads}, 0,
                [&] {
                  index == nullptr
                      ? segment_pool_mean_kernel<T, V>(from, edges, to, hidden, first,
                                                       static_cast<PoolMode>(mode))
                      : segment_pool_max_kernel<T, V>(from, edges, to, index, hidden, first);
                },
                backwards);
          }
        });
  });
  return used;
}

int segment_pool_bwd(int dtype, int mode, const void* grad, const int32_t* index,
                     const int32_t* edges, void* dx, int64_t total_tokens, int64_t num_seqs,
                     int64_t hidden, int backwards) {
  int used = 0;
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    dispatch_width<kVector<T>>(
        vectors_fit(hidden, kVector<T>, address(grad, index, dx)), [&](auto width) {
          constexpr int V = decltype(width)::value;
          used = V;
          emulator::launch(
              {blocks_of(total_tokens, PoolTiles::kTokens)}, {PoolTiles::kThreads}, 0,
              [&] {
                segment_pool_bwd_kernel<T, V>(static_cast<const T*>(grad), index, edges,
                                              static_cast<T*>(dx), total_tokens, hidden, num_seqs,
                                              Divider(static_cast<uint32_t>(hidden / V)),
                                              static_cast<PoolMode>(mode));
              },
              backwards);
        });
  });
  return used;
}
}
