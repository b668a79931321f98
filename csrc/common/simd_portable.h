// The portable half of simd.h, through the vector extensions of gcc and clang: four lanes are one
// SSE or NEON register. The functions are described in simd.h.
namespace fastenc::cpu::FASTENC_ISA {

constexpr int kLanes = 4;

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));
typedef uint32_t uint4 __attribute__((vector_size(16)));

struct vf {
  float4 v;
};
struct vi {
  int4 v;
};
struct vm {
  int4 v;
};

FASTENC_INLINE vf set(float x) { return {float4{x, x, x, x}}; }
FASTENC_INLINE vf zero() { return set(0.0f); }
FASTENC_INLINE vi set_int(int32_t x) { return {int4{x, x, x, x}}; }
FASTENC_INLINE vi iota() { return {int4{0, 1, 2, 3}}; }
FASTENC_INLINE vm first_n(int n) { return {set_int(n).v > iota().v}; }

template <typename T>
FASTENC_INLINE vf load_n(const T* p, int n) {
  vf r = zero();
  for (int i = 0; i < n; ++i) {
    r.v[i] = ::fastenc::to_float(p[i]);
  }
  return r;
}
template <typename T>
FASTENC_INLINE void store_n(T* p, vf x, int n) {
  for (int i = 0; i < n; ++i) {
    p[i] = from_float<T>(x.v[i]);
  }
}
template <typename T>
FASTENC_INLINE vf load(const T* p) {
  return load_n(p, kLanes);
}
template <typename T>
FASTENC_INLINE void store(T* p, vf x) {
  store_n(p, x, kLanes);
}
FASTENC_INLINE vf load(const float* p) {
  vf r;
  std::memcpy(&r.v, p, sizeof(r.v));
  return r;
}
FASTENC_INLINE void store(float* p, vf x) { std::memcpy(p, &x.v, sizeof(x.v)); }
FASTENC_INLINE vi load_int(const int32_t* p) {
  vi r;
  std::memcpy(&r.v, p, sizeof(r.v));
  return r;
}
FASTENC_INLINE void store_int(int32_t* p, vi x) { std::memcpy(p, &x.v, sizeof(x.v)); }

FASTENC_INLINE vi bits(vf a) { return {(int4)a.v}; }
FASTENC_INLINE vf from_bits(vi a) { return {(float4)a.v}; }

FASTENC_INLINE vf operator+(vf a, vf b) { return {a.v + b.v}; }
FASTENC_INLINE vf operator-(vf a, vf b) { return {a.v - b.v}; }
FASTENC_INLINE vf operator*(vf a, vf b) { return {a.v * b.v}; }
FASTENC_INLINE vf operator/(vf a, vf b) { return {a.v / b.v}; }
FASTENC_INLINE vf operator-(vf a) { return {-a.v}; }
FASTENC_INLINE vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
FASTENC_INLINE vf fnma(vf a, vf b, vf c) { return {c.v - a.v * b.v}; }

FASTENC_INLINE vm operator<(vf a, vf b) { return {a.v < b.v}; }
FASTENC_INLINE vm operator<=(vf a, vf b) { return {a.v <= b.v}; }
FASTENC_INLINE vm operator>(vf a, vf b) { return {a.v > b.v}; }
FASTENC_INLINE vm operator>=(vf a, vf b) { return {a.v >= b.v}; }
FASTENC_INLINE vm operator==(vf a, vf b) { return {a.v == b.v}; }
FASTENC_INLINE vm is_nan(vf a) { return {a.v != a.v}; }
FASTENC_INLINE vm operator&(vm a, vm b) { return {a.v & b.v}; }
FASTENC_INLINE vm operator|(vm a, vm b) { return {a.v | b.v}; }
FASTENC_INLINE vm operator!(vm a) { return {~a.v}; }
FASTENC_INLINE vi select(vm m, vi a, vi b) { return {(m.v & a.v) | (~m.v & b.v)}; }
FASTENC_INLINE vf select(vm m, vf a, vf b) { return from_bits(select(m, bits(a), bits(b))); }
FASTENC_INLINE vf zero_unless(vm m, vf a) { return from_bits({m.v & bits(a).v}); }
FASTENC_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }
FASTENC_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
FASTENC_INLINE vf abs(vf a) { return from_bits({bits(a).v & 0x7fffffff}); }
FASTENC_INLINE vf copysign(vf magnitude, vf sign) {
  return from_bits({(bits(magnitude).v & 0x7fffffff) | (bits(sign).v & INT32_MIN)});
}
FASTENC_INLINE vf sqrt(vf a) {
  for (int i = 0; i < kLanes; ++i) {
    a.v[i] = std::sqrt(a.v[i]);
  }
  return a;
}
FASTENC_INLINE vf round(vf a) {
  const vf magic = set(12582912.0f);  // 1.5 * 2^23: the sum has no bits left for a fraction
  return (a + magic) - magic;
}

FASTENC_INLINE vi operator+(vi a, vi b) { return {(int4)((uint4)a.v + (uint4)b.v)}; }
FASTENC_INLINE vi operator-(vi a, vi b) { return {(int4)((uint4)a.v - (uint4)b.v)}; }
FASTENC_INLINE vi operator*(vi a, vi b) { return {(int4)((uint4)a.v * (uint4)b.v)}; }
FASTENC_INLINE vi operator&(vi a, vi b) { return {a.v & b.v}; }
FASTENC_INLINE vi operator|(vi a, vi b) { return {a.v | b.v}; }
FASTENC_INLINE vi operator^(vi a, vi b) { return {a.v ^ b.v}; }
template <int n>
FASTENC_INLINE vi shift_left(vi a) {
  return {(int4)((uint4)a.v << n)};
}
template <int n>
FASTENC_INLINE vi shift_right(vi a) {
  return {(int4)((uint4)a.v >> n)};
}
FASTENC_INLINE vm operator==(vi a, vi b) { return {a.v == b.v}; }
FASTENC_INLINE vm operator>(vi a, vi b) { return {a.v > b.v}; }
FASTENC_INLINE vm unsigned_ge(vi a, vi b) { return {(int4)((uint4)a.v >= (uint4)b.v)}; }
FASTENC_INLINE vi min(vi a, vi b) { return select(a > b, b, a); }
FASTENC_INLINE vi max(vi a, vi b) { return select(a > b, a, b); }
FASTENC_INLINE vi to_int(vf a) { return {__builtin_convertvector(a.v, int4)}; }
FASTENC_INLINE vf to_float(vi a) { return {__builtin_convertvector(a.v, float4)}; }
FASTENC_INLINE vf permute(vf a, vi i) {
  return {float4{a.v[i.v[0]], a.v[i.v[1]], a.v[i.v[2]], a.v[i.v[3]]}};
}
FASTENC_INLINE void multiply_wide(vi a, vi b, vi* high, vi* low) {
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product =
        static_cast<uint64_t>(static_cast<uint32_t>(a.v[i])) * static_cast<uint32_t>(b.v[i]);
    high->v[i] = static_cast<int32_t>(product >> 32);
    low->v[i] = static_cast<int32_t>(product);
  }
}

FASTENC_INLINE float sum(vf a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FASTENC_INLINE vf sums(const vf (&r)[kLanes]) {
  vf out;
  for (int i = 0; i < kLanes; ++i) {
    out.v[i] = sum(r[i]);
  }
  return out;
}
FASTENC_INLINE float max_lane(vf a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1];
  const float y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}

FASTENC_INLINE void transpose(vf (&r)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = i + 1; j < kLanes; ++j) {
      const float x = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = x;
    }
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA
