// How often each kernel was launched, for fastenc.record(): what really ran, not what was asked.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastenc {

// One static object in each kernel's entry point; they form a list that the host module reads.
class LaunchCounter {
 public:
  explicit LaunchCounter(const char* op) : op_(op), next_(head().load()) {
    while (!head().compare_exchange_weak(next_, this)) {
    }
  }
  void add() { count_.fetch_add(1, std::memory_order_relaxed); }
  const char* op() const { return op_; }
  int64_t count() const { return count_.load(std::memory_order_relaxed); }
  const LaunchCounter* next() const { return next_; }

  static std::atomic<LaunchCounter*>& head() {
    static std::atomic<LaunchCounter*> first{nullptr};
    return first;
  }

 private:
  const char* op_;
  LaunchCounter* next_;
  std::atomic<int64_t> count_{0};
};

}  // namespace fastenc

#define FASTENC_COUNT_LAUNCH(op)                 \
  do {                                           \
    static ::fastenc::LaunchCounter counter{op}; \
    counter.add();                               \
  } while (false)
