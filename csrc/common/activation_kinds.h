// The activations of a gated layer, for device code too.
#pragma once

namespace fastenc {

enum class Activation { kGelu, kGeluTanh, kSilu };

}  // namespace fastenc
