// The position terms of disentangled attention: q_i . PK[d] and k_j . PQ[d] with d = bucket(i - j).
//
// The tables are laid out by distance, a column for every run of distances that share a row, so
// that both terms are plain products in which a row's distances lie in order: far from the
// diagonal, up to six share a column. Included once per ISA, inside the kernel part of a kernel
// file.
#if defined(FASTENC_DISENTANGLED_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_DISENTANGLED_TOGGLE
#undef FASTENC_DISENTANGLED_TOGGLE
#else
#define FASTENC_DISENTANGLED_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

// One table of one head as (head_dim, columns).
template <typename T>
void pack_positions_of(const PositionTable& t, int64_t head, int64_t head_dim, float scale,
                       float* y) {
  for (int64_t c = 0; c < t.columns; c += kLanes) {
    const T* from[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      from[l] = t.rows.at<T>(t.row_of[c + l], head);
    }
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int some = lanes_left(head_dim, d);
      vf r[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        r[l] = load_some(from[l] + d, some) * set(scale);
      }
      transpose(r);
      for (int l = 0; l < some; ++l) {
        store(y + (d + l) * t.columns + c, r[l]);
      }
    }
  }
}

inline void pack_positions(const PositionTable& t, int64_t head, int64_t head_dim, float scale,
                           float* y) {
  const auto pack = t.rows.dtype == ScalarType::Float      ? pack_positions_of<float>
                    : t.rows.dtype == ScalarType::BFloat16 ? pack_positions_of<bf16>
                                                           : pack_positions_of<fp16>;
  pack(t, head, head_dim, scale, y);
}

// The same table as (columns, LD): row c is what column c was.
template <int LD, typename T>
void pack_position_rows_of(const PositionTable& t, int64_t head, int64_t head_dim, float scale,
                           float* y) {
  const int64_t width = round_up(head_dim, kLanes);
  for (int64_t c = 0; c < t.columns; ++c, y += LD) {
    zero_row(y + (width - kLanes), kLanes);
    scale_row(t.rows.at<T>(t.row_of[c], head), y, head_dim, scale);
  }
}

template <int LD>
void pack_position_rows(const PositionTable& t, int64_t head, int64_t head_dim, float scale,
                        float* y) {
  const auto pack = t.rows.dtype == ScalarType::Float      ? pack_position_rows_of<LD, float>
                    : t.rows.dtype == ScalarType::BFloat16 ? pack_position_rows_of<LD, bf16>
                                                           : pack_position_rows_of<LD, fp16>;
  pack(t, head, head_dim, scale, y);
}

// The columns that a group of kShear rows from row `r` on shares with `others` columns, where
// columns[o - r] is that of row r and other o.
struct ColumnSpan {
  int32_t first;
  int64_t count;
  const int32_t* at;  // [o + (kShear - 1 - l)]: of the group's row l and other o

  FASTENC_INLINE ColumnSpan(const int32_t* columns, int64_t r, int64_t others)
      : at(columns - (r + kShear - 1)) {
    first = at[0];
    count = at[others + kShear - 2] - first + 1;
  }
};

// Tiles of all rows of a group read its columns once, which lie on no vector's boundary.
constexpr bool kOneVector = tile_rows(1) == kShear;

// For `rows` scratch rows: y[r][c - first] = row_r . column(c), where `first` is the first column
// of r's group of kShear.
template <int LD>
__attribute__((noinline)) void position_products(const float* x, int64_t rows, int64_t head_dim,
                                                 const float* table, int64_t stride,
                                                 const int32_t* columns, int64_t others, float* y) {
  for (int64_t r = 0; r < rows; r += kShear, x += kShear * LD, y += kShear * kShearStride) {
    const ColumnSpan span(columns, r, others);
    const float* from = table + span.first;
    int64_t c = 0;
    for (; !kOneVector && c + kLanes < span.count; c += 2 * kLanes) {
      gemm<2, Into::kOverwrite>(kShear, head_dim, x, LD, 1, from + c, stride, y + c, kShearStride);
    }
    for (; c < span.count; c += kLanes) {
      gemm<1, Into::kOverwrite>(kShear, head_dim, x, LD, 1, from + c, stride, y + c, kShearStride);
    }
  }
}

// kLanes others of one row of position products, from the one on whose column is columns[0].
FASTENC_INLINE vf spread(const float* products, const int32_t* columns, int32_t first) {
  const int32_t here = columns[0];
  return permute(load(products + here - first), load_int(columns) - set_int(here));
}

// What position_products() wrote, or null, and the columns that it was given.
struct PositionBlock {
  const float* products;
  const int32_t* columns;

  FASTENC_INLINE vf at(int64_t row, int64_t other) const {
    const int32_t first = columns[-(row / kShear * kShear + kShear - 1)];
    return spread(products + row * kShearStride, columns + other - row, first);
  }
};

// scores[key][query] = both terms, for kLanes queries from `query` of the chunk's c2p rows and all
// of the block's keys, whole vectors of them.
template <int NV>
__attribute__((noinline)) void join_positions(PositionBlock c2p, PositionBlock p2c, int64_t query,
                                              int64_t keys, float* scores) {
  for (int64_t j = 0; j < keys; j += kLanes) {
    vf r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      r[l] = c2p.products ? c2p.at(query + l, j) : zero();
    }
    transpose(r);
    for (int l = 0; l < kLanes; ++l) {
      const vf x = p2c.products ? r[l] + p2c.at(j + l, query) : r[l];
      store(scores + (j + l) * NV * kLanes, x);
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
