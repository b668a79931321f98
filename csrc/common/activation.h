// The activations of a gated layer, by name; included once.
#pragma once

#include <string>
#include <type_traits>

#include "activation_kinds.h"
#include "checks.h"

namespace fastenc {

// Calls f(std::integral_constant<Activation, ...>).
template <typename F>
void dispatch_activation(const std::string& name, F&& f) {
  if (name == "gelu") {
    f(std::integral_constant<Activation, Activation::kGelu>{});
  } else if (name == "gelu_tanh") {
    f(std::integral_constant<Activation, Activation::kGeluTanh>{});
  } else {
    STD_TORCH_CHECK(name == "silu", "activation: expected gelu, gelu_tanh or silu, got ", name);
    f(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

}  // namespace fastenc
