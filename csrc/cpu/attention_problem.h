// What a packed attention call is, independent of the instruction set: its tensors as pointers and
// strides, the checks that memory safety rests on, and its split into tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/checks.h"
#include "../common/parallel.h"
#include "../common/philox.h"
#include "../common/simd_types.h"
#include "scratch.h"

namespace fastenc::cpu {

constexpr int64_t kMaxHeadDim = 256;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t round_down(int64_t n, int64_t to) { return n / to * to; }

// Row stride of scratch: one of few compile-time constants, so that the products' addresses fold.
constexpr int64_t scratch_stride(int64_t head_dim) {
  return head_dim <= 128 ? round_up(head_dim, 32) : kMaxHeadDim;
}

// A query block that sees at most this many keys takes them in one step: a narrow window.
constexpr int64_t kSinglePass = 320;

// One matrix of head rows: element (token, head, d) is data[token * token_stride + head *
// head_stride + d], in elements of dtype.
struct Rows {
  void* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  ScalarType dtype = ScalarType::Float;

  template <typename T>
  T* at(int64_t token, int64_t head) const {
    return static_cast<T*>(data) + token * token_stride + head * head_stride;
  }
};

// fp32 rotation tables (positions, head_dim / 2); null for attention without RoPE.
struct Rotation {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t row_stride = 0;
};

struct AttentionProblem {
  int64_t total_tokens = 0;
  int64_t num_seqs = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  int64_t longest = 0;
  int64_t window_left = -1;
  int64_t window_right = -1;
  float scale = 1.0f;
  const int32_t* cu_seqlens = nullptr;
  Rows q, k, v;
  Rotation rotation;
  Dropout dropout;
  const float* bias_table = nullptr;  // (heads, 2 * bias_radius + 1) by distance j - i, or null
  int64_t bias_radius = 0;

  int64_t length(int64_t seq) const { return cu_seqlens[seq + 1] - cu_seqlens[seq]; }
  // The window of a sequence of n tokens: an unlimited side reaches n.
  int64_t left(int64_t n) const { return window_left < 0 ? n : std::min(window_left, n); }
  int64_t right(int64_t n) const { return window_right < 0 ? n : std::min(window_right, n); }
};

// A problem, and what must stay alive while it is worked on.
struct OwnedProblem : AttentionProblem {
  std::vector<Tensor> tensors;
  std::vector<float> cos_storage, sin_storage, bias_storage;
};

inline void check_size(const char* name, const Tensor& x, int64_t dim, int64_t expected) {
  STD_TORCH_CHECK(x.size(dim) == expected, name, ": expected size ", expected, " in dimension ",
                  dim, ", got ", x.size(dim));
}

inline void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  check_dim(name, x, static_cast<int64_t>(shape.size()));
  int64_t dim = 0;
  for (int64_t expected : shape) {
    check_size(name, x, dim++, expected);
  }
}

// Rows of x (total_tokens, ..., heads, head_dim) with a contiguous last dimension.
inline Rows rows_of(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(is_kernel_dtype(x.scalar_type()), name,
                  ": expected float32, bfloat16 or float16, got ", dtype_name(x.scalar_type()));
  return {x.data_ptr(), x.stride(0), x.stride(x.dim() - 2), x.scalar_type()};
}

inline Rows input_rows(const char* name, const Tensor& x, OwnedProblem* owner) {
  owner->tensors.push_back(dense_rows(x));
  return rows_of(name, owner->tensors.back());
}

inline Rows part_of(const Rows& rows, int64_t offset) {
  Rows part = rows;
  const int64_t size = rows.dtype == ScalarType::Float ? 4 : 2;
  part.data = static_cast<char*>(rows.data) + offset * size;
  return part;
}

// The first rows of a 2-D table as contiguous fp32: the tensor's own memory if it is that already.
inline const float* float_table(const char* name, const Tensor& x, int64_t rows,
                                std::vector<float>* storage) {
  const int64_t columns = x.size(1);
  const int64_t row_stride = x.stride(0);
  const int64_t column_stride = x.stride(1);
  if (x.scalar_type() == ScalarType::Float && x.is_contiguous()) {
    return data<float>(x);
  }
  storage->resize(rows * columns);
  dispatch_dtype(name, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        (*storage)[i * columns + j] = to_float(data<T>(x)[i * row_stride + j * column_stride]);
      }
    }
  });
  return storage->data();
}

inline void set_sequences(OwnedProblem* p, const Tensor& cu_seqlens, int64_t max_seqlen) {
  p->cu_seqlens = check_cu_seqlens(cu_seqlens, p->total_tokens);
  p->num_seqs = cu_seqlens.size(0) - 1;
  for (int64_t seq = 0; seq < p->num_seqs; ++seq) {
    p->longest = std::max(p->longest, p->length(seq));
  }
  STD_TORCH_CHECK(p->longest <= max_seqlen, "max_seqlen: expected at least ", p->longest,
                  ", the longest sequence, got ", max_seqlen);
  STD_TORCH_CHECK(p->longest < (int64_t{1} << 30), "cu_seqlens: a sequence of ", p->longest,
                  " tokens is too long");
}

// The arguments that every entry point ends with.
struct AttentionOptions {
  int64_t max_seqlen;
  int64_t window_left;
  int64_t window_right;
  double scale;
  double dropout_p;
  std::optional<Tensor> seed;
};

