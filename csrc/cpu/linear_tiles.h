// The matrix products of the linear layers; included once per ISA by linear.cpp.
//
//   few rows   tiles of dot products with the lanes along k: w is read once, as it lies
//   panels     Goto and van de Geijn 2008: a panel of w, one run of k by the width of a tile, is
//              copied to where L1 holds it; tiles of y in registers take x one broadcast a row
#if defined(FASTENC_LINEAR_TILES_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_LINEAR_TILES_TOGGLE
#undef FASTENC_LINEAR_TILES_TOGGLE
#else
#define FASTENC_LINEAR_TILES_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

constexpr bool kWideRegisters = FASTENC_ISA_LEVEL == FASTENC_ISA_AVX512;

FASTENC_INLINE int lanes_of(int64_t left) {
  return static_cast<int>(std::clamp<int64_t>(left, 0, kLanes));
}

template <int M, int N>
FASTENC_INLINE void clear(vf (&acc)[M][N]) {
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      acc[m][n] = zero();
    }
  }
}

// ---- few rows -----------------------------------------------------------------------------------

constexpr int kDotRows = 4;
constexpr int kDotColumns = kWideRegisters ? 4 : 3;
// So many products of a lane are added up before they join the sum of the others: with four lanes
// and one run the error at 900 products is 1.8 times MKL's.
constexpr int64_t kDotRun = 64 * kLanes;

template <bool kWhole>
FASTENC_INLINE vf load_lanes(const float* from, int lanes) {
  if constexpr (kWhole) {
    return load(from);
  } else {
    return load_n(from, lanes);
  }
}

template <bool kWhole, int M, int N>
FASTENC_INLINE void dot_step(const float* x, int64_t x_m, const float* w, int64_t w_n, int lanes,
                             vf (&acc)[M][N]) {
  vf a[M];
  for (int m = 0; m < M; ++m) {
    a[m] = load_lanes<kWhole>(x + m * x_m, lanes);
  }
  for (int n = 0; n < N; ++n) {
    const vf b = load_lanes<kWhole>(w + n * w_n, lanes);
    for (int m = 0; m < M; ++m) {
      acc[m][n] = fma(a[m], b, acc[m][n]);
    }
  }
}

// Rows of w are too short for the hardware to run ahead in them: the tile asks for its successor's.
template <int M, int N>
FASTENC_INLINE void dot_tile(const LinearProblem& p, int64_t row, int64_t column, bool fetch) {
  const float* x = p.x + row * p.x_m;
  const float* w = p.w + column * p.w_n;
  const float* next = w + (fetch ? N * p.w_n : 0);
  vf sum[M][N];
  clear(sum);
  for (int64_t begin = 0; begin < p.k; begin += kDotRun) {
    const int64_t end = std::min(p.k, begin + kDotRun);
    vf acc[M][N];
    clear(acc);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      dot_step<true>(x + i, p.x_m, w + i, p.w_n, kLanes, acc);
      for (int n = 0; n < N; ++n) {
        __builtin_prefetch(next + n * p.w_n + i);
      }
    }
    if (i < end) {
      dot_step<false>(x + i, p.x_m, w + i, p.w_n, lanes_of(end - i), acc);
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        sum[m][n] = sum[m][n] + acc[m][n];
      }
    }
  }
  constexpr int kGroups = (M * N + kLanes - 1) / kLanes;
  vf flat[kGroups][kLanes];
  for (int i = 0; i < kGroups * kLanes; ++i) {
    flat[i / kLanes][i % kLanes] = i < M * N ? sum[i / N][i % N] : zero();
  }
  alignas(64) float dots[kGroups * kLanes];
  for (int i = 0; i < kGroups; ++i) {
    store(dots + i * kLanes, sums(flat[i]));
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      p.y[(row + m) * p.y_m + column + n] =
          dots[m * N + n] + (p.bias == nullptr ? 0.0f : p.bias[column + n]);
    }
  }
}

template <int N, int M = kDotRows>
FASTENC_INLINE void dot_rows(const LinearProblem& p, int64_t row, int64_t rows, int64_t column,
                             bool fetch) {
  if (rows == M) {
    dot_tile<M, N>(p, row, column, fetch);
  } else if constexpr (M > 1) {
    dot_rows<N, M - 1>(p, row, rows, column, fetch);
  }
}

