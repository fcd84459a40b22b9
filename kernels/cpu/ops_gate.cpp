// The ops of gate.cpp: checks the arguments, then hands out rows.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "check_rows.h"
#include "dispatch.h"

namespace {

Tensor run(const char* op, const Tensor& gate, const Tensor& up, bool is_gelu) {
  const Tensor gates = as_rows(op, "gate", gate, 2), ups = as_rows(op, "up", up, 2);
  check_shape(op, "up", up, "gate", gate);
  Tensor out = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  const GateArgs args{out.mutable_data_ptr(), rows_of(gates), rows_of(ups), gate.size(1), is_gelu};
  const Kernels& k = kernels();
  share_rows(gate.size(0), gate.size(1), [&](int64_t first, int64_t last) { k.gate(args, first, last, is_bf16(gate)); });
  return out;
}

std::tuple<Tensor, Tensor> run_backward(const char* op, const Tensor& grad, const Tensor& gate, const Tensor& up,
                                        bool is_gelu) {
  const Tensor gates = as_rows(op, "gate", gate, 2), ups = as_rows(op, "up", up, 2), from = as_rows(op, "grad", grad, 2);
  check_shape(op, "up", up, "gate", gate);
  check_shape(op, "grad", grad, "gate", gate);
  Tensor grad_gate = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  Tensor grad_up = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  const GateGradArgs args{grad_gate.mutable_data_ptr(), grad_up.mutable_data_ptr(), rows_of(from), rows_of(gates),
                          rows_of(ups), gate.size(1), is_gelu};
  const Kernels& k = kernels();
  share_rows(gate.size(0), gate.size(1),
             [&](int64_t first, int64_t last) { k.gate_backward(args, first, last, is_bf16(gate)); });
  return {grad_gate, grad_up};
}

Tensor silu_gate(const Tensor gate, const Tensor up) { return run("silu_gate", gate, up, false); }
Tensor gelu_gate(const Tensor gate, const Tensor up) { return run("gelu_gate", gate, up, true); }

std::tuple<Tensor, Tensor> silu_gate_backward(const Tensor grad, const Tensor gate, const Tensor up) {
  return run_backward("silu_gate_backward", grad, gate, up, false);
}
std::tuple<Tensor, Tensor> gelu_gate_backward(const Tensor grad, const Tensor gate, const Tensor up) {
  return run_backward("gelu_gate_backward", grad, gate, up, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("silu_gate(Tensor gate, Tensor up) -> Tensor");
  m.def("gelu_gate(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_gate_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("gelu_gate_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("silu_gate", TORCH_BOX(&silu_gate));
  m.impl("gelu_gate", TORCH_BOX(&gelu_gate));
  m.impl("silu_gate_backward", TORCH_BOX(&silu_gate_backward));
  m.impl("gelu_gate_backward", TORCH_BOX(&gelu_gate_backward));
}