inline void set_options(OwnedProblem* p, const AttentionOptions& options) {
  STD_TORCH_CHECK(p->head_dim >= 1 && p->head_dim <= kMaxHeadDim, "head_dim: expected 1 to ",
                  kMaxHeadDim, ", got ", p->head_dim);
  p->window_left = options.window_left;
  p->window_right = options.window_right;
  p->scale = static_cast<float>(options.scale);
  STD_TORCH_CHECK(options.dropout_p >= 0.0 && options.dropout_p < 1.0,
                  "dropout_p: expected 0 <= p < 1, got ", options.dropout_p);
  if (options.dropout_p > 0.0) {
    STD_TORCH_CHECK(options.seed.has_value(), "seed: expected a tensor where dropout_p > 0");
    check_dtype("seed", *options.seed, ScalarType::Long);
    check_numel("seed", *options.seed, 1);
    p->dropout = Dropout(options.dropout_p, static_cast<uint64_t>(*data<int64_t>(*options.seed)));
  }
}

inline OwnedProblem make_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& cu_seqlens, const AttentionOptions& options,
                                 const std::optional<Tensor>& rel_bias) {
  OwnedProblem p;
  check_dim("q", q, 3);
  p.total_tokens = q.size(0);
  p.heads = q.size(1);
  p.head_dim = q.size(2);
  check_shape("k", k, {p.total_tokens, p.heads, p.head_dim});
  check_shape("v", v, {p.total_tokens, p.heads, p.head_dim});
  p.q = input_rows("q", q, &p);
  p.k = input_rows("k", k, &p);
  p.v = input_rows("v", v, &p);
  set_sequences(&p, cu_seqlens, options.max_seqlen);
  set_options(&p, options);
  if (rel_bias.has_value()) {
    check_dim("rel_bias", *rel_bias, 2);
    check_size("rel_bias", *rel_bias, 0, p.heads);
    STD_TORCH_CHECK(rel_bias->size(1) % 2 == 1, "rel_bias: expected 2 R + 1 distances, got ",
                    rel_bias->size(1));
    p.bias_radius = rel_bias->size(1) / 2;
    p.bias_table = float_table("rel_bias", *rel_bias, p.heads, &p.bias_storage);
  }
  return p;
}

inline OwnedProblem make_rope_problem(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                                      const Tensor& cu_seqlens, const AttentionOptions& options) {
  OwnedProblem p;
  check_dim("qkv", qkv, 4);
  check_size("qkv", qkv, 1, 3);
  p.total_tokens = qkv.size(0);
  p.heads = qkv.size(2);
  p.head_dim = qkv.size(3);
  STD_TORCH_CHECK(p.head_dim % 2 == 0, "qkv: expected an even head_dim, got ", p.head_dim);
  p.q = input_rows("qkv", qkv, &p);
  p.k = part_of(p.q, p.tensors.back().stride(1));
  p.v = part_of(p.q, 2 * p.tensors.back().stride(1));
  set_sequences(&p, cu_seqlens, options.max_seqlen);
  set_options(&p, options);
  const int64_t half = p.head_dim / 2;
  for (const auto& [name, table] : {std::pair{"cos", &cos}, std::pair{"sin", &sin}}) {
    check_dim(name, *table, 2);
    check_size(name, *table, 1, half);
    STD_TORCH_CHECK(table->size(0) >= p.longest, name, ": expected at least ", p.longest,
                    " rows, the longest sequence, got ", table->size(0));
  }
  p.rotation = {float_table("cos", cos, p.longest, &p.cos_storage),
                float_table("sin", sin, p.longest, &p.sin_storage), half};
  return p;
}

struct AttentionForward {
  const AttentionProblem* problem;
  Rows out;
  float* lse;  // (heads, total_tokens), or null
};

// A chunk of queries (forward) or keys (backward) of one sequence and head.
struct AttentionTask {
  int32_t seq;
  int32_t head;
  int32_t begin;
  int32_t end;
};

// Splits every (sequence, head) into chunks of at most `chunk` tokens, halved until there are
// four tasks a thread, but not under 128 tokens.
inline std::vector<AttentionTask> make_tasks(const AttentionProblem& p, int64_t chunk) {
  constexpr int64_t kMinChunk = 128;
  const auto count = [&](int64_t size) {
    int64_t n = 0;
    for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
      n += (p.length(seq) + size - 1) / size * p.heads;
    }
    return n;
  };
  while (chunk / 2 >= kMinChunk && count(chunk) < 4 * num_threads()) {
    chunk /= 2;
  }
  std::vector<AttentionTask> tasks;
  tasks.reserve(count(chunk));
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    // All heads of a chunk in turn: they share its pages.
    for (int64_t begin = 0; begin < p.length(seq); begin += chunk) {
      for (int64_t head = 0; head < p.heads; ++head) {
        tasks.push_back({static_cast<int32_t>(seq), static_cast<int32_t>(head),
                         static_cast<int32_t>(begin),
                         static_cast<int32_t>(std::min(begin + chunk, p.length(seq)))});
      }
    }
  }
  return tasks;
}

// Tokens times the window they see: what the order of the tasks is decided by.
inline std::vector<int64_t> costs_of(const AttentionProblem& p,
                                     const std::vector<AttentionTask>& tasks) {
  std::vector<int64_t> costs;
  costs.reserve(tasks.size());
  for (const AttentionTask& task : tasks) {
    const int64_t n = p.length(task.seq);
    costs.push_back((task.end - task.begin) * std::min(n, p.left(n) + p.right(n) + 1));
  }
  return costs;
}

}  // namespace fastenc::cpu
