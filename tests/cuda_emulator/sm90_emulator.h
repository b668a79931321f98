// What Hopper adds, on the CPU: mbarriers, TMA, wgmma, named barriers. Written from the PTX ISA
// (Parameterized Cooperative Thread Arrays: mbarrier; Tensors: Swizzling Modes; Asynchronous
// Warpgroup Level Matrix Instructions: Register Fragments, Matrix Descriptor, Canonical Layouts),
// independently of the kernels.
//
// Asynchronous work happens at one of two extremes that the hardware allows: at once, or only when
// a wait demands it. A kernel that overwrites what is still read, or reads what has not come, gives
// wrong numbers at one of them.
//
// What threads write to shared memory reaches TMA and wgmma by fence.proxy.async of the writing
// thread only: until then the async proxy's view of these bytes differs, which is an error where it
// reads or overwrites them. So is a product after a wait without a wgmma.fence between, and a TMA
// load to a barrier whose initialisation was not published. Not modelled: that registers of a left
// operand change between two products of one batch.
#pragma once

#include <map>

#include "simt_emulator.h"

namespace emulator {

struct alignas(64) TensorMap {
  unsigned char* base;
  int64_t size[3];    // head_dim, heads, tokens
  int64_t stride[3];  // bytes
  int box[3];
  int swizzle;  // bytes: 64 or 128
};

struct Mbarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
  int owner = -1;  // who initialised it, until published
};

struct TensorCopy {
  unsigned char* to;
  const TensorMap* map;
  Mbarrier* barrier;
  int at[3];
};

struct NamedBarrier {
  int arrived = 0;
  std::vector<Fiber*> waiting;
};

struct Hopper {
  bool late = false;
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<TensorCopy> copies;
  std::map<int, NamedBarrier> named;
  struct Queue {
    std::vector<std::function<void()>> open;
    std::vector<std::vector<std::function<void()>>> groups;
    bool fenced = false;
  };
  std::map<int, Queue> queues;  // by thread
};

inline Hopper& hopper() {
  static Hopper only;
  return only;
}

inline void finish_block() {
  if (!hopper().copies.empty()) {
    fail("a TMA copy that nobody waited for");
  }
  for (auto& [thread, queue] : hopper().queues) {
    if (!queue.open.empty() || !queue.groups.empty()) {
      fail("a wgmma that nobody waited for");
    }
  }
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - machine().shared);
}

inline unsigned char* shared_at(uint32_t address, int bytes) {
  Machine& m = machine();
  if (m.shared + address + bytes > m.memory.data() + m.memory.size()) {
    fail("an access past the end of shared memory");
  }
  return m.shared + address;
}

inline unsigned char* proxied_at(uint32_t address) { return &machine().proxied[address]; }

inline void fence_async_proxy() {
  for (const auto& [at, bytes] : machine().current->unfenced) {
    std::memcpy(proxied_at(shared_address(at)), at, bytes);
  }
  machine().current->unfenced.clear();
}

inline void block_on(std::vector<Fiber*>* list) {
  Fiber* me = machine().current;
  list->push_back(me);
  me->state = State::kAtWarp;
  leave();
}

inline void wake(std::vector<Fiber*>* list) {
  for (Fiber* f : *list) {
    f->state = State::kReady;
  }
  list->clear();
}

// ---- barriers -----------------------------------------------------------------------------------

inline void mbarrier_init(const void* at, uint32_t count) {
  if (reinterpret_cast<uintptr_t>(at) % 8) {
    fail("mbarrier: a misaligned address");
  }
  Mbarrier& b = hopper().mbarriers[at];
  b = {static_cast<int>(count), static_cast<int>(count)};
  b.owner = machine().current->index;
}

inline Mbarrier& mbarrier_at(const void* at) {
  const auto found = hopper().mbarriers.find(at);
  if (found == hopper().mbarriers.end()) {
    fail("mbarrier: not initialised");
  }
  return found->second;
}

inline void mbarrier_publish() {
  for (auto& [at, b] : hopper().mbarriers) {
    b.owner = b.owner == machine().current->index ? -1 : b.owner;
  }
}

