// One part of the backward pass: the keys of a task against every block of queries that sees them.
// Included once per ISA, inside the kernel part of a kernel file.
#if defined(FASTENC_ATTENTION_PART_BWD_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_ATTENTION_PART_BWD_TOGGLE
#undef FASTENC_ATTENTION_PART_BWD_TOGGLE
#else
#define FASTENC_ATTENTION_PART_BWD_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

// Without a narrow window, keys are packed and stepped over this many at a time.
constexpr int64_t kKeyChunk = 256;
constexpr int64_t kKeyStep = 128;

// C[m][d] += sum_q A[m][q] * B[q][d] over kQueries: the products whose vector axis is head_dim.
template <int LD, int kQueries>
FASTENC_INLINE void add_outer(int64_t m, int64_t head_dim, const float* a, const float* b,
                              float* c) {
  int64_t d = 0;
  for (; d + kLanes < head_dim; d += 2 * kLanes) {
    gemm<2, Into::kAdd>(m, kQueries, a, kQueries, 1, b + d, LD, c + d, LD);
  }
  if (d < head_dim) {
    gemm<1, Into::kAdd>(m, kQueries, a, kQueries, 1, b + d, LD, c + d, LD);
  }
}

template <int LD, int NV>
class BackwardPart {
 public:
  static constexpr int64_t kQueries = NV * kLanes;

  BackwardPart(const AttentionBackward& call, const BackwardTask& task)
      : call_(call),
        p_(*call.problem),
        task_(task),
        scope_(make_scope(*call.problem, task.seq, task.head)),
        narrow_(is_narrow(*call.problem, scope_.length)),
        one_key_(scope_.length == 1 || (scope_.left == 0 && scope_.right == 0)) {}

  void run(float* bias_partial) {
    const int64_t chunk = narrow_ ? round_up(task_.key_end - task_.key_begin, 4) : kKeyChunk;
    const int64_t dq_rows = task_.query_end - task_.query_begin;
    const bool keeps_dq = !narrow_ && task_.partial < 0;
    float* bias;
    carve_scratch({{&keys_, chunk * LD},
                   {&values_, chunk * LD},
                   {&dkeys_, chunk * LD},
                   {&dvalues_, chunk * LD},
                   {&query_rows_, kQueries * LD},
                   {&queries_, kQueries * LD},
                   {&grad_rows_, kQueries * LD},
                   {&grads_, kQueries * LD},
                   {&dqueries_, kQueries * LD},
                   {&dquery_rows_, kQueries * LD},
                   {&scores_, kSinglePass * kQueries},
                   {&dscores_, kSinglePass * kQueries},
                   {&rows_.lse, kQueries},
                   {&rows_.delta, kQueries},
                   {&rows_.dlse, kQueries},
                   {&scales_, kQueries},
                   {&bias, bias_size(p_, scope_)},
                   {&bias_grad_, bias_size(p_, scope_)},
                   {&bias_total_, bias_size(p_, scope_)},
                   {&dq_, keeps_dq ? dq_rows * LD : 0}});
    expand_bias(p_, &scope_, bias);
    std::fill_n(bias_grad_, bias_size(p_, scope_), 0.0f);
    std::fill_n(bias_total_, bias_size(p_, scope_), 0.0f);
    std::fill_n(scales_, kQueries, p_.scale);
    if (task_.partial >= 0) {
      dq_ = call_.partial_dq + task_.partial;
    }
    if (!narrow_) {
      std::fill_n(dq_, dq_rows * LD, 0.0f);
    }
    for (int64_t begin = task_.key_begin; begin < task_.key_end; begin += chunk) {
      differentiate_keys(begin, std::min(begin + chunk, task_.key_end));
    }
    if (keeps_dq) {
      unpack_rows<LD>(p_, call_.dq, true, scope_.start, scope_.head, 0, scope_.length, 1.0f, dq_);
    }
    if (bias_partial != nullptr) {
      collapse_bias(bias_partial);
    }
  }

 private:
  void differentiate_keys(int64_t begin, int64_t end) {
    const int64_t padded = round_up(end - begin, 4);
    pack_rows<LD>(p_, p_.k, true, scope_.start, scope_.head, begin, end, padded, 1.0f, keys_);
    pack_rows<LD>(p_, p_.v, false, scope_.start, scope_.head, begin, end, padded, 1.0f, values_);
    std::fill_n(dkeys_, padded * LD, 0.0f);
    std::fill_n(dvalues_, padded * LD, 0.0f);
    const int64_t first = round_down(std::max<int64_t>(0, begin - scope_.right), kQueryGrid);
    const int64_t last = round_up(end + scope_.left, kQueryGrid);
    for (int64_t query = first; query < std::min(last, scope_.length); query += kQueries) {
      differentiate_queries(query, begin, begin + padded);
    }
    // Scores lack their unit, and probabilities dropout's 1 / (1 - p).
    unpack_rows<LD>(p_, call_.dk, true, scope_.start, scope_.head, begin, end, scope_.unit, dkeys_);
    unpack_rows<LD>(p_, call_.dv, false, scope_.start, scope_.head, begin, end,
                    p_.dropout.keep_scale, dvalues_);
  }

