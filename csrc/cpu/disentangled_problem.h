// What a disentangled attention call adds to a packed attention call: its position tables.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "attention_problem.h"

namespace fastenc::cpu {

// Queries and keys that are scored together; a multiple of every vector and of kShear.
constexpr int64_t kPositionBlock = 128;
// Rows of one position product. Each lies one column further than the next.
constexpr int64_t kShear = 16;
constexpr int64_t kShearStride = kPositionBlock + 2 * kShear;

constexpr int64_t disentangled_stride(int64_t head_dim) {
  return head_dim <= 64 ? round_up(head_dim, 32) : head_dim <= 128 ? 128 : kMaxHeadDim;
}

// Row of a position table by distance i - j; constant beyond the radius.
struct DistanceIndex {
  const int32_t* rows = nullptr;  // 2 * radius + 1
  int64_t radius = 0;

  int64_t of(int64_t distance) const {
    return rows[std::clamp(distance, -radius, radius) + radius];
  }
};

// One table (heads, size, head_dim); rows.at(row, head) as in Rows. Its layout has a column for
// every run of distances that share a row, in their order: far fewer columns than distances.
struct PositionTable {
  Rows rows;
  int64_t size = 0;
  int64_t columns = 0;             // of the layout, with padding
  std::vector<int32_t> row_of;     // (columns)
  std::vector<int32_t> column_of;  // by origin + other - row of a position product
  int64_t origin = 0;

  // At [o - r]: the column of row `row` + r of a position product and `other` + o.
  const int32_t* columns_of(int64_t row, int64_t other) const {
    return column_of.data() + origin + other - row;
  }
};

struct DisentangledProblem : OwnedProblem {
  DistanceIndex index;
  std::optional<PositionTable> key, query;  // c2p, p2c

  int64_t packed_floats() const {
    return std::max(key ? key->columns : 0, query ? query->columns : 0) * head_dim;
  }
};

inline std::optional<PositionTable> make_position_table(const char* name,
                                                        const std::optional<Tensor>& x,
                                                        bool descending, DisentangledProblem* p) {
  if (!x.has_value()) {
    return std::nullopt;
  }
  check_dim(name, *x, 3);
  check_size(name, *x, 0, p->heads);
  check_size(name, *x, 2, p->head_dim);
  check_dtype(name, *x, p->q.dtype);
  const Tensor rows = dense_rows(*x);
  p->tensors.push_back(rows);
  PositionTable t;
  t.rows = {rows.data_ptr(), rows.stride(1), rows.stride(0), rows.scalar_type()};
  t.size = rows.size(1);
  for (int64_t i = 0; i <= 2 * p->index.radius; ++i) {
    STD_TORCH_CHECK(p->index.rows[i] >= 0 && p->index.rows[i] < t.size,
                    "rel_index: ", p->index.rows[i], " at ", i, " is no row of ", name,
                    ", which has ", t.size);
  }
  // Blocks of queries and of keys reach past both ends of the sequence, by less than 64.
  t.origin = p->longest + 64;
  for (int64_t i = 0; i < 2 * t.origin + 32; ++i) {
    const int32_t row = p->index.of(descending ? t.origin - i : i - t.origin);
    if (t.row_of.empty() || t.row_of.back() != row) {
      t.row_of.push_back(row);
    }
    t.column_of.push_back(static_cast<int32_t>(t.row_of.size()) - 1);
  }
  // Products read whole tiles. The stride is an odd number of cache lines, so that the rows of a
  // panel do not share a set.
  t.columns = round_up(static_cast<int64_t>(t.row_of.size()) + 32, 32) + 16;
  t.row_of.resize(t.columns, t.row_of.back());
  return t;
}

inline DisentangledProblem make_disentangled_problem(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& pos_key,
    const std::optional<Tensor>& pos_query, const Tensor& rel_index, const Tensor& cu_seqlens,
    const AttentionOptions& options) {
  DisentangledProblem p;
  static_cast<OwnedProblem&>(p) = make_problem(q, k, v, cu_seqlens, options, std::nullopt);
  check_dtype("rel_index", rel_index, ScalarType::Int);
  check_dim("rel_index", rel_index, 1);
  STD_TORCH_CHECK(rel_index.size(0) % 2 == 1, "rel_index: expected 2 R + 1 distances, got ",
                  rel_index.size(0));
  p.tensors.push_back(dense(rel_index));
  p.index = {data<int32_t>(p.tensors.back()), rel_index.size(0) / 2};
  p.key = make_position_table("pos_key", pos_key, true, &p);
  p.query = make_position_table("pos_query", pos_query, false, &p);
  return p;
}

struct DisentangledBackward {
  const DisentangledProblem* problem;
  Rows grad_out, out, dq, dk, dv;
  const float* lse;
  float* dkey;  // (tasks, size, head_dim), or null
  float* dquery;
};

// One head of the sequences [begin, end).
struct HeadTask {
  int64_t head;
  int64_t begin;
  int64_t end;
};

// Both tables of every head, by distance; null where absent.
struct PackedPositions {
  std::unique_ptr<float[]> key, query;
  int64_t head_floats = 0;

  const float* key_of(int64_t head) const { return key ? key.get() + head * head_floats : nullptr; }
  const float* query_of(int64_t head) const {
    return query ? query.get() + head * head_floats : nullptr;
  }
};

}  // namespace fastenc::cpu
