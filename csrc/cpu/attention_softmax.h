// Softmax of a block of transposed scores: rows are keys, lanes are queries, so that maximum and
// sum are plain vector operations. Included once per ISA, inside the kernel part of a kernel file.
#if defined(FASTENC_ATTENTION_SOFTMAX_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_ATTENTION_SOFTMAX_TOGGLE
#undef FASTENC_ATTENTION_SOFTMAX_TOGGLE
#else
#define FASTENC_ATTENTION_SOFTMAX_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

constexpr float kLog2e = 1.44269502f;

// One (sequence, head), as the block functions need it. Keys and queries are indices within the
// sequence; a window side that is unlimited is at least the length.
struct AttentionScope {
  int64_t start;  // packed row of the first token
  int64_t length;
  int64_t head;
  int64_t left;
  int64_t right;
  float unit;         // what a score is multiplied by, over 0
  const float* bias;  // by bias_index(), or null
  const Dropout* dropout;
};

// The scale is best left to the softmax, as a rounded query costs accuracy; but a bias is in units
// of scaled scores, and the greatest score is sought before it is scaled.
inline float query_scale(const AttentionProblem& p) {
  return p.bias_table || !(p.scale > 0.0f) ? p.scale : 1.0f;
}
inline float score_unit(const AttentionProblem& p) {
  return p.bias_table || !(p.scale > 0.0f) ? 1.0f : p.scale;
}

inline AttentionScope make_scope(const AttentionProblem& p, int64_t seq, int64_t head) {
  const int64_t n = p.length(seq);
  return {p.cu_seqlens[seq], n, head, p.left(n), p.right(n), score_unit(p), nullptr, &p.dropout};
}

// Keys that a block of queries sees at most: rounding both ends to multiples of 4 adds up to 6.
inline int64_t most_keys(const AttentionScope& s, int64_t queries) {
  return std::min(s.length, s.left + s.right + queries + 6);
}

// The bias as one array in which the queries of one key lie side by side. Keys are padded to a
// multiple of 4, queries to a block.
constexpr int64_t kBiasMargin = 4;

inline int64_t bias_index(const AttentionScope& s, int64_t query, int64_t key) {
  return query - key + s.length + kBiasMargin;
}

inline int64_t bias_distance(const AttentionScope& s, int64_t index, int64_t radius) {
  return std::clamp(s.length + kBiasMargin - index, -radius, radius);
}

inline int64_t bias_size(const AttentionProblem& p, const AttentionScope& s) {
  return p.bias_table ? 2 * (s.length + kBiasMargin + kLanes) : 0;
}

inline void expand_bias(const AttentionProblem& p, AttentionScope* s, float* bias) {
  if (p.bias_table == nullptr) {
    return;
  }
  const int64_t radius = p.bias_radius;
  const float* table = p.bias_table + s->head * (2 * radius + 1) + radius;
  const int64_t size = bias_size(p, *s);
  for (int64_t t = 0; t < size; ++t) {
    bias[t] = table[bias_distance(*s, t, radius)];
  }
  s->bias = bias;
}

// Which rows of a score block [key_begin, key_end) a vector of queries from `query` sees: all lanes
// see rows [full_begin, full_end), some lanes see others. Both are clamped to the block.
struct RowSpan {
  int64_t full_begin;
  int64_t full_end;
};

FASTENC_INLINE RowSpan full_rows(const AttentionScope& s, int64_t query, int64_t key_begin,
                                 int64_t key_end) {
  const int64_t first = query + kLanes - 1 - s.left;
  const int64_t last = (query + s.right < s.length - 1 ? query + s.right : s.length - 1) + 1;
  RowSpan r;
  r.full_begin = first < key_begin ? key_begin : first > key_end ? key_end : first;
  r.full_end = last < r.full_begin ? r.full_begin : last > key_end ? key_end : last;
  return r;
}

// Lanes whose query sees key j.
struct QueryReach {
  vi first;
  vi last;

  FASTENC_INLINE QueryReach(const AttentionScope& s, int64_t query) {
    const vi i = set_int(static_cast<int32_t>(query)) + iota();
    first = i - set_int(static_cast<int32_t>(s.left));
    last = min(i + set_int(static_cast<int32_t>(s.right)),
               set_int(static_cast<int32_t>(s.length - 1)));
  }
  FASTENC_INLINE vm sees(int64_t key) const {
    const vi j = set_int(static_cast<int32_t>(key));
    return !((first > j) | (j > last));
  }
};

FASTENC_INLINE vf bias_at(const AttentionScope& s, int64_t query, int64_t key) {
  return load(s.bias + bias_index(s, query, key));
}

// Words of the four keys from `key` (a multiple of 4) for kLanes queries from `query`.
FASTENC_INLINE PhiloxWords dropout_words(const AttentionScope& s, int64_t query, int64_t key) {
  return philox(set_int(static_cast<int32_t>(key >> 2)),
                set_int(static_cast<int32_t>(s.start + query)) + iota(),
                set_int(static_cast<int32_t>(s.head)), set_int(0), s.dropout->seed);
}

FASTENC_INLINE vm kept(const AttentionScope& s, vi word) {
  return unsigned_ge(word, set_int(static_cast<int32_t>(s.dropout->threshold)));
}

