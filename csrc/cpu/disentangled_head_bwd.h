// The backward pass of one head of some sequences; disentangled_attention_bwd.cpp has the formulas.
//
// Included once per ISA, inside the kernel part of a kernel file, after the headers it builds on.
#if defined(FASTENC_DISENTANGLED_BWD_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_DISENTANGLED_BWD_TOGGLE
#undef FASTENC_DISENTANGLED_BWD_TOGGLE
#else
#define FASTENC_DISENTANGLED_BWD_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

constexpr int64_t kQueries = 2 * kLanes;
constexpr int64_t kQueryPad = kQueries > kShear ? kQueries : kShear;

template <typename T>
void delta_of(const Rows& out, const Rows& grad, int64_t start, int64_t head, int64_t n,
              int64_t head_dim, float* delta) {
  for (int64_t i = 0; i < n; ++i) {
    const T* x = out.at<T>(start + i, head);
    const T* g = grad.at<T>(start + i, head);
    vf total = zero();
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int some = lanes_left(head_dim, d);
      total = fma(load_some(x + d, some), load_some(g + d, some), total);
    }
    delta[i] = sum(total);
  }
}

// Scores of kLanes queries become probabilities, dP becomes dS; both 0 where there is no token.
template <bool kDropout>
__attribute__((noinline)) void differentiate_scores(const AttentionScope& s, int64_t query,
                                                    int64_t key, int64_t keys, const float* lse,
                                                    const float* delta, float* scores,
                                                    float* grads) {
  const vf l = load(lse + query);
  const vf d = load(delta + query);
  const int64_t lanes = s.length - query;
  const vm here = first_n(static_cast<int>(lanes < 0 ? 0 : lanes < kLanes ? lanes : kLanes));
  for (int64_t j = 0; j < keys; j += 4) {
    PhiloxWords words;
    if constexpr (kDropout) {
      words = dropout_words(s, query, key + j);
    }
    for (int64_t u = j; u < j + 4; ++u) {
      float* at = scores + u * kQueries;
      float* grad = grads + u * kQueries;
      vf p = zero();
      vf ds = zero();
      if (key + u < s.length) {
        p = zero_unless(here, exp2_flush(fma(load(at), set(s.unit), -l) * set(kLog2e)));
        vf dp = load(grad);
        ds = p * (dp - d);
        if constexpr (kDropout) {
          const vm keep = kept(s, words.word[u - j]);
          dp = zero_unless(keep, dp * set(s.dropout->keep_scale));
          ds = p * (dp - d);
          p = zero_unless(keep, p);
        }
      }
      store(at, p);
      store(grad, zero_unless(here, ds));
    }
  }
}

// Products whose vector axis is head_dim: C[m][d] += sum_k A[m][k] B[k][d].
template <int LD>
FASTENC_INLINE void add_rows(int64_t m, int64_t k, int64_t head_dim, const float* a, int64_t a_m,
                             int64_t a_k, const float* b, float* c) {
  int64_t d = 0;
  for (; d + kLanes < head_dim; d += 2 * kLanes) {
    gemm<2, Into::kAdd>(m, k, a, a_m, a_k, b + d, LD, c + d, LD);
  }
  if (d < head_dim) {
    gemm<1, Into::kAdd>(m, k, a, a_m, a_k, b + d, LD, c + d, LD);
  }
}

// Where row r and other o of a chunk lie in kShear rows that shift against each other by one.
constexpr int64_t sheared(int64_t r, int64_t o) {
  return r * kShearStride + o + (kShear - 1 - r % kShear);
}

template <int LD>
class DisentangledHead {
 public:
  DisentangledHead(const DisentangledBackward& call, const HeadTask& task, int64_t index)
      : call_(call), p_(*call.problem), task_(task), index_(index) {}