inline void settle(Mbarrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.count;
    wake(&b.waiting);
  }
}

inline void arrive(Mbarrier& b, int64_t bytes) {
  if (b.pending == 0) {
    fail("mbarrier: more arrivals than it was initialised for");
  }
  b.bytes += bytes;
  --b.pending;
  if (b.bytes >= 1 << 20) {
    fail("mbarrier: a transaction count past 2^20 - 1");
  }
  settle(b);
}

inline void mbarrier_arrive(const void* at) { arrive(mbarrier_at(at), 0); }
inline void mbarrier_expect(const void* at, uint32_t bytes) { arrive(mbarrier_at(at), bytes); }

inline uint32_t xor_chunks(uint32_t address, int bytes) {
  return address ^ (address >> 7 & (bytes == 128 ? 7 : 3)) << 4;
}

inline void perform(const TensorCopy& c) {
  const TensorMap& m = *c.map;
  uint32_t offset = shared_address(c.to);
  for (int z = 0; z < m.box[2]; ++z) {
    for (int y = 0; y < m.box[1]; ++y) {
      for (int x = 0; x < m.box[0]; ++x, offset += 2) {
        const int64_t at[3] = {int64_t{c.at[0]} + x, int64_t{c.at[1]} + y, int64_t{c.at[2]} + z};
        bool inside = true;
        int64_t from = 0;
        for (int d = 0; d < 3; ++d) {
          inside = inside && at[d] >= 0 && at[d] < m.size[d];
          from += at[d] * m.stride[d];
        }
        uint16_t value = 0;
        if (inside) {
          std::memcpy(&value, m.base + from, 2);
        }
        const uint32_t to = xor_chunks(offset, m.swizzle);
        if (std::memcmp(shared_at(to, 2), proxied_at(to), 2) != 0) {
          fail("TMA: overwrites what a thread wrote without fence.proxy.async");
        }
        std::memcpy(shared_at(to, 2), &value, 2);
        std::memcpy(proxied_at(to), &value, 2);
      }
    }
  }
  c.barrier->bytes -= int64_t{2} * m.box[0] * m.box[1] * m.box[2];
  settle(*c.barrier);
}

// The copies under way to a barrier that somebody waits for.
inline void demand(Mbarrier& b) {
  auto& copies = hopper().copies;
  for (size_t i = 0; i < copies.size();) {
    if (copies[i].barrier == &b) {
      const TensorCopy copy = copies[i];
      copies.erase(copies.begin() + i);
      perform(copy);
    } else {
      ++i;
    }
  }
}

inline void tma_load(void* to, const TensorMap& map, const void* barrier, int x, int y, int z) {
  if (shared_address(to) % 128 != 0) {
    fail("TMA: shared memory that is not 128-byte aligned");
  }
  if (map.box[0] * 2 != map.swizzle || map.box[0] > 256 || map.box[2] > 256) {
    fail("TMA: a box that its swizzle does not allow");
  }
  Mbarrier& b = mbarrier_at(barrier);
  if (b.owner >= 0) {
    fail("TMA: a barrier whose initialisation is not published");
  }
  hopper().copies.push_back({static_cast<unsigned char*>(to), &map, &b, {x, y, z}});
  if (!hopper().late || !b.waiting.empty()) {
    demand(b);
  }
}

inline void mbarrier_wait(const void* at, uint32_t parity) {
  Mbarrier& b = mbarrier_at(at);
  demand(b);
  while ((b.phase & 1) == parity) {
    block_on(&b.waiting);
  }
}

inline void named_barrier(int id, int threads) {
  NamedBarrier& b = hopper().named[id];
  if (++b.arrived < threads) {
    block_on(&b.waiting);
    return;
  }
  b.arrived = 0;
  wake(&b.waiting);
}

// ---- wgmma --------------------------------------------------------------------------------------

// A 16-bit matrix in shared memory, MN x 16.
struct Operand {
  uint32_t start, leading, stride;
  int row_bytes;
  bool transposed;