template <int N>
void dot_column(const LinearProblem& p, int64_t begin, int64_t end, int64_t column, bool fetch) {
  // Five rows are three and two, not four and one.
  const int64_t blocks = (end - begin + kDotRows - 1) / kDotRows;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t row = begin + (end - begin) * i / blocks;
    dot_rows<N>(p, row, begin + (end - begin) * (i + 1) / blocks - row, column, fetch && i == 0);
  }
}

// Rows [row_begin, row_end) of the columns [begin, end); x and w of unit stride along k.
inline void linear_dots(const LinearProblem& p, int64_t row_begin, int64_t row_end, int64_t begin,
                        int64_t end) {
  int64_t column = begin;
  for (; column + kDotColumns <= end; column += kDotColumns) {
    dot_column<kDotColumns>(p, row_begin, row_end, column, column + 2 * kDotColumns <= end);
  }
  for (; column < end; ++column) {
    dot_column<1>(p, row_begin, row_end, column, false);
  }
}

// ---- panels -------------------------------------------------------------------------------------

// Rows and vectors of a tile: its accumulators, one row of the panel and a broadcast are the
// registers. kWide is for cores whose L1 holds a panel of three vectors (36 KiB) beside the rows.
// Zen 4, share of the two FMA pipes' peak: 8x2 and 4x3 98%, 12x2 97%, 14x2 92% (spills).
// Sapphire Rapids, AVX-512, share of MKL's rate: 9x3 95%, 8x3 91%, 8x2, 12x2, 14x2, 6x4 88 to 89%.
template <bool kWide>
struct PanelTile {
  static constexpr int kRows = kWideRegisters ? (kWide ? 9 : 8) : 4;
  static constexpr int kVectors = kWideRegisters && !kWide ? 2 : 3;
  static constexpr int64_t kWidth = kVectors * kLanes;
  // Rows of x that stay in L2 while the panels of a group pass.
  static constexpr int64_t kRowsInL2 = 160 / kRows * kRows;
};

// Runs of a group and its columns.
constexpr int64_t kRunsInL2 = 4;
constexpr int64_t group_columns(int64_t depth) {
  return std::clamp<int64_t>(262144 / std::max<int64_t>(1, depth), 128, 512);
}

// Vector v of each row of a panel: `lanes` rows of w from `from` on, whole where neither they nor
// `depth` products of the run end early.
template <bool kWhole>
FASTENC_INLINE void copy_block(const float* from, int64_t w_n, int lanes, int depth, int64_t pitch,
                               float* to) {
  vf rows[kLanes];
  for (int n = 0; n < kLanes; ++n) {
    if constexpr (kWhole) {
      rows[n] = load(from + n * w_n);
    } else {
      rows[n] = n < lanes ? load_n(from + n * w_n, depth) : zero();
    }
  }
  transpose(rows);
  for (int d = 0; d < (kWhole ? kLanes : depth); ++d) {
    store(to + d * pitch, rows[d]);
  }
}

FASTENC_INLINE void copy_vector(const float* from, int64_t w_n, int64_t w_k, int lanes, int64_t run,
                                int64_t pitch, float* to) {
  if (w_k != 1) {
    for (int64_t i = 0; i < run; ++i) {
      store(to + i * pitch, load_n(from + i * w_k, lanes));
    }
    return;
  }
  for (int64_t i = 0; i < run; i += kLanes) {
    const int depth = lanes_of(run - i);
    if (lanes == kLanes && depth == kLanes) {
      copy_block<true>(from + i, w_n, lanes, depth, pitch, to + i * pitch);
    } else {
      copy_block<false>(from + i, w_n, lanes, depth, pitch, to + i * pitch);
    }
  }
}

// Rows of x where it lies along them, by tiles of M: element (m, i) goes to to[m / M * M * pitch +
// i * M + m % M]. Each i is a page of its own: all its rows are copied in one visit.
template <int M>
FASTENC_INLINE void copy_across(const float* from, int64_t x_k, int64_t rows, int64_t run,
                                int64_t pitch, float* to) {
  for (int64_t i = 0; i < run; ++i) {
    const float* x = from + i * x_k;
    float* tile = to + i * M;
    int64_t m = 0;
    for (; m + M <= rows; m += M, tile += M * pitch) {
      std::copy_n(x + m, M, tile);
    }
    std::copy_n(x + m, rows - m, tile);
  }
}