  void run() {
    constexpr int64_t kRows = kPositionBlock * LD;
    const int64_t padded = p_.longest + 2 * kPositionBlock;
    const int64_t key_columns = p_.key ? p_.key->columns : 0;
    const int64_t query_columns = p_.query ? p_.query->columns : 0;
    carve_scratch({{&keys_, kRows},
                   {&values_, kRows},
                   {&dkeys_, kRows},
                   {&dvalues_, kRows},
                   {&query_rows_, kRows},
                   {&queries_, kRows},
                   {&grad_rows_, kRows},
                   {&grads_, kRows},
                   {&dq_, padded * LD},
                   {&lse_, padded},
                   {&delta_, padded},
                   {&scores_, kPositionBlock * kQueries},
                   {&dscores_, kPositionBlock * kPositionBlock},
                   {&sheared_, kShear * kShearStride},
                   {&gathered_, kShear * kShearStride},
                   {&c2p_, kPositionBlock * kShearStride},
                   {&p2c_, kPositionBlock * kShearStride},
                   {&key_table_, key_columns * LD},
                   {&key_rows_, key_columns * LD},
                   {&dkey_rows_, key_columns * LD},
                   {&query_table_, query_columns * LD},
                   {&position_rows_, query_columns * LD},
                   {&dquery_rows_, query_columns * LD}});
    if (p_.key) {
      prepare(*p_.key, 1.0f, key_table_, key_rows_, dkey_rows_);
    }
    if (p_.query) {
      prepare(*p_.query, query_scale(p_), query_table_, position_rows_, dquery_rows_);
    }
    for (int64_t seq = task_.begin; seq < task_.end; ++seq) {
      scope_ = make_scope(p_, seq, task_.head);
      scope_.length == 1 ? one_token() : sequence();
    }
    if (p_.key) {
      collapse(*p_.key, score_unit(p_), dkey_rows_, call_.dkey);
    }
    if (p_.query) {
      collapse(*p_.query, p_.scale, dquery_rows_, call_.dquery);
    }
  }

 private:
  // A table by distance in both layouts, and zeros for its gradient.
  void prepare(const PositionTable& t, float scale, float* table, float* rows, float* gradient) {
    pack_positions(t, task_.head, p_.head_dim, scale, table);
    std::fill_n(gradient, t.columns * LD, 0.0f);
    pack_position_rows<LD>(t, task_.head, p_.head_dim, scale, rows);
  }

  // Columns of one table row are summed, in order of their distance.
  void collapse(const PositionTable& t, float scale, const float* gradient, float* to) {
    to += index_ * t.size * p_.head_dim;
    std::fill_n(to, t.size * p_.head_dim, 0.0f);
    for (int64_t c = 0; c < t.columns; ++c) {
      float* row = to + t.row_of[c] * p_.head_dim;
      for (int64_t d = 0; d < p_.head_dim; ++d) {
        row[d] += scale * gradient[c * LD + d];
      }
    }
  }

  // P is 1, but for dropout, and dS is 0, whatever the rounding of lse and delta.
  void one_token() {
    const int64_t start = scope_.start, head = scope_.head;
    const Dropout& dropout = p_.dropout;
    const uint32_t word = ::fastenc::philox(
        {0, static_cast<uint32_t>(start), static_cast<uint32_t>(head), 0}, dropout.seed)[0];
    pack_rows<LD>(p_, call_.grad_out, false, start, head, 0, 1, 1,
                  word >= dropout.threshold ? dropout.keep_scale : 0.0f, grad_rows_);
    unpack_rows<LD>(p_, call_.dv, false, start, head, 0, 1, 1.0f, grad_rows_);
    std::fill_n(dq_, LD, 0.0f);
    unpack_rows<LD>(p_, call_.dq, false, start, head, 0, 1, 1.0f, dq_);
    unpack_rows<LD>(p_, call_.dk, false, start, head, 0, 1, 1.0f, dq_);
  }

  void sequence() {
    const int64_t n = scope_.length;
    const int64_t padded = n + 2 * kPositionBlock;
    const auto delta = call_.out.dtype == ScalarType::Float      ? delta_of<float>
                       : call_.out.dtype == ScalarType::BFloat16 ? delta_of<bf16>
                                                                 : delta_of<fp16>;
    delta(call_.out, call_.grad_out, scope_.start, scope_.head, n, p_.head_dim, delta_);
    const float* lse = call_.lse + scope_.head * p_.total_tokens + scope_.start;
    for (int64_t i = 0; i < padded; ++i) {
      lse_[i] = i < n ? lse[i] : 0.0f;
      delta_[i] = i < n ? delta_[i] : 0.0f;
    }
    std::fill_n(dq_, padded * LD, 0.0f);
    for (int64_t key = 0; key < n; key += kPositionBlock) {
      differentiate_keys(key, std::min(key + kPositionBlock, n));
    }
    unpack_rows<LD>(p_, call_.dq, false, scope_.start, scope_.head, 0, n, p_.scale, dq_);
  }

