// Index arithmetic of the GPU row kernels: which rows and columns a thread owns, where a vector
// access is legal, how the deterministic reductions are cut. Neither CUDA nor torch in here:
// g++ compiles it too, and tests/test_cuda_row_tiles.py checks it against brute force.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTENC_HD __host__ __device__ __forceinline__
#else
#define FASTENC_HD inline
#endif

namespace fastenc {

FASTENC_HD constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
FASTENC_HD constexpr int64_t round_up(int64_t n, int64_t d) { return ceil_div(n, d) * d; }
FASTENC_HD constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTENC_HD constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int kWarp = 32;
constexpr int kAccessBytes = 16;  // the widest load and store of a thread
constexpr int64_t kInt32Max = 0x7fffffff;
constexpr int64_t kGridY = 65535;  // CUDA's limit on gridDim.y

// n / d and n % d for 0 <= n < 2^31 by one multiplication: a division costs about twenty
// instructions on a GPU, which the GeGLU kernels do not have to spare (see csrc/cuda/geglu.cu).
// Granlund and Montgomery 1994, figure 4.1, with n < 2^31 so that the sum below cannot overflow.
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) {
      ++shift;
    }
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
  FASTENC_HD uint32_t quotient(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> 32);
    return (high + n) >> shift;
  }
  FASTENC_HD uint32_t remainder(uint32_t n, uint32_t q) const { return n - q * divisor; }
};

// Whether `width` elements at a time can be moved: `size` elements of each run are a multiple of
// it, and `bits`, the OR of every address and every stride in bytes, keeps `alignment`.
FASTENC_HD bool vectors_fit(int64_t size, int width, uint64_t bits, int alignment = kAccessBytes) {
  return size % width == 0 && bits % alignment == 0;
}

// ---- elementwise kernels: one item a thread, items of a row side by side ------------------------

struct Place {
  int64_t row;
  uint32_t column;
  bool inside;
};

// A grid of (blocks, groups): a group is a run of rows whose items count in 32 bits, so that the
// only 64-bit arithmetic of a thread is one multiply-add for its row.
struct FlatTiles {
  static constexpr int kThreads = 256;  // eight warps: whole SMs of 2048 threads, small tails

  int64_t rows = 0, rows_per_group = 1;
  uint32_t columns = 1;  // items of a row
  uint32_t blocks = 0, groups = 0;
  Divider by_columns;

  FASTENC_HD Place locate(uint32_t group, uint32_t block, uint32_t thread) const {
    const uint32_t item = block * kThreads + thread;
    const uint32_t row_in_group = by_columns.quotient(item);
    const int64_t row = group * rows_per_group + row_in_group;
    return {row, by_columns.remainder(item, row_in_group),
            row_in_group < rows_per_group && row < rows};
  }
};

inline bool flat_tiles_fit(int64_t rows, int64_t columns) {
  const int64_t items = kInt32Max - FlatTiles::kThreads;
  return columns <= items && ceil_div(rows, larger(1, items / larger(1, columns))) <= kGridY;
}

// Needs flat_tiles_fit(rows, columns) and columns >= 1.
inline FlatTiles make_flat_tiles(int64_t rows, int64_t columns) {
  FlatTiles tiles;
  tiles.rows = rows;
  tiles.columns = static_cast<uint32_t>(columns);
  tiles.by_columns = Divider(tiles.columns);
  tiles.rows_per_group = larger(1, smaller(rows, (kInt32Max - FlatTiles::kThreads) / columns));
  tiles.blocks =
      static_cast<uint32_t>(ceil_div(tiles.rows_per_group * columns, FlatTiles::kThreads));
  tiles.groups = static_cast<uint32_t>(ceil_div(rows, tiles.rows_per_group));
  return tiles;
}

// ---- RoPE: a thread takes one vector of a few heads, so that it reads cos and sin once ----------

struct RopeItem {
  uint32_t first_head, vector;
};

struct RopeTiles {
  // Eight 16-byte loads in flight a thread at four heads; cos and sin then cost a quarter of x.
  static constexpr int kHeads = 4;

  FlatTiles flat;  // rows: tokens; columns: (group of heads, vector)
  uint32_t all_heads = 0, step = 0;
  Divider by_vectors, by_heads;

  FASTENC_HD RopeItem item(uint32_t column) const {
    const uint32_t first = by_vectors.quotient(column);
    return {first, by_vectors.remainder(column, first)};
  }
  // Neighbouring threads take neighbouring heads: the heads of one thread are `step` apart.
  FASTENC_HD uint32_t head(uint32_t first_head, int i) const { return first_head + i * step; }
};

// n x heads heads a token, `vectors` vectors a half head. Needs every factor >= 1.
inline bool rope_tiles_fit(int64_t tokens, int64_t n, int64_t heads, int64_t vectors) {
  return n <= kInt32Max && heads <= kInt32Max / n && vectors <= kInt32Max &&
         n * heads <= (kInt32Max - 2 * RopeTiles::kHeads * vectors) / vectors &&
         flat_tiles_fit(tokens, ceil_div(n * heads, RopeTiles::kHeads) * vectors);
}

