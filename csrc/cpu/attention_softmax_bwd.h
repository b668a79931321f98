// Derivative of softmax on a block of transposed scores: rows are keys, lanes are queries.
//
// P comes from the saved log-sum-exp. Where a step holds all keys of its queries, P and delta are
// then corrected to what they are by definition, sum(P) = 1 and delta = sum(P * dP): this takes out
// the rounding of lse and of out . dout, which would otherwise be most of the error of short rows.
#if defined(FASTENC_ATTENTION_SOFTMAX_BWD_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_ATTENTION_SOFTMAX_BWD_TOGGLE
#undef FASTENC_ATTENTION_SOFTMAX_BWD_TOGGLE
#else
#define FASTENC_ATTENTION_SOFTMAX_BWD_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

// Of NV * kLanes queries.
struct RowStatistics {
  float* lse;
  float* delta;  // out . dout
  float* dlse;
};

struct LaneStatistics {
  vf lse, delta, dlse;

  FASTENC_INLINE LaneStatistics(const RowStatistics& rows, int64_t at)
      : lse(load(rows.lse + at)), delta(load(rows.delta + at)), dlse(load(rows.dlse + at)) {}
};

// One row: p is the probability, g is dP - delta.
struct RowGradient {
  vf p;
  vf g;
};

template <bool kBias, bool kDropout>
FASTENC_INLINE RowGradient row_gradient(const AttentionScope& s, const LaneStatistics& stats,
                                        int64_t query, int64_t key, vm keep, vf score, vf dp) {
  if constexpr (kBias) {
    score = score + bias_at(s, query, key);
  }
  if constexpr (kDropout) {
    dp = zero_unless(keep, dp * set(s.dropout->keep_scale));
  }
  return {exp2_flush(fma(score, set(s.unit), -stats.lse) * set(kLog2e)), dp - stats.delta};
}

FASTENC_INLINE void add_bias_grad(const AttentionScope& s, int64_t query, int64_t key, vf ds,
                                  float* bias_grad) {
  float* to = bias_grad + bias_index(s, query, key);
  store(to, load(to) + ds);
}

// scores -> P, dropped out; dscores: dP -> dS. Some keys of the queries may lie outside the step.
template <int NV, bool kBias, bool kDropout>
FASTENC_INLINE void differentiate_some_keys(const AttentionScope& s, int64_t query,
                                            int64_t key_begin, int64_t key_end,
                                            const LaneStatistics& stats, float* scores,
                                            float* dscores, float* bias_grad) {
  const RowSpan full = full_rows(s, query, key_begin, key_end);
  const QueryReach reach(s, query);
  for (int64_t j = key_begin; j < key_end; j += 4) {
    const bool masked = j < full.full_begin || j + 4 > full.full_end;
    PhiloxWords words;
    if constexpr (kDropout) {
      words = dropout_words(s, query, j);
    }
    for (int u = 0; u < 4; ++u, scores += NV * kLanes, dscores += NV * kLanes) {
      const vm keep = kDropout ? kept(s, words.word[u]) : first_n(kLanes);
      RowGradient row =
          row_gradient<kBias, kDropout>(s, stats, query, j + u, keep, load(scores), load(dscores));
      if (masked) {
        row.p = zero_unless(reach.sees(j + u), row.p);
      }
      const vf ds = row.p * (row.g + stats.dlse);
      store(scores, kDropout ? zero_unless(keep, row.p) : row.p);
      store(dscores, ds);
      if constexpr (kBias) {
        add_bias_grad(s, query, j + u, ds, bias_grad);
      }
    }
  }
}

// The same where the step holds every key of the queries.
template <int NV, bool kBias, bool kDropout>
FASTENC_INLINE void differentiate_all_keys(const AttentionScope& s, int64_t query,
                                           int64_t key_begin, int64_t key_end,
                                           const LaneStatistics& stats, float* scores,
                                           float* dscores, float* bias_grad) {
  const RowSpan full = full_rows(s, query, key_begin, key_end);
  const QueryReach reach(s, query);
  vf total[2] = {zero(), zero()};
  vf shift[2] = {zero(), zero()};
  float* score = scores;
  float* dscore = dscores;
  for (int64_t j = key_begin; j < key_end; j += 4) {
    const bool masked = j < full.full_begin || j + 4 > full.full_end;
    PhiloxWords words;
    if constexpr (kDropout) {
      words = dropout_words(s, query, j);
    }
    for (int u = 0; u < 4; ++u, score += NV * kLanes, dscore += NV * kLanes) {
      const vm keep = kDropout ? kept(s, words.word[u]) : first_n(kLanes);
      RowGradient row =
          row_gradient<kBias, kDropout>(s, stats, query, j + u, keep, load(score), load(dscore));
      if (masked) {
        row.p = zero_unless(reach.sees(j + u), row.p);
      }
      total[u % 2] = total[u % 2] + row.p;
      shift[u % 2] = fma(row.p, row.g, shift[u % 2]);
      store(score, kDropout ? select(keep, row.p, -row.p) : row.p);  // the sign carries the mask
      store(dscore, row.g);
    }
  }
  const vf sum = total[0] + total[1];
  const vf inverse = zero_unless(!(sum == zero()), set(1.0f) / sum);
  const vf correction = fnma(shift[0] + shift[1], inverse, stats.dlse);
  for (int64_t j = key_begin; j < key_end; ++j, scores += NV * kLanes, dscores += NV * kLanes) {
    const vf signed_p = load(scores) * inverse;
    const vf ds = (kDropout ? abs(signed_p) : signed_p) * (load(dscores) + correction);
    store(scores, kDropout ? max(zero(), signed_p) : signed_p);
    store(dscores, ds);
    if constexpr (kBias) {
      add_bias_grad(s, query, j, ds, bias_grad);
    }
  }
}

template <int NV, bool kBias, bool kDropout>
__attribute__((noinline)) void differentiate_block_of(const AttentionScope& s, bool all_keys,
                                                      int64_t query, int64_t key_begin,
                                                      int64_t key_end, const RowStatistics& rows,
                                                      float* scores, float* dscores,
                                                      float* bias_grad) {
  for (int v = 0; v < NV; ++v) {
    const int64_t at = v * kLanes;
    const LaneStatistics stats(rows, at);
    if (all_keys) {
      differentiate_all_keys<NV, kBias, kDropout>(s, query + at, key_begin, key_end, stats,
                                                  scores + at, dscores + at, bias_grad);
    } else {
      differentiate_some_keys<NV, kBias, kDropout>(s, query + at, key_begin, key_end, stats,
                                                   scores + at, dscores + at, bias_grad);
    }
  }
}

template <int NV>
FASTENC_INLINE void differentiate_block(const AttentionScope& s, bool all_keys, int64_t query,
                                        int64_t key_begin, int64_t key_end,
                                        const RowStatistics& rows, float* scores, float* dscores,
                                        float* bias_grad) {
  const bool dropout = s.dropout->active();
  const auto block = s.bias    ? dropout ? differentiate_block_of<NV, true, true>
                                         : differentiate_block_of<NV, true, false>
                     : dropout ? differentiate_block_of<NV, false, true>
                               : differentiate_block_of<NV, false, false>;
  block(s, all_keys, query, key_begin, key_end, rows, scores, dscores, bias_grad);
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