  void differentiate_keys(int64_t begin, int64_t end) {
    const int64_t start = scope_.start, head = scope_.head;
    pack_rows<LD>(p_, p_.k, false, start, head, begin, end, kPositionBlock, 1.0f, keys_);
    pack_rows<LD>(p_, p_.v, false, start, head, begin, end, kPositionBlock, 1.0f, values_);
    std::fill_n(dkeys_, kPositionBlock * LD, 0.0f);
    std::fill_n(dvalues_, kPositionBlock * LD, 0.0f);
    key_ = begin;
    rows_ = round_up(end - begin, kShear);
    for (int64_t query = 0; query < scope_.length; query += kPositionBlock) {
      differentiate_queries(query, std::min(query + kPositionBlock, scope_.length));
    }
    // Scores lack their unit, and probabilities dropout's 1 / (1 - p).
    unpack_rows<LD>(p_, call_.dk, false, start, head, begin, end, scope_.unit, dkeys_);
    unpack_rows<LD>(p_, call_.dv, false, start, head, begin, end, p_.dropout.keep_scale, dvalues_);
  }

  void differentiate_queries(int64_t begin, int64_t end) {
    const int64_t start = scope_.start, head = scope_.head, size = p_.head_dim;
    query_ = begin;
    columns_ = round_up(end - begin, kQueryPad);
    pack_rows<LD>(p_, p_.q, false, start, head, begin, end, kPositionBlock, query_scale(p_),
                  query_rows_);
    pack_rows<LD>(p_, call_.grad_out, false, start, head, begin, end, kPositionBlock, 1.0f,
                  grad_rows_);
    if (p_.key) {
      key_columns_ = p_.key->columns_of(begin, key_);
      position_products<LD>(query_rows_, columns_, size, key_table_, p_.key->columns, key_columns_,
                            rows_, c2p_);
    }
    if (p_.query) {
      query_columns_ = p_.query->columns_of(key_, begin);
      position_products<LD>(keys_, rows_, size, query_table_, p_.query->columns, query_columns_,
                            columns_, p2c_);
    }
    for (int64_t block = 0; block < columns_; block += kQueries) {
      differentiate_block(block);
    }
    for (int64_t i = 0; i < columns_; i += kShear) {
      shear_queries(i);
      add_query_terms(i);
    }
    for (int64_t j = 0; p_.query && j < rows_; j += kShear) {
      shear_keys(j);
      add_key_terms(j);
    }
  }

  // dS of kQueries queries from `block` of the chunk, as (rows_, kQueries).
  float* dscores_of(int64_t block) { return dscores_ + block * kPositionBlock; }

  void differentiate_block(int64_t block) {
    float* grads = dscores_of(block);
    const int64_t size = p_.head_dim;
    transpose_in<LD, 2>(query_rows_ + block * LD, size, queries_);
    transpose_in<LD, 2>(grad_rows_ + block * LD, size, grads_);
    for (int v = 0; v < 2; ++v) {
      join_positions<2>({p_.key ? c2p_ : nullptr, key_columns_},
                        {p_.query ? p2c_ : nullptr, query_columns_}, block + v * kLanes, rows_,
                        scores_ + v * kLanes);
    }
    constexpr int64_t kPart = 128;  // the sum in parts for accuracy
    for (int64_t d = 0; d < size; d += kPart) {
      gemm<2, Into::kAdd>(rows_, std::min(kPart, size - d), keys_ + d, LD, 1,
                          queries_ + d * kQueries, kQueries, scores_, kQueries);
    }
    scores_of<LD, 2>(rows_, size, values_, grads_, grads);
    const auto differentiate =
        p_.dropout.active() ? differentiate_scores<true> : differentiate_scores<false>;
    for (int v = 0; v < 2; ++v) {
      differentiate(scope_, query_ + block + v * kLanes, key_, rows_, lse_, delta_,
                    scores_ + v * kLanes, grads + v * kLanes);
    }
    add_rows<LD>(rows_, kQueries, size, scores_, kQueries, 1, grad_rows_ + block * LD, dvalues_);
    add_rows<LD>(rows_, kQueries, size, grads, kQueries, 1, query_rows_ + block * LD, dkeys_);
  }

