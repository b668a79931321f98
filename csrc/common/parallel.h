// Work on torch's own thread pool, through the stable ABI.
//
//   parallel_for(n, grain, [&](int64_t begin, int64_t end) { ... });      even ranges of [0, n)
//   run_tasks(costs, [&](int64_t task) { ... });                          uneven tasks
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace fastenc::cpu {

inline int num_threads() {
  return std::max<int>(1, static_cast<int>(torch::stable::get_num_threads()));
}

// Threads of torch's pool must not throw: the first exception is carried to the caller.
class ExceptionCarrier {
 public:
  template <typename F>
  void run(const F& f) noexcept {
    try {
      f();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!first_) {
        first_ = std::current_exception();
      }
    }
  }
  void rethrow() const {
    if (first_) {
      std::rethrow_exception(first_);
    }
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

template <typename F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) {
    return;
  }
  ExceptionCarrier carrier;
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    carrier.run([&] { f(begin, end); });
  });
  carrier.rethrow();
}

// Runs task(i) for every i in [0, costs.size()), the costliest first; each thread takes the next
// one when it is free. What a task computes must depend on i alone, never on the thread.
template <typename F>
void run_tasks(const std::vector<int64_t>& costs, const F& task) {
  const int64_t n = static_cast<int64_t>(costs.size());
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(n, num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) {
      task(order[i]);
    }
  });
}

}  // namespace fastenc::cpu