// Element (m, i) of x is at x[m * pitch + i], or across at x[i * kAcross + m].
template <int kAcross, int M, int NV>
FASTENC_INLINE void multiply_tile(const float* x, int64_t pitch, const float* panel, int64_t run,
                                  vf (&acc)[M][NV]) {
  clear(acc);
  for (int64_t i = 0; i < run; ++i) {
    vf b[NV];
    for (int v = 0; v < NV; ++v) {
      b[v] = load(panel + (i * NV + v) * kLanes);
    }
    for (int m = 0; m < M; ++m) {
      const vf a = set(kAcross ? x[i * kAcross + m] : x[m * pitch + i]);
      for (int v = 0; v < NV; ++v) {
        acc[m][v] = fma(a, b[v], acc[m][v]);
      }
    }
  }
}

// What one run adds to a tile of y; the first run overwrites, the last one adds the bias.
struct Run {
  int64_t length;
  bool first, last;
};

template <bool kFirst, int M, int NV>
FASTENC_INLINE void store_tile(float* y, int64_t y_m, const vf (&bias)[NV],
                               const vf (&acc)[M][NV]) {
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < NV; ++v) {
      float* at = y + m * y_m + v * kLanes;
      store(at, (kFirst ? acc[m][v] : load(at) + acc[m][v]) + bias[v]);
    }
  }
}

// The tile that the last columns do not fill.
template <int M, int NV>
[[gnu::noinline]] void add_part_of_tile(const float* tile, bool first, int64_t columns, float* y,
                                        int64_t y_m) {
  for (int m = 0; m < M; ++m) {
    for (int64_t i = 0; i < columns; ++i) {
      const float sum = tile[m * NV * kLanes + i];
      y[m * y_m + i] = first ? sum : y[m * y_m + i] + sum;
    }
  }
}

template <int M, int NV>
FASTENC_INLINE void add_tile(const LinearProblem& p, Run run, int64_t row, int64_t column,
                             const vf (&acc)[M][NV]) {
  vf bias[NV];
  for (int v = 0; v < NV; ++v) {
    bias[v] = run.last && p.bias != nullptr
                  ? load_n(p.bias + column + v * kLanes, lanes_of(p.n - column - v * kLanes))
                  : zero();
  }
  float* y = p.y + row * p.y_m + column;
  if (column + NV * kLanes > p.n) {
    alignas(64) float tile[M * NV * kLanes];
    store_tile<true>(tile, NV * kLanes, bias, acc);
    add_part_of_tile<M, NV>(tile, run.first, p.n - column, y, p.y_m);
  } else if (run.first) {
    store_tile<true>(y, p.y_m, bias, acc);
  } else {
    store_tile<false>(y, p.y_m, bias, acc);
  }
}

template <int kAcross, int NV, int M>
FASTENC_INLINE void row_tile(const LinearProblem& p, Run run, const float* x, int64_t pitch,
                             const float* panel, int64_t row, int64_t rows, int64_t column) {
  if (rows >= M) {
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < NV; ++v) {
        __builtin_prefetch(p.y + (row + m) * p.y_m + column + v * kLanes, 1);
      }
    }
    vf acc[M][NV];
    multiply_tile<kAcross>(x, pitch, panel, run.length, acc);
    add_tile(p, run, row, column, acc);
  } else if constexpr (M > 1) {
    row_tile<kAcross, NV, M - 1>(p, run, x, pitch, panel, row, rows, column);
  }
}

// One group: `count` panels from column `column` on, over the runs [begin, end).
struct Group {
  int64_t column, count, begin, end;
};

template <int NV>
FASTENC_INLINE void copy_panels(const LinearProblem& p, Group group, int64_t run, float* panels) {
  constexpr int64_t kWidth = NV * kLanes;
  for (int64_t r = group.begin; r < group.end; ++r) {
    for (int64_t j = 0; j < group.count; ++j, panels += kWidth * run) {
      for (int v = 0; v < NV; ++v) {
        const int64_t column = group.column + j * kWidth + v * kLanes;
        copy_vector(p.w + column * p.w_n + r * run * p.w_k, p.w_n, p.w_k, lanes_of(p.n - column),
                    std::min(run, p.k - r * run), kWidth, panels + v * kLanes);
      }
    }
  }
}

// Rows [top, bottom) of a group. Where x lies across, x_copy takes them for one run.
template <bool kAcross, int NV, int M>
FASTENC_INLINE void multiply_rows(const LinearProblem& p, Group group, int64_t run, int64_t top,
                                  int64_t bottom, const float* panels, float* x_copy) {
  constexpr int64_t kWidth = NV * kLanes;
  for (int64_t r = group.begin; r < group.end; ++r) {
    const Run part{std::min(run, p.k - r * run), r == 0, (r + 1) * run >= p.k};
    const float* x = p.x + top * p.x_m + r * run * p.x_k;
    int64_t pitch = p.x_m;
    if constexpr (kAcross) {
      copy_across<M>(x, p.x_k, bottom - top, part.length, run, x_copy);
      x = x_copy;
      pitch = run;
    }
    for (int64_t j = 0; j < group.count; ++j, panels += kWidth * run) {
      for (int64_t row = top; row < bottom; row += M) {
        row_tile<kAcross ? M : 0, NV, M>(p, part, x + (row - top) * pitch, pitch, panels, row,
                                         bottom - row, group.column + j * kWidth);
      }
    }
  }
}

