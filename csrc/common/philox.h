// Philox 4x32-10 (Salmon et al. 2011), the generator of every dropout mask in fastenc.
//
// A mask is a function of the seed and of an element's logical index, so that every backend makes
// the same one, and a backward pass makes it again. Key: (seed & 0xffffffff, seed >> 32).
//
//   attention   element (query, key, head): counter = (j >> 2, r, h, 0), word j & 3, where r is the
//               packed row of the query, j the index of the key WITHIN its sequence, h the head
//   span        element d of a span: (d >> 2, packed row of its first word, words after it, 1),
//               word d & 3
//   token       element d of a (word, label): (d >> 2, packed row, label, 2), word d & 3
//   dropout     element i of a tensor: (c, c >> 32, 0, 3), c = 16 (i >> 6) + (i & 15), word
//               i >> 4 & 3
//
// An element is kept iff its word >= uint32(p * 2^32), computed in double; kept values are scaled
// by 1 / (1 - p).
#ifndef FASTENC_PHILOX_SCALAR
#define FASTENC_PHILOX_SCALAR

#include <array>
#include <cstdint>

namespace fastenc {

constexpr uint32_t kPhiloxMultiply0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiply1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

inline std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiply0) * counter[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiply1) * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(p0)};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;   // an element is kept iff its word >= threshold
  float keep_scale = 1.0f;  // 1 / (1 - p)

  Dropout() = default;
  Dropout(double p, uint64_t seed_value)
      : seed(seed_value),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        keep_scale(static_cast<float>(1.0 / (1.0 - p))) {}

  bool active() const { return threshold != 0; }
};

}  // namespace fastenc

#endif  // FASTENC_PHILOX_SCALAR

#ifdef FASTENC_ISA
#if defined(FASTENC_PHILOX_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_PHILOX_TOGGLE
#undef FASTENC_PHILOX_TOGGLE
#else
#define FASTENC_PHILOX_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

struct PhiloxWords {
  vi word[4];
};

// One counter a lane.
FASTENC_INLINE PhiloxWords philox(vi c0, vi c1, vi c2, vi c3, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  const vi multiply0 = set_int(static_cast<int32_t>(kPhiloxMultiply0));
  const vi multiply1 = set_int(static_cast<int32_t>(kPhiloxMultiply1));
  for (int round = 0; round < kPhiloxRounds; ++round) {
    vi high0, low0, high1, low1;
    multiply_wide(c0, multiply0, &high0, &low0);
    multiply_wide(c2, multiply1, &high1, &low1);
    c0 = high1 ^ c1 ^ set_int(static_cast<int32_t>(key0));
    c1 = low1;
    c2 = high0 ^ c3 ^ set_int(static_cast<int32_t>(key1));
    c3 = low0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
#endif  // FASTENC_ISA
