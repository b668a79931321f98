// CUDA device code on the CPU: every thread of a block is a fiber, warp-wide instructions are
// meeting points, so that the sources of the kernels themselves run, are compared with the
// reference and cannot hide a wrong fragment layout, index or missing wait.
//
//   - shared memory starts as NaN bytes, and cp.async copies only at the wait that promises it;
//   - a warp runs as far as it can before the next one starts, in an order that the test chooses:
//     a missing __syncthreads() reads what is not there yet, or what is gone already;
//   - an instruction that not all lanes reach is a deadlock, reported as one.
//
// mma and ldmatrix follow the layouts of the PTX ISA (9.7.14: Matrix Fragments), written here
// independently of the kernels.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "csrc/common/simd_types.h"
#include "static_shared.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct int2 {
  int32_t x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10;

struct Copy {
  void* to;
  const void* from;
  int bytes, size;
};

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  int index = 0;
  State state = State::kDone;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  std::vector<std::pair<unsigned char*, int>> unfenced;  // bytes of shared memory it wrote
};

struct Warp {
  int arrived = 0;
  uint64_t generation = 0;
  alignas(16) unsigned char slots[2][kLanes][128];
};

struct Machine {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::vector<unsigned char> proxied;  // shared memory as the async proxy (TMA, wgmma) sees it
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  int threads = 0, at_block = 0, live = 0;
  int64_t conflicts = 0;  // ldmatrix phases that need more than one pass over the banks
  dim3 block, block_dim, grid_dim;
};

inline Machine& machine() {
  static Machine only;
  return only;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

inline bool in_shared(const void* p) {
  const Machine& m = machine();
  const Bytes statics = static_shared();
  return (p >= m.shared && p < m.memory.data() + m.memory.size()) ||
         (p >= statics.first && p < statics.first + statics.count);
}

template <typename T>
void store_shared(T* p, const T& x) {
  if (!in_shared(p)) {
    fail("st.shared with an address outside of shared memory");
  }
  *p = x;
  machine().current->unfenced.emplace_back(reinterpret_cast<unsigned char*>(p), sizeof(T));
}

inline void leave() {
  Machine& m = machine();
  swapcontext(&m.current->context, &m.scheduler);
}

inline Warp& warp() { return machine().warps[machine().current->index / kLanes]; }
inline int lane() { return machine().current->index % kLanes; }

inline void meet_warp() {
  Machine& m = machine();
  Warp& w = warp();
  const int first = m.current->index / kLanes * kLanes;
  const int lanes = std::min(kLanes, m.threads - first);
  if (++w.arrived < lanes) {
    m.current->state = State::kAtWarp;
    leave();
    return;
  }
  w.arrived = 0;
  ++w.generation;
  for (int i = first; i < first + lanes; ++i) {
    m.fibers[i]->state = State::kReady;
  }
}

inline void meet_block() {
  Machine& m = machine();
  if (++m.at_block < m.threads) {
    m.current->state = State::kAtBlock;
    leave();
    return;
  }
  m.at_block = 0;
  for (int i = 0; i < m.threads; ++i) {
    m.fibers[i]->state = State::kReady;
  }
}

// Every lane's value, once all have brought theirs. Two sets of slots: the lanes cannot be further
// apart than one meeting.
template <typename T>
struct Exchange {
  const unsigned char (*slots)[128];
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof(T));
    return value;
  }
};

template <typename T>
Exchange<T> exchange(const T& mine) {
  static_assert(sizeof(T) <= 128);
  Warp& w = warp();
  auto* slots = w.slots[w.generation & 1];
  std::memcpy(slots[lane()], &mine, sizeof(T));
  meet_warp();
  return {slots};
}

inline void entry() {
  Machine& m = machine();
  (*m.body)();
  m.current->state = State::kDone;
  --m.live;
  leave();
}

inline void run_block(const std::function<void()>& body, bool backwards) {
  Machine& m = machine();
  m.body = &body;
  m.live = m.threads;
  m.at_block = 0;
  const size_t bytes = m.memory.data() + m.memory.size() - m.shared;
  std::memset(m.shared, 0xff, bytes);
  std::memset(static_shared().first, 0xff, static_shared().count);
  m.proxied.assign(bytes, 0xff);
  for (int i = 0; i < m.threads; ++i) {
    Fiber& f = *m.fibers[i];
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, kStack};
    f.context.uc_link = nullptr;
    f.state = State::kReady;
    f.index = i;
    f.open.clear();
    f.groups.clear();
    f.unfenced.clear();
    makecontext(&f.context, entry, 0);
  }
  for (Warp& w : m.warps) {
    w.arrived = 0;
  }
  const int warps = static_cast<int>(m.warps.size());
  while (m.live > 0) {
    bool progress = false;
    for (int w = 0; w < warps; ++w) {
      const int first = (backwards ? warps - 1 - w : w) * kLanes;
      const int lanes = std::min(kLanes, m.threads - first);
      for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < lanes; ++i) {
          Fiber& f = *m.fibers[first + (backwards ? lanes - 1 - i : i)];
          if (f.state == State::kReady) {
            m.current = &f;
            swapcontext(&m.scheduler, &f.context);
            moved = progress = true;
          }
        }
      }
    }
    if (!progress) {
      fail("deadlock: a barrier or a warp-wide instruction that some threads never reach");
    }
  }
}

