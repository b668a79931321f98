// Activations and their slopes on vectors; included once per ISA.
#if defined(FASTENC_ACTIVATIONS_TOGGLE) == defined(FASTENC_ISA_TOGGLE)
#ifdef FASTENC_ACTIVATIONS_TOGGLE
#undef FASTENC_ACTIVATIONS_TOGGLE
#else
#define FASTENC_ACTIVATIONS_TOGGLE
#endif

namespace fastenc::cpu::FASTENC_ISA {

struct ActivationAndSlope {
  vf value, slope;
};

constexpr float kSqrtHalf = 0.707106781f;
constexpr float kInvSqrt2Pi = 0.398942280f;
constexpr float kSqrt2OverPi = 0.797884561f;
constexpr float kCubic = 0.044715f;

FASTENC_INLINE vf sigmoid(vf a) { return set(1.0f) / (set(1.0f) + exp(-a)); }

FASTENC_INLINE vf gelu_tanh_of(vf a) {
  return tanh(set(kSqrt2OverPi) * fma(set(kCubic) * a * a, a, a));
}

template <Activation kActivation>
FASTENC_INLINE vf activate(vf a) {
  if constexpr (kActivation == Activation::kSilu) {
    return a * sigmoid(a);
  } else if constexpr (kActivation == Activation::kGelu) {
    return set(0.5f) * a * (set(1.0f) + erf(a * set(kSqrtHalf)));
  } else {
    return set(0.5f) * a * (set(1.0f) + gelu_tanh_of(a));
  }
}

template <Activation kActivation>
FASTENC_INLINE ActivationAndSlope activate_with_slope(vf a) {
  const vf one = set(1.0f), half = set(0.5f);
  if constexpr (kActivation == Activation::kSilu) {
    const vf s = sigmoid(a);
    return {a * s, s * fma(a, one - s, one)};
  } else if constexpr (kActivation == Activation::kGelu) {
    const vf cdf = half * (one + erf(a * set(kSqrtHalf)));
    const vf pdf = set(kInvSqrt2Pi) * exp(set(-0.5f) * a * a);
    return {a * cdf, fma(a, pdf, cdf)};
  } else {
    const vf t = gelu_tanh_of(a);
    const vf inner = set(kSqrt2OverPi) * fma(set(3.0f * kCubic) * a, a, one);
    const vf cdf = half * (one + t);
    return {a * cdf, fma(half * a * (one - t * t), inner, cdf)};
  }
}

// y = act(a) * gate, n elements each.
template <Activation kActivation, typename T>
FASTENC_INLINE void gate_row(const T* a, const T* gate, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(y + i, activate<kActivation>(load(a + i)) * load(gate + i));
  }
  if (i < n) {
    const int lanes = static_cast<int>(n - i);
    store_n(y + i, activate<kActivation>(load_n(a + i, lanes)) * load_n(gate + i, lanes), lanes);
  }
}

}  // namespace fastenc::cpu::FASTENC_ISA

#endif