// Rows [row_begin, row_end) of the columns of panels [panel_begin, panel_end).
template <bool kWide>
void linear_panels(const LinearProblem& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                   int64_t panel_end) {
  using Tile = PanelTile<kWide>;
  constexpr int M = Tile::kRows, NV = Tile::kVectors;
  constexpr int64_t kWidth = Tile::kWidth, kRowsInL2 = Tile::kRowsInL2;
  const auto [run, runs] = runs_of(p.k);
  const int64_t depth = std::min(runs, kRunsInL2);
  const int64_t width = std::max<int64_t>(1, group_columns(depth * run) / kWidth);
  float *panels, *x_copy;
  carve_scratch(
      {{&panels, width * kWidth * depth * run}, {&x_copy, p.x_k == 1 ? 0 : kRowsInL2 * run}});
  for (int64_t first = panel_begin; first < panel_end; first += width) {
    for (int64_t begin = 0; begin < runs; begin += depth) {
      const Group group{first * kWidth, std::min(width, panel_end - first), begin,
                        std::min(runs, begin + depth)};
      copy_panels<NV>(p, group, run, panels);
      for (int64_t top = row_begin; top < row_end; top += kRowsInL2) {
        const int64_t bottom = std::min(row_end, top + kRowsInL2);
        if (p.x_k == 1) {
          multiply_rows<false, NV, M>(p, group, run, top, bottom, panels, x_copy);
        } else {
          multiply_rows<true, NV, M>(p, group, run, top, bottom, panels, x_copy);
        }
      }
    }
  }
}

// ---- gated --------------------------------------------------------------------------------------

// y = act(x w_a^T) * (x w_gate^T), where w is both halves: a block of both products stays in L2.
// Panels are of the columns of y; x of unit stride along k.
template <Activation kActivation, bool kWide>
void linear_geglu_panels(const LinearProblem& p, int64_t row_begin, int64_t row_end,
                         int64_t panel_begin, int64_t panel_end) {
  using Tile = PanelTile<kWide>;
  constexpr int M = Tile::kRows, NV = Tile::kVectors;
  constexpr int64_t kWidth = Tile::kWidth, kRowsInL2 = Tile::kRowsInL2;
  const int64_t inner = p.n / 2;
  const auto [run, runs] = runs_of(p.k);
  const int64_t width = std::max<int64_t>(1, group_columns(runs * run) / (2 * kWidth));
  float *panels[2], *block;
  carve_scratch({{&panels[0], width * kWidth * runs * run},
                 {&panels[1], width * kWidth * runs * run},
                 {&block, kRowsInL2 * 2 * width * kWidth}});
  for (int64_t first = panel_begin; first < panel_end; first += width) {
    const Group group{0, std::min(width, panel_end - first), 0, runs};
    const int64_t column = first * kWidth, columns = std::min(inner - column, group.count * kWidth);
    LinearProblem half[2];
    for (int64_t h = 0; h < 2; ++h) {
      half[h] = p;
      half[h].w = p.w + (h * inner + column) * p.w_n;
      half[h].bias = p.bias == nullptr ? nullptr : p.bias + h * inner + column;
      half[h].y = block + h * width * kWidth;
      half[h].y_m = 2 * width * kWidth;
      half[h].n = columns;
      copy_panels<NV>(half[h], group, run, panels[h]);
    }
    for (int64_t top = row_begin; top < row_end; top += kRowsInL2) {
      const int64_t rows = std::min(row_end - top, kRowsInL2);
      for (int64_t h = 0; h < 2; ++h) {
        half[h].x = p.x + top * p.x_m;
        multiply_rows<false, NV, M>(half[h], group, run, 0, rows, panels[h], nullptr);
      }
      for (int64_t i = 0; i < rows; ++i) {
        gate_row<kActivation>(half[0].y + i * half[0].y_m, half[1].y + i * half[1].y_m,
                              p.y + (top + i) * p.y_m + column, columns);
      }
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
