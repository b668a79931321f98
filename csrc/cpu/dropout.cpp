// y = x keep / (1 - p) on the CPU; its gradient is the same op of the gradient, with the same seed.
//
// Floor: one read and one write of x. torch draws a Bernoulli number an element from one serial
// generator and keeps the mask: 5 ns an element whatever the threads. Here the mask is Philox of
// the element's index, made in registers, kept nowhere.
//
// Element i: lane l = i & 15 and word w = i >> 4 & 3 of block b = i >> 6; counter (16 b + l, its
// high half, 0, 3). Sixteen lanes whatever the vector, so that every instruction set drops the
// same.
#include <algorithm>
#include <cstdint>
#include <optional>

#include <torch/csrc/stable/library.h>

#include "../common/checks.h"
#include "../common/launch_counts.h"
#include "../common/parallel.h"
#include "../common/philox.h"

#define FASTENC_KERNEL_FILE "../cpu/dropout.cpp"
#include "../common/foreach_isa.h"

#ifdef FASTENC_ISA
#include "../common/philox.h"

namespace fastenc::cpu::FASTENC_ISA {

// Blocks [begin, end) of 64 elements each.
template <typename T>
void dropout_blocks(const T* x, T* y, int64_t n, const Dropout& dropout, int64_t begin,
                    int64_t end) {
  const vi threshold = set_int(static_cast<int32_t>(dropout.threshold));
  const vf scale = set(dropout.keep_scale);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t lane = 0; lane < 16; lane += kLanes) {
      const int64_t counter = 16 * block + lane;
      const PhiloxWords words = philox(set_int(static_cast<int32_t>(counter)) + iota(),
                                       set_int(static_cast<int32_t>(counter >> 32)), set_int(0),
                                       set_int(3), dropout.seed);
      for (int64_t word = 0; word < 4; ++word) {
        const int64_t at = 64 * block + 16 * word + lane;
        const vf keep = zero_unless(unsigned_ge(words.word[word], threshold), scale);
        if (at + kLanes <= n) {
          store(y + at, load(x + at) * keep);
        } else if (at < n) {
          const int lanes = static_cast<int>(n - at);
          store_n(y + at, load_n(x + at, lanes) * keep, lanes);
        }
      }
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA
#else

namespace fastenc::cpu {
namespace {

constexpr int64_t kBlock = 64, kGrainBlocks = 128;

Tensor dropped(const Tensor& x_in, double p, const Tensor& seed) {
  const Tensor x = dense(x_in);
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "p: expected 0 <= p < 1, got ", p);
  check_dtype("seed", seed, ScalarType::Long);
  check_numel("seed", seed, 1);
  const Dropout dropout(p, static_cast<uint64_t>(*data<int64_t>(seed)));
  Tensor y = torch::stable::empty_like(x);
  dispatch_dtype("x", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = FASTENC_FOR_ACTIVE_ISA(dropout_blocks<T>);
    parallel_for((x.numel() + kBlock - 1) / kBlock, kGrainBlocks, [&](int64_t begin, int64_t end) {
      kernel(data<T>(x), mutable_data<T>(y), x.numel(), dropout, begin, end);
    });
  });
  return y;
}

Tensor dropout_fwd(const Tensor& x, double p, const Tensor& seed) {
  FASTENC_COUNT_LAUNCH("dropout");
  return dropped(x, p, seed);
}

Tensor dropout_bwd(const Tensor& grad, double p, const Tensor& seed) {
  FASTENC_COUNT_LAUNCH("dropout_bwd");
  return dropped(grad, p, seed);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastenc_cpu, CPU, m) {
  m.impl("dropout_fwd", TORCH_BOX(&dropout_fwd));
  m.impl("dropout_bwd", TORCH_BOX(&dropout_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastenc, CPU, m) {
  m.impl("dropout_fwd", TORCH_BOX(&dropout_fwd));
  m.impl("dropout_bwd", TORCH_BOX(&dropout_bwd));
}

}  // namespace fastenc::cpu
#endif