// kernel<<<grid, threads, shared_bytes>>>(): blocks one after the other, the last one first where
// `backwards` says so.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
                   bool backwards = false) {
  Machine& m = machine();
  m.threads = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(m.fibers.size()) < m.threads) {
    m.fibers.push_back(std::make_unique<Fiber>());
  }
  m.warps.assign((m.threads + kLanes - 1) / kLanes, {});
  m.memory.assign(shared_bytes + 1024, 0);
  m.shared = m.memory.data();
  m.shared += (1024 - reinterpret_cast<uintptr_t>(m.shared) % 1024) % 1024;
  m.memory.resize(m.shared - m.memory.data() + shared_bytes);
  m.grid_dim = grid;
  m.block_dim = block;
  const uint32_t blocks = grid.x * grid.y * grid.z;
  for (uint32_t i = 0; i < blocks; ++i) {
    const uint32_t block = backwards ? blocks - 1 - i : i;
    m.block = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    run_block(kernel, backwards);
  }
}

inline dim3 thread_index() {
  const Machine& m = machine();
  const uint32_t i = m.current->index;
  return {i % m.block_dim.x, i / m.block_dim.x % m.block_dim.y, i / m.block_dim.x / m.block_dim.y};
}

// ---- instructions -------------------------------------------------------------------------------

// mma.sync.aligned.m16n8k16, fp32 accumulators: group = lane / 4, t = lane % 4.
//   A: register 0 (group, 2t), 1 (group + 8, 2t), 2 (group, 2t + 8), 3 (group + 8, 2t + 8), each
//      two columns; B: register 0 rows 2t, 2t + 1 of column group, 1 rows 2t + 8, 2t + 9;
//   C: (group, 2t), (group, 2t + 1), (group + 8, 2t), (group + 8, 2t + 1).
template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto all = exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto half = [](uint32_t word, int k) {
    return fastenc::to_float(T{static_cast<uint16_t>(k % 2 ? word >> 16 : word)});
  };
  const int group = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;
      const float x = half(all[group * 4 + from].a[upper + 2 * (k / 8)], k);
      const float y = half(all[column * 4 + from].b[k / 8], k);
      c[i] += x * y;
    }
  }
}

// ldmatrix.x4[.trans]: lanes 8 i .. 8 i + 7 give the rows of matrix i.
inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, bool transposed) {
  const auto rows = exchange(row);
  const int group = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      const auto at = reinterpret_cast<uintptr_t>(rows[i * 8 + r]);
      if (at % 16 != 0) {
        fail("ldmatrix: a row that is not 16-byte aligned");
      }
      banks |= 1u << at / 16 % 8;
    }
    machine().conflicts += banks != 0xff && lane() == 0;
    const auto element = [&](int r, int c) -> uint32_t {
      return static_cast<const uint16_t*>(rows[i * 8 + r])[c];
    };
    out[i] = transposed ? element(2 * t, group) | element(2 * t + 1, group) << 16
                        : element(group, 2 * t) | element(group, 2 * t + 1) << 16;
  }
}

inline void cp_async(void* to, const void* from, int bytes, int size) {
  if (reinterpret_cast<uintptr_t>(to) % bytes ||
      (size && reinterpret_cast<uintptr_t>(from) % bytes)) {
    fail("cp.async: a misaligned address");
  }
  machine().current->open.push_back({to, from, bytes, size});
}

inline void cp_async_commit() {
  Fiber& f = *machine().current;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

inline void cp_async_wait(size_t pending) {
  Fiber& f = *machine().current;
  while (f.groups.size() > pending) {
    for (const Copy& copy : f.groups.front()) {
      std::memset(copy.to, 0, copy.bytes);
      std::memcpy(copy.to, copy.from, copy.size);
    }
    f.groups.erase(f.groups.begin());
  }
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::machine().block)
#define blockDim (::emulator::machine().block_dim)
#define gridDim (::emulator::machine().grid_dim)

inline void __syncthreads() { emulator::meet_block(); }
inline void __syncwarp() { emulator::meet_warp(); }

template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::exchange(x)[emulator::lane() ^ mask];
}
template <typename T>
T __shfl_sync(unsigned, T x, int source) {
  return emulator::exchange(x)[source % emulator::kLanes];
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int delta) {
  const auto all = emulator::exchange(x);
  return emulator::lane() < delta ? x : all[emulator::lane() - delta];
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const auto all = emulator::exchange(predicate);
  unsigned bits = 0;
  for (int i = 0; i < emulator::kLanes; ++i) {
    bits |= static_cast<unsigned>(all[i]) << i;
  }
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __uint_as_float(uint32_t x) { return fastenc::bits_to_float(x); }
inline __half __ushort_as_half(uint16_t x) { return {x}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return fastenc::to_float(fastenc::fp16{x.bits}); }
inline __half __float2half_rn(float x) { return {fastenc::from_float<fastenc::fp16>(x).bits}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {fastenc::from_float<fastenc::bf16>(x).bits};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
// st.global and st.shared: with an address of the other memory they fault on a GPU.
template <typename T>
void __stwb(T* p, T x) {
  if (emulator::in_shared(p)) {
    emulator::fail("st.global with an address of shared memory");
  }
  *p = x;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::exp2;
using std::fmaf;
using std::fmaxf;
