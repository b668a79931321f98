// Vectors in and out of global memory: 16 bytes (or less, where the other operand is wider) a
// thread; fp32 in registers, one rounding to nearest on the way out.
#pragma once

#include <cstdint>

#include "../common/row_tiles.h"
#include "../common/simd_types.h"
#include "simt.cuh"

namespace fastenc::cuda {

template <typename T>
__device__ __forceinline__ float widen(T x);

template <>
__device__ __forceinline__ float widen<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ float widen<bf16>(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
template <>
__device__ __forceinline__ float widen<fp16>(fp16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

template <typename T>
__device__ __forceinline__ T narrow(float x);

template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ fp16 narrow<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// What x is once it has been stored as T and read back.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return widen<T>(narrow<T>(x));
}

template <int kBytes>
struct Word;
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// V consecutive elements as the registers hold them between load and use.
template <typename T, int V>
struct Pack {
  static constexpr int kWord = V * sizeof(T) < kAccessBytes ? V * sizeof(T) : kAccessBytes;
  static constexpr int kWords = V * sizeof(T) / kWord;
  using W = typename Word<kWord>::type;
  union {
    W words[kWords];
    T items[V];
  };
};

template <typename T>
struct Pack<T, 1> {
  T items[1];
};

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  Pack<T, V> pack;
  if constexpr (V == 1) {
    pack.items[0] = *p;
  } else {
    using W = typename Pack<T, V>::W;
#pragma unroll
    for (int i = 0; i < Pack<T, V>::kWords; ++i) {
      pack.words[i] = reinterpret_cast<const W*>(p)[i];
    }
  }
  return pack;
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const Pack<T, V>& pack, float (&out)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    out[i] = widen<T>(pack.items[i]);
  }
}

template <int V, typename T>
__device__ __forceinline__ void load(const T* p, float (&out)[V]) {
  unpack(load<V>(p), out);
}

enum Space { kGlobal, kShared };

// One access. Each writes to its own memory only, whatever the pointer: __stwb is st.global. A
// plain assignment would do for both, but is not one access: nvcc 13.0 takes it apart where the
// words were put together from items, and stores 4 bytes at a time.
template <Space kTo, typename W>
__device__ __forceinline__ void store_word(W* p, const W& x) {
  if constexpr (kTo == kGlobal) {
    __stwb(p, x);
  } else {
#ifdef FASTENC_EMULATE
    ::emulator::store_shared(p, x);
#else
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(p));
    if constexpr (sizeof(W) == 4) {
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
    } else if constexpr (sizeof(W) == 8) {
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x.x), "r"(x.y) : "memory");
    } else {
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y),
                   "r"(x.z), "r"(x.w)
                   : "memory");
    }
#endif
  }
}

template <int V, Space kTo = kGlobal, typename T>
__device__ __forceinline__ void store_as_is(T* p, const T (&x)[V]) {
  if constexpr (V == 1) {
    *p = x[0];
  } else {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      pack.items[i] = x[i];
    }
    using W = typename Pack<T, V>::W;
#pragma unroll
    for (int i = 0; i < Pack<T, V>::kWords; ++i) {
      store_word<kTo>(reinterpret_cast<W*>(p) + i, pack.words[i]);
    }
  }
}

template <int V, Space kTo = kGlobal, typename T>
__device__ __forceinline__ void store(T* p, const float (&x)[V]) {
  T out[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    out[i] = narrow<T>(x[i]);
  }
  store_as_is<V, kTo>(p, out);
}

template <int V>
struct Width {
  static constexpr int value = V;
};

// Elements of one 16-byte access.
template <typename T>
constexpr int kVector = kAccessBytes / sizeof(T);

// A parameter whose dtype is no template argument: three times fewer kernels, for one uniform
// branch a vector.
enum class Dtype { kFloat, kBf16, kFp16 };

struct Parameter {
  const void* data;  // nullptr: absent
  Dtype dtype;
};

template <int V>
__device__ __forceinline__ void load(const Parameter& p, int64_t at, float (&out)[V]) {
  if (p.dtype == Dtype::kFloat) {
    load<V>(static_cast<const float*>(p.data) + at, out);
  } else if (p.dtype == Dtype::kBf16) {
    load<V>(static_cast<const bf16*>(p.data) + at, out);
  } else {
    load<V>(static_cast<const fp16*>(p.data) + at, out);
  }
}

// Adds to `sum`, slice 0's own, what the other slices left in shared memory, in order.
template <int kSlices, int kLanes, int V>
__device__ __forceinline__ void add_slices(const float (&sums)[kSlices][kLanes][V], int lane,
                                           int slices, float (&sum)[V]) {
  for (int other = 1; other < slices; ++other) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sum[i] += sums[other][lane][i];
    }
  }
}

// Every lane gets the sum; a butterfly, so all lanes add in the same order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, mask);
  }
  return x;
}

}  // namespace fastenc::cuda