  Operand(uint64_t d, bool trans)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        row_bytes(d >> 62 == 1 ? 128 : 64),
        transposed(trans) {
    if (d >> 62 != 1 && d >> 62 != 2) {
      fail("wgmma: a descriptor without 64- or 128-byte swizzle");
    }
    if (d >> 49 & 7 || d & 0x1fff'c000'c000'c000ull & ~(7ull << 49)) {
      fail("wgmma: reserved bits or a base offset in a descriptor");
    }
  }

  template <typename T>
  float at(int mn, int k) const {
    const int in_row = row_bytes / 2;
    const uint32_t linear = transposed ? start + mn / in_row * leading + k / 8 * stride +
                                             k % 8 * row_bytes + mn % in_row * 2
                                       : start + mn / 8 * stride + mn % 8 * row_bytes + k * 2;
    const uint32_t from = xor_chunks(linear, row_bytes);
    T value;
    std::memcpy(&value, shared_at(from, 2), 2);
    if (std::memcmp(&value, proxied_at(from), 2) != 0) {
      fail("wgmma: reads what a thread wrote without fence.proxy.async");
    }
    return fastenc::to_float(value);
  }
};

inline void wgmma_fence() { hopper().queues[machine().current->index].fenced = true; }

inline void enqueue(std::function<void()> work) {
  auto& q = hopper().queues[machine().current->index];
  if (!q.fenced) {
    fail("wgmma: no wgmma.fence since registers were last free to change");
  }
  q.open.push_back(std::move(work));
}

inline void wgmma_commit() {
  auto& q = hopper().queues[machine().current->index];
  if (!hopper().late) {
    for (auto& work : q.open) {
      work();
    }
    q.open.clear();
  }
  q.groups.push_back(std::move(q.open));
  q.open.clear();
}

inline void wgmma_wait(size_t pending) {
  auto& q = hopper().queues[machine().current->index];
  if (!q.open.empty()) {
    fail("wgmma: a wait with products that were never committed");
  }
  while (q.groups.size() > pending) {
    for (auto& work : q.groups.front()) {
      work();
    }
    q.groups.erase(q.groups.begin());
  }
  q.fenced = false;
  meet_warp();
}

template <typename T>
void multiply_rows(float* d, int tiles, const float (&a)[2][16], const Operand& b,
                   bool accumulate) {
  const int t = lane() % 4;
  for (int n = 0; n < tiles; ++n) {
    for (int i = 0; i < 2; ++i) {
      float x[2] = {};
      for (int k = 0; k < 16; ++k) {
        const float y = b.at<T>(n * 8 + t * 2 + i, k);
        x[0] += a[0][k] * y;
        x[1] += a[1][k] * y;
      }
      for (int half = 0; half < 2; ++half) {
        float& sum = d[n * 4 + half * 2 + i];
        sum = accumulate ? sum + x[half] : x[half];
      }
    }
  }
}

template <typename T, bool kTransA, bool kTransB, int kTiles>
void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
  float* out = &d[0][0];
  const Operand left(a, kTransA), right(b, kTransB);
  enqueue([=] {
    const int row = machine().current->index % 128 / 32 * 16 + lane() / 4;
    float rows[2][16];
    for (int k = 0; k < 16; ++k) {
      rows[0][k] = left.at<T>(row, k);
      rows[1][k] = left.at<T>(row + 8, k);
    }
    multiply_rows<T>(out, kTiles, rows, right, accumulate);
  });
  meet_warp();
}

template <typename T, bool kTransB, int kTiles>
void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  struct Fragment {
    uint32_t a[4];
  };
  const auto all = exchange(Fragment{{a[0], a[1], a[2], a[3]}});
  struct Rows {
    float at[2][16];
  } rows;
  for (int k = 0; k < 16; ++k) {
    const uint32_t (&from)[4] = all[lane() / 4 * 4 + k % 8 / 2].a;
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = from[k / 8 * 2 + half];
      rows.at[half][k] = fastenc::to_float(T{static_cast<uint16_t>(k % 2 ? word >> 16 : word)});
    }
  }
  float* out = &d[0][0];
  const Operand right(b, kTransB);
  enqueue([=] { multiply_rows<T>(out, kTiles, rows.at, right, accumulate); });
}

}  // namespace emulator
