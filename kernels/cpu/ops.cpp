// The library of ops that torch sees, through its stable ABI; ops_*.cpp add theirs to it.
//
// Threads are torch's own: there is no second pool to fight with. Which thread does what never matters to a result.
#include <torch/csrc/stable/library.h>

#include <string>

#include "dispatch.h"

namespace {

std::string isa() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(onemesh, m) { m.def("isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(onemesh, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
