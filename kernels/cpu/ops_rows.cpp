// The ops of rows.cpp: checks the arguments, then hands out rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "checks.h"
#include "dispatch.h"

namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements per thread that are worth a thread

Tensor silu_gate(const Tensor gate, const Tensor up) {
  check_floats("silu_gate", "gate", gate, 2);
  check_floats("silu_gate", "up", up, 2);
  check_same("silu_gate", "up", up, gate);
  STD_TORCH_CHECK(gate.size(0) == up.size(0) && gate.size(1) == up.size(1), "silu_gate: gate and up differ in shape");
  Tensor out = torch::stable::empty_like(gate);
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, gate.numel(), GRAIN, [&](int64_t first, int64_t last) {
    k.silu_gate(out.mutable_data_ptr(), gate.const_data_ptr(), up.const_data_ptr(), first, last, is_bf16(gate));
  });
  return out;
}

Tensor rms_norm(const Tensor x, const Tensor weight, double eps) {
  check_floats("rms_norm", "x", x, 2);
  check_floats("rms_norm", "weight", weight, 1);
  check_same("rms_norm", "weight", weight, x);
  STD_TORCH_CHECK(weight.size(0) == x.size(1), "rms_norm: weight has ", weight.size(0), " entries, x ", x.size(1));
  Tensor out = torch::stable::empty_like(x);
  const Kernels& k = kernels();
  const int64_t width = std::max<int64_t>(x.size(1), 1);
  torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(GRAIN / width, 1), [&](int64_t first, int64_t last) {
    k.rms_norm(out.mutable_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(), float(eps), x.size(1), first, last,
               is_bf16(x));
  });
  return out;
}

Tensor rotary(const Tensor x, const Tensor cos, const Tensor sin) {
  check_floats("rotary", "x", x, 3);
  for (const auto& [name, angle] : {std::pair("cos", &cos), std::pair("sin", &sin)}) {
    check_type("rotary", name, *angle, 2, ScalarType::Float);
    STD_TORCH_CHECK(angle->size(0) == x.size(0) && angle->size(1) == x.size(2), "rotary: ", name, " doesn't fit x");
  }
  STD_TORCH_CHECK(x.size(2) % 2 == 0, "rotary: the head dim ", x.size(2), " is odd");
  Tensor out = torch::stable::empty_like(x);
  const Kernels& k = kernels();
  const int64_t width = std::max<int64_t>(x.size(1) * x.size(2), 1);
  torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(GRAIN / width, 1), [&](int64_t first, int64_t last) {
    k.rotary(out.mutable_data_ptr(), x.const_data_ptr(), static_cast<const float*>(cos.const_data_ptr()),
             static_cast<const float*>(sin.const_data_ptr()), x.size(1), x.size(2), first, last, is_bf16(x));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("silu_gate(Tensor gate, Tensor up) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("silu_gate", TORCH_BOX(&silu_gate));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rotary", TORCH_BOX(&rotary));
}