inline RopeTiles make_rope_tiles(int64_t tokens, int64_t n, int64_t heads, int64_t vectors) {
  RopeTiles tiles;
  tiles.all_heads = static_cast<uint32_t>(n * heads);
  tiles.step = static_cast<uint32_t>(ceil_div(n * heads, RopeTiles::kHeads));
  tiles.flat = make_flat_tiles(tokens, tiles.step * vectors);
  tiles.by_vectors = Divider(static_cast<uint32_t>(vectors));
  tiles.by_heads = Divider(static_cast<uint32_t>(heads));
  return tiles;
}

// ---- LayerNorm: whole rows in the registers of one warp or one block ----------------------------

struct RowPlan {
  bool in_registers;    // else a block walks its row several times, scalar accesses
  int elements;         // of a row, held by one thread
  int threads_per_row;  // whole warps
  int rows_per_block;   // forward only
  int64_t blocks;
};

// 128 registers a thread at 512 threads: what the kernels below need without spilling.
constexpr int kMaxRowThreads = 512;
constexpr int kLoopThreads = 256;
// Forward: 32 fp32 values of a row a thread, so that rows up to 1024 belong to one warp and need
// no barrier; four such warps make a block.
constexpr int kForwardElements = 32;
constexpr int kForwardWarps = 4;
// Backward: a thread also holds weight, dweight and dbias of its columns: 8 values each, 16 for
// rows wider than 512 threads of 8.
constexpr int kBackwardElements = 8;
constexpr int kWideBackwardElements = 16;
// Backward blocks on an SM at a time; 1024 threads keep about 48 KB of loads in flight, twice what
// 4 TB/s needs at a latency of 800 ns. Each block costs one partial row, so at most eight.
constexpr int kBackwardThreadsPerSm = 1024;
constexpr int kBackwardBlocksPerSm = 8;

inline RowPlan plan_layer_norm(int64_t rows, int64_t hidden, bool vectors) {
  if (!vectors || hidden > kForwardElements * kMaxRowThreads) {
    return {false, 1, kLoopThreads, 1, rows};
  }
  const int threads = static_cast<int>(round_up(ceil_div(hidden, kForwardElements), kWarp));
  const int rows_per_block = threads == kWarp ? kForwardWarps : 1;
  return {true, kForwardElements, threads, rows_per_block, ceil_div(rows, rows_per_block)};
}

// A block b takes rows b, b + blocks, b + 2 blocks, ... in this order.
inline RowPlan plan_layer_norm_bwd(int64_t rows, int64_t hidden, bool vectors, int sm_count) {
  const bool in_registers = vectors && hidden <= kWideBackwardElements * kMaxRowThreads;
  const int elements = !in_registers                                  ? 1
                       : hidden <= kBackwardElements * kMaxRowThreads ? kBackwardElements
                                                                      : kWideBackwardElements;
  const int threads =
      in_registers ? static_cast<int>(round_up(ceil_div(hidden, elements), kWarp)) : kLoopThreads;
  const int64_t per_sm = larger(1, smaller(kBackwardBlocksPerSm, kBackwardThreadsPerSm / threads));
  return {in_registers, elements, threads, 1, smaller(rows, per_sm * sm_count)};
}

// Column of the k-th vector of a thread; past `hidden` it owns nothing.
FASTENC_HD int64_t row_column(int thread, int k, int threads_per_row, int width) {
  return (static_cast<int64_t>(k) * threads_per_row + thread) * width;
}

// The second pass: partial rows (count, pitch) summed to one row. A block takes kColumns columns;
// slice s adds partials s, s + kSlices, ... in order, then the slices are added in order.
struct PartialSums {
  static constexpr int kWidth = 4;    // fp32 in 16 bytes
  static constexpr int kLanes = 8;    // eight of them are one 128-byte line
  static constexpr int kSlices = 32;  // 256 threads: 1056 partials of 132 SMs are 33 loads each
  static constexpr int kColumns = kWidth * kLanes;

  static constexpr int64_t pitch(int64_t hidden) { return round_up(hidden, kWidth); }
};

// ---- segments -----------------------------------------------------------------------------------

// The sequence of `token`: the last i with edges[i] <= token, which skips empty sequences.
FASTENC_HD int64_t find_sequence(const int32_t* edges, int64_t num_seqs, int64_t token) {
  int64_t low = 0, high = num_seqs;  // edges[low] <= token < edges[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (edges[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// A running maximum with the token it came from; token -1 holds nothing yet.
struct Peak {
  float value = 0.0f;
  int32_t token = -1;
};

// torch's order: NaN above everything, the first occurrence among equals. Any grouping of the
// tokens gives the same result as a scan from first to last.
FASTENC_HD Peak higher(Peak a, Peak b) {
  if (a.token < 0 || b.token < 0) {
    return a.token < 0 ? b : a;
  }
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  const bool equal = (a_nan && b_nan) || a.value == b.value;
  const bool b_wins = equal ? b.token < a.token : b_nan || (!a_nan && b.value > a.value);
  return b_wins ? b : a;
}

// segment_pool: a block takes 8 vectors of columns of one sequence, 32 slices of its tokens.
struct PoolTiles {
  static constexpr int kLanes = 8;    // 128 bytes of a token, one line
  static constexpr int kSlices = 32;  // eight warps; 30-token sequences keep them all busy
  static constexpr int kThreads = kLanes * kSlices;
  static constexpr int kTokens = 32;  // backward: tokens of a block, one search for each
};

}  // namespace fastenc
