// Entities from scored spans: gliner's greedy search and its token-level decoding.
#pragma once

#include <pybind11/pybind11.h>

namespace fastenc::host {

// Adds `select_spans` and `token_spans` to the module.
void define_entities(pybind11::module_& module);

}  // namespace fastenc::host