// scores[key][query] = sum_d keys[key][d] * queries[d][query]. Long sums are sums of parts, for
// accuracy: of 32 products, of 16 where a product is rounded before it is added.
template <int LD, int NV>
FASTENC_INLINE void scores_of(int64_t rows, int64_t head_dim, const float* keys,
                              const float* queries, float* scores) {
  constexpr int64_t kPart = FASTENC_ISA_LEVEL == FASTENC_ISA_PORTABLE ? 16 : 32;
  constexpr int64_t n = NV * kLanes;
  gemm<NV, Into::kOverwrite>(rows, LD > kPart ? std::min(head_dim, kPart) : head_dim, keys, LD, 1,
                             queries, n, scores, n);
  if constexpr (LD > kPart) {
    for (int64_t d = kPart; d < head_dim; d += kPart) {
      gemm<NV, Into::kAdd>(rows, std::min(head_dim - d, kPart), keys + d, LD, 1, queries + d * n, n,
                           scores, n);
    }
  }
}

// Rows [begin, end) get the bias, and -inf where the window hides them; joins their maxima to top.
template <int NV, bool kBias>
FASTENC_INLINE vf mask_rows(const AttentionScope& s, const QueryReach& reach, int64_t query,
                            int64_t begin, int64_t end, float* row, vf top) {
  for (int64_t j = begin; j < end; ++j, row += NV * kLanes) {
    vf x = load(row);
    if constexpr (kBias) {
      x = x + bias_at(s, query, j);
    }
    x = select(reach.sees(j), x, set(-std::numeric_limits<float>::infinity()));
    store(row, x);
    top = max(top, x);
  }
  return top;
}

// Bias and window for one vector of queries and a block of keys; returns each lane's maximum.
template <int NV, bool kBias>
FASTENC_INLINE vf mask_and_max(const AttentionScope& s, int64_t query, int64_t key_begin,
                               int64_t key_end, float* scores) {
  constexpr int64_t ld = NV * kLanes;
  const RowSpan full = full_rows(s, query, key_begin, key_end);
  const QueryReach reach(s, query);
  vf top = mask_rows<NV, kBias>(s, reach, query, key_begin, full.full_begin, scores,
                                set(-std::numeric_limits<float>::infinity()));
  vf other = top;
  float* row = scores + (full.full_begin - key_begin) * ld;
  int64_t j = full.full_begin;
  for (; j + 2 <= full.full_end; j += 2, row += 2 * ld) {
    vf x = load(row);
    vf y = load(row + ld);
    if constexpr (kBias) {
      x = x + bias_at(s, query, j);
      y = y + bias_at(s, query, j + 1);
      store(row, x);
      store(row + ld, y);
    }
    top = max(top, x);
    other = max(other, y);
  }
  return mask_rows<NV, kBias>(s, reach, query, j, key_end, row, max(top, other));
}

// scores -> exp(unit * (scores - top)), dropped out; returns each lane's sum before dropout. The
// number of rows is a multiple of 4, as one Philox call serves four keys.
template <int NV, bool kDropout>
FASTENC_INLINE vf exponentiate(const AttentionScope& s, int64_t query, int64_t key_begin,
                               int64_t key_end, vf top, float* scores) {
  const vf factor = set(s.unit * kLog2e);
  vf sums[4] = {zero(), zero(), zero(), zero()};
  for (int64_t j = key_begin; j < key_end; j += 4, scores += 4 * NV * kLanes) {
    PhiloxWords words;
    if constexpr (kDropout) {
      words = dropout_words(s, query, j);
    }
    for (int u = 0; u < 4; ++u) {
      vf x = exp2_flush((load(scores + u * NV * kLanes) - top) * factor);
      sums[u] = sums[u] + x;
      if constexpr (kDropout) {
        x = zero_unless(kept(s, words.word[u]), x);
      }
      store(scores + u * NV * kLanes, x);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Running maximum and sum of NV * kLanes queries, and the factor for what was summed before.
struct SoftmaxState {
  float* top;
  float* sum;
  float* rescale;
};

// One step of the online softmax: scores of keys [key_begin, key_end) become probabilities
// relative to the new running maximum.
template <int NV, bool kBias, bool kDropout>
__attribute__((noinline)) void softmax_block_of(const AttentionScope& s, int64_t query,
                                                int64_t key_begin, int64_t key_end, bool first,
                                                float* scores, SoftmaxState state) {
  const vf minus_infinity = set(-std::numeric_limits<float>::infinity());
  for (int v = 0; v < NV; ++v) {
    float* column = scores + v * kLanes;
    const int64_t i = query + v * kLanes;
    const vf old_top = first ? minus_infinity : load(state.top + v * kLanes);
    const vf block_top = mask_and_max<NV, kBias>(s, i, key_begin, key_end, column);
    const vf top = max(old_top, block_top);
    const vf finite = zero_unless(!(top == minus_infinity), top);  // -inf: no key yet
    const vf sum = exponentiate<NV, kDropout>(s, i, key_begin, key_end, finite, column);
    const vf rescale = exp2_flush((old_top - finite) * set(s.unit * kLog2e));
    const vf old_sum = first ? zero() : load(state.sum + v * kLanes);
    store(state.top + v * kLanes, top);
    store(state.sum + v * kLanes, fma(old_sum, rescale, sum));
    store(state.rescale + v * kLanes, rescale);
  }
}

template <int NV>
FASTENC_INLINE void softmax_block(const AttentionScope& s, int64_t query, int64_t key_begin,
                                  int64_t key_end, bool first, float* scores, SoftmaxState state) {
  const bool dropout = s.dropout->active();
  const auto block =
      s.bias    ? dropout ? softmax_block_of<NV, true, true> : softmax_block_of<NV, true, false>
      : dropout ? softmax_block_of<NV, false, true>
                : softmax_block_of<NV, false, false>;
  block(s, query, key_begin, key_end, first, scores, state);
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
