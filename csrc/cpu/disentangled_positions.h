// The position terms of disentangled attention: q_i . PK[d] and k_j . PQ[d] with d = bucket(i - j).
//
// The tables are laid out by distance, one column each, so that both terms are plain products in
// which a row's distances are contiguous; rows shift against each other by one column, and nothing
// is gathered. Included once per ISA, inside the kernel part of a kernel file.
#if defined(FASTENC_DISENTANGLED_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_DISENTANGLED_TOGGLE
#undef FASTENC_DISENTANGLED_TOGGLE
#else
#define FASTENC_DISENTANGLED_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

// One table of one head as (head_dim, columns): column c holds the row of distance c - origin, or
// origin - c if `descending`.
template <typename T>
void pack_positions_of(const PositionTable& t, const DistanceIndex& index, int64_t head,
                       int64_t head_dim, bool descending, float scale, float* y) {
  for (int64_t c = 0; c < t.columns; c += kLanes) {
    const T* from[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t distance = descending ? t.origin - c - l : c + l - t.origin;
      from[l] = t.rows.at<T>(index.of(distance), head);
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

inline void pack_positions(const PositionTable& t, const DistanceIndex& index, int64_t head,
                           int64_t head_dim, bool descending, float scale, float* y) {
  const auto pack = t.rows.dtype == ScalarType::Float      ? pack_positions_of<float>
                    : t.rows.dtype == ScalarType::BFloat16 ? pack_positions_of<bf16>
                                                           : pack_positions_of<fp16>;
  pack(t, index, head, head_dim, descending, scale, y);
}

// The same table as (columns, LD): row c is what column c was.
template <int LD, typename T>
void pack_position_rows_of(const PositionTable& t, const DistanceIndex& index, int64_t head,
                           int64_t head_dim, bool descending, float scale, float* y) {
  const int64_t width = round_up(head_dim, kLanes);
  for (int64_t c = 0; c < t.columns; ++c, y += LD) {
    const int64_t distance = descending ? t.origin - c : c - t.origin;
    zero_row(y + (width - kLanes), kLanes);
    scale_row(t.rows.at<T>(index.of(distance), head), y, head_dim, scale);
  }
}

template <int LD>
void pack_position_rows(const PositionTable& t, const DistanceIndex& index, int64_t head,
                        int64_t head_dim, bool descending, float scale, float* y) {
  const auto pack = t.rows.dtype == ScalarType::Float      ? pack_position_rows_of<LD, float>
                    : t.rows.dtype == ScalarType::BFloat16 ? pack_position_rows_of<LD, bf16>
                                                           : pack_position_rows_of<LD, fp16>;
  pack(t, index, head, head_dim, descending, scale, y);
}

// For `rows` scratch rows from row index `first`, and others from index `other` on:
// y[r][(o - other) + (last - r)] = row_r . column(o - (first + r)), where `last` is the last row of
// r's group of kShear.
template <int LD>
__attribute__((noinline)) void position_products(const float* x, int64_t rows, int64_t head_dim,
                                                 const float* table, int64_t columns,
                                                 int64_t origin, int64_t first, int64_t other,
                                                 int64_t others, float* y) {
  for (int64_t r = 0; r < rows; r += kShear, x += kShear * LD, y += kShear * kShearStride) {
    const float* from = table + origin + other - (first + r + kShear - 1);
    const int64_t width = others + kShear - 1;
    int64_t c = 0;
    for (; c + kLanes < width; c += 2 * kLanes) {
      gemm<2, Into::kOverwrite>(kShear, head_dim, x, LD, 1, from + c, columns, y + c, kShearStride);
    }
    if (c < width) {
      gemm<1, Into::kOverwrite>(kShear, head_dim, x, LD, 1, from + c, columns, y + c, kShearStride);
    }
  }
}

// Where the element of row r and other o lies in what position_products() wrote.
constexpr int64_t sheared(int64_t r, int64_t o) {
  return r * kShearStride + o + (kShear - 1 - r % kShear);
}

// scores[key][query] = both terms, for kLanes queries from `query` of the chunk's c2p rows and all
// of the block's keys, whole vectors of them; null terms are absent.
template <int NV>
__attribute__((noinline)) void join_positions(const float* c2p, const float* p2c, int64_t query,
                                              int64_t keys, float* scores) {
  for (int64_t j = 0; j < keys; j += kLanes) {
    vf r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      r[l] = c2p ? load(c2p + sheared(query + l, j)) : zero();
    }
    transpose(r);
    for (int l = 0; l < kLanes; ++l) {
      const vf x = p2c ? r[l] + load(p2c + sheared(j + l, query)) : r[l];
      store(scores + (j + l) * NV * kLanes, x);
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
