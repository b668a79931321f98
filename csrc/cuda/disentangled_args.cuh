// What the kernels of disentangled attention are called with.
#pragma once

#include "../common/disentangled_tiles.h"
#include "attention_args.cuh"

namespace fastenc::cuda {

struct PositionArgs {
  HeadRows key, query;   // rows of a head's table, `token_stride` apart; data nullptr: absent
  const int32_t* index;  // (2 * radius + 1,): the table row of a distance, constant beyond
  int32_t radius, size;  // size: rows of a table
};

struct DisentangledArgs {
  AttentionArgs attention;  // without window, bias and RoPE
  PositionArgs positions;
};

struct DisentangledGradArgs {
  AttentionGradArgs grads;
  PositionArgs positions;
  // (splits, heads, rows.count(), padded head_dim): sums by distance, zeroed; absent as the table.
  float *key_partials, *query_partials;
  DistanceRows rows;
  int32_t splits;  // a block takes every `splits`-th tile
  int32_t slots;
};

}  // namespace fastenc::cuda
