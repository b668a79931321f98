// fastenc._C: loading it registers the CPU kernels; its Python functions are host code.
#include <map>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/common/launch_counts.h"
#include "csrc/common/simd_types.h"
#include "csrc/host/entities.h"

namespace {

std::map<std::string, int64_t> launch_counts() {
  std::map<std::string, int64_t> counts;
  for (const auto* c = fastenc::LaunchCounter::head().load(); c != nullptr; c = c->next()) {
    counts[c->op()] += c->count();
  }
  return counts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastenc's CPU kernels (registered with torch on import) and host code";
  module.def("launch_counts", &launch_counts, "Kernel launches since the process began, {op: n}.");
  module.def(
      "cpu_isa", [] { return fastenc::cpu::isa_name(fastenc::cpu::active_isa()); },
      "The instruction set in use: avx512, avx2 or portable.");
  module.def("cpu_is_intel", &fastenc::cpu::cpu_is_intel,
             "Whether MKL knows this processor as its maker's.");
  fastenc::host::define_entities(module);
}