  // kShear rows of dS by query, or by key; where sheared() says, zeros elsewhere.
  void shear_queries(int64_t i) {
    std::fill_n(sheared_, kShear * kShearStride, 0.0f);
    for (int64_t l = 0; l < kShear; l += kLanes) {
      const float* from = dscores_of((i + l) / kQueries * kQueries) + (i + l) % kQueries;
      for (int64_t j = 0; j < rows_; j += kLanes) {
        vf r[kLanes];
        for (int u = 0; u < kLanes; ++u) {
          r[u] = load(from + (j + u) * kQueries);
        }
        transpose(r);
        for (int u = 0; u < kLanes; ++u) {
          store(sheared_ + sheared(l + u, j), r[u]);
        }
      }
    }
  }

  void shear_keys(int64_t j) {
    std::fill_n(sheared_, kShear * kShearStride, 0.0f);
    for (int64_t block = 0; block < columns_; block += kQueries) {
      for (int64_t l = 0; l < kShear; ++l) {
        const float* from = dscores_of(block) + (j + l) * kQueries;
        float* to = sheared_ + sheared(l, block);
        for (int64_t u = 0; u < kQueries; u += kLanes) {
          store(to + u, load(from + u));
        }
      }
    }
  }

  void add_query_terms(int64_t i) {
    float* dq = dq_ + (query_ + i) * LD;
    add_rows<LD>(kShear, rows_, p_.head_dim, sheared_ + sheared(0, 0), kShearStride - 1, 1, keys_,
                 dq);
    if (p_.key) {
      add_position_terms(ColumnSpan(key_columns_, i, rows_), rows_, query_rows_ + i * LD, key_rows_,
                         dq, dkey_rows_);
    }
  }

  void add_key_terms(int64_t j) {
    add_position_terms(ColumnSpan(query_columns_, j, columns_), columns_, keys_ + j * LD,
                       position_rows_, dkeys_ + j * LD, dquery_rows_);
  }

  // Of kShear rows of dS in sheared_ and what they were made of: drow = dS table, dtable = dS^T
  // row.
  void add_position_terms(const ColumnSpan& span, int64_t others, const float* row,
                          const float* table, float* drow, float* dtable) {
    const int64_t width = round_up(span.count, 4);
    const float* terms = sheared_;
    int64_t pitch = 1, step = kShearStride;
    if (span.count < others + kShear - 1) {
      gather_columns(span, others, width);
      terms = gathered_;
      pitch = kShear;
      step = 1;
    }
    add_rows<LD>(kShear, width, p_.head_dim, terms, step, pitch, table + span.first * LD, drow);
    add_rows<LD>(width, kShear, p_.head_dim, terms, pitch, step, row, dtable + span.first * LD);
  }

  // gathered_ (width, kShear): the sums of sheared_ over the others that share a column.
  void gather_columns(const ColumnSpan& span, int64_t others, int64_t width) {
    std::fill_n(gathered_, width * kShear, 0.0f);
    for (int64_t l = 0; l < kShear; l += kLanes) {
      for (int64_t c = 0; c < others + kShear - 1; c += kLanes) {
        vf r[kLanes];
        for (int u = 0; u < kLanes; ++u) {
          r[u] = load(sheared_ + (l + u) * kShearStride + c);
        }
        transpose(r);
        for (int u = 0; u < kLanes; ++u) {  // zeros past the end
          float* to = gathered_ + (span.at[c + u] - span.first) * kShear + l;
          store(to, load(to) + r[u]);
        }
      }
    }
  }

  const DisentangledBackward& call_;
  const DisentangledProblem& p_;
  const HeadTask& task_;
  int64_t index_;
  AttentionScope scope_;
  int64_t key_, rows_, query_, columns_;
  const int32_t *key_columns_ = nullptr, *query_columns_ = nullptr;
  float *keys_, *values_, *dkeys_, *dvalues_, *query_rows_, *queries_, *grad_rows_, *grads_, *dq_;
  float *lse_, *delta_, *scores_, *dscores_, *sheared_, *gathered_, *c2p_, *p2c_;
  float *key_table_, *key_rows_, *dkey_rows_, *query_table_, *position_rows_, *dquery_rows_;
};

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