  // One block of queries against the packed keys [pack_begin, pack_end).
  void differentiate_queries(int64_t query, int64_t pack_begin, int64_t pack_end) {
    pack_queries(query);
    const int64_t first = std::max<int64_t>(0, query - scope_.left);
    const int64_t last = std::min(scope_.length, query + kQueries + scope_.right);
    const bool all_keys = narrow_ && task_.completes(p_, query);
    const int64_t begin = std::max(pack_begin, round_down(first, 4));
    const int64_t end = std::min(pack_end, round_up(last, 4));
    const int64_t width = round_up(p_.head_dim, 4);
    if (begin >= end) {  // in the grid's rounding only
      std::fill_n(dqueries_, width * kQueries, 0.0f);
    }
    for (int64_t j = begin; j < end;) {
      const int64_t next = narrow_ ? end : std::min(j + kKeyStep, end);
      const int64_t rows = next - j;
      const int64_t at = (j - pack_begin) * LD;
      scores_of<LD, NV>(rows, p_.head_dim, keys_ + at, queries_, scores_);
      if (one_key_) {  // dP - delta is 0, and not left to two roundings of the same number
        std::fill_n(dscores_, rows * kQueries, 0.0f);
      } else {
        scores_of<LD, NV>(rows, p_.head_dim, values_ + at, grads_, dscores_);
      }
      differentiate_block<NV>(scope_, all_keys, query, j, next, rows_, scores_, dscores_,
                              bias_grad_);
      if (j == begin) {
        gemm<NV, Into::kOverwrite>(width, rows, keys_ + at, 1, LD, dscores_, kQueries, dqueries_,
                                   kQueries);
      } else {
        gemm<NV, Into::kAdd>(width, rows, keys_ + at, 1, LD, dscores_, kQueries, dqueries_,
                             kQueries);
      }
      add_outer<LD, kQueries>(rows, p_.head_dim, scores_, grad_rows_, dvalues_ + at);
      add_outer<LD, kQueries>(rows, p_.head_dim, dscores_, query_rows_, dkeys_ + at);
      j = next;
    }
    finish_dq(query, all_keys);
    if (scope_.bias != nullptr && begin < end) {
      add_bias(bias_index(scope_, query, end), bias_index(scope_, query + kQueries, begin));
    }
  }

  void pack_queries(int64_t query) {
    const int64_t end = std::min<int64_t>(query + kQueries, scope_.length);
    pack_rows<LD>(p_, p_.q, true, scope_.start, scope_.head, query, end, kQueries, query_scale(p_),
                  query_rows_);
    transpose_in<LD, NV>(query_rows_, p_.head_dim, queries_);
    pack_rows<LD>(p_, call_.grad_out, false, scope_.start, scope_.head, query, end, kQueries, 1.0f,
                  grad_rows_);
    transpose_in<LD, NV>(grad_rows_, p_.head_dim, grads_);
    const int64_t row = scope_.head * p_.total_tokens + scope_.start + query;
    for (int v = 0; v < NV; ++v) {
      const int64_t i = v * kLanes;
      const int n = query + i < end ? lanes_left(end, query + i) : 0;
      const vf lse = load_n(call_.lse + row + i, n);
      // P = 0 past the last query, whatever the bias, and where a query has no key: lse is -inf.
      const vf infinity = set(std::numeric_limits<float>::infinity());
      store(rows_.lse + i, select(first_n(n) & !(lse == -infinity), lse, infinity));
      store(rows_.delta + i, one_key_ ? zero() : load_n(call_.delta + row + i, n));
      store(rows_.dlse + i, call_.grad_lse ? load_n(call_.grad_lse + row + i, n) : zero());
    }
  }

  // With a narrow window, a part meets a block of queries once: its dq is final, or a partial sum.
  void finish_dq(int64_t query, bool all_keys) {
    transpose_out<LD, NV>(dqueries_, p_.head_dim, scales_, dquery_rows_);
    if (all_keys) {
      unpack_rows<LD>(p_, call_.dq, true, scope_.start, scope_.head, query,
                      std::min<int64_t>(query + kQueries, scope_.length), 1.0f, dquery_rows_);
      return;
    }
    float* to = dq_ + (query - task_.query_begin) * LD;
    for (int64_t i = 0; i < kQueries * LD; i += kLanes) {
      const vf x = load(dquery_rows_ + i);
      store(to + i, narrow_ ? x : load(to + i) + x);
    }
  }

  // Moves one block's sums to the total: long sums are sums of shorter ones.
  void add_bias(int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      bias_total_[t] += bias_grad_[t];
      bias_grad_[t] = 0.0f;
    }
  }

  void collapse_bias(float* partial) {
    const int64_t radius = p_.bias_radius;
    std::fill_n(partial, 2 * radius + 1, 0.0f);
    for (int64_t t = 0; t < bias_size(p_, scope_); ++t) {
      partial[bias_distance(scope_, t, radius) + radius] += bias_total_[t];
    }
  }

  const AttentionBackward& call_;
  const AttentionProblem& p_;
  const BackwardTask& task_;
  AttentionScope scope_;
  bool narrow_;
  bool one_key_;
  float *keys_, *values_, *dkeys_, *dvalues_, *query_rows_, *queries_, *grad_rows_, *grads_;
  float *dqueries_, *dquery_rows_, *scores_, *dscores_, *scales_;
  float *bias_grad_, *bias_total_, *dq_;
  RowStatistics rows_;
};

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
