// What a matrix product is given, and how it is cut; included once.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastenc::cpu {

// y (m, n) = x (m, k) w (n, k)^T + bias (n): element (i, p) of x is x[i * x_m + p * x_k].
// One stride of x and one of w is 1, and so is that of y along its rows.
struct LinearProblem {
  const float* x;
  int64_t x_m, x_k;
  const float* w;
  int64_t w_n, w_k;
  const float* bias;  // or null
  float* y;
  int64_t y_m;
  int64_t m, n, k;
};

// Products of one run are added up in registers, the runs one after another: rounding errors grow
// with the square root of the longer of both. MKL's sgemm takes runs of 192 too.
constexpr int64_t kLongestRun = 192;
constexpr int64_t kRunMultiple = 16;

// Equal runs, as far as whole vectors allow; one of no products where there are none.
struct Runs {
  int64_t length, count;
};
constexpr Runs runs_of(int64_t k) {
  const int64_t least = std::max<int64_t>(1, (k + kLongestRun - 1) / kLongestRun);
  const int64_t share = std::max<int64_t>(1, (k + least - 1) / least);
  const int64_t length = (share + kRunMultiple - 1) / kRunMultiple * kRunMultiple;
  return {length, std::max<int64_t>(1, (k + length - 1) / length)};
}

// Up to so many rows or columns a product reads w as it lies, past it it pays to copy w to panels.
constexpr int64_t kFewRows = 48, kFewColumns = 24;

// A cut of (rows, panels) into equal tasks. Those of one column of the grid copy the same panels,
// which costs as much as kCopyRows rows of products.
struct Grid {
  int64_t rows, columns;
};

inline Grid cut(int64_t row_blocks, int64_t rows_per_block, int64_t panels, int64_t threads) {
  constexpr int64_t kCopyRows = 5;
  Grid best{1, 1};
  int64_t least = -1;
  for (int64_t columns = std::min(threads, panels); columns >= 1; --columns) {
    const int64_t rows = std::min(threads / columns, row_blocks);
    const int64_t cost = ((panels + columns - 1) / columns) *
                         ((row_blocks + rows - 1) / rows * rows_per_block + kCopyRows);
    if (least < 0 || cost < least) {
      least = cost;
      best = {rows, columns};
    }
  }
  return best;
}

}  // namespace fastenc::cpu
