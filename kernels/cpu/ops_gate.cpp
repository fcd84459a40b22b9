// The ops of gate.cpp: checks the arguments, then hands out rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "calls.h"
#include "check_rows.h"
#include "dispatch.h"

namespace {

// Rows of gate.cpp; behind the linears that make gate and up, a thread's columns of both as soon as they are there.
struct GateCall : Call {
  GateArgs args;
  int64_t rows;
  bool bf16;
  std::unique_ptr<LinearCall> linears;

  GateCall(const GateArgs& of, int64_t num_rows, bool is_bf16) : args(of), rows(num_rows), bf16(is_bf16) {}
  int64_t most_threads() const override {
    return linears ? linears->most_threads() : threads_for(rows, args.width);
  }

  void work(int64_t thread, int64_t threads) override {
    if (!linears) {
      const Share share(rows, thread, threads);
      kernels().gate(args, share.first, share.last, bf16);
      return;
    }
    const Share share(panels_of(args.width), thread, threads);
    linears->panels(thread, threads, share.first, share.last);
    const int64_t column = share.first * PANEL, at = column * (bf16 ? 2 : 4);
    GateArgs mine = args;
    mine.out = static_cast<char*>(args.out) + at;
    mine.gate.data = static_cast<const char*>(args.gate.data) + at;
    mine.up.data = static_cast<const char*>(args.up.data) + at;
    mine.width = std::min(share.last * PANEL, args.width) - column;
    kernels().gate(mine, 0, rows, bf16);
  }

  const void* weights(int64_t thread, int64_t threads) const override {
    if (!linears) return nullptr;
    return panel_of(linears->calls[0].products[0], Share(panels_of(args.width), thread, threads).first, bf16);
  }
  const Call* precede(const Call* next) override {
    if (!linears) return next;
    linears->precede(next);
    return this;
  }

  bool follow(std::unique_ptr<Call>& before) override {
    constexpr int64_t MOST_ROWS = 64;  // more are shared by rows better than by columns
    LinearCall* makes = dynamic_cast<LinearCall*>(before.get());
    if (!makes || rows > MOST_ROWS || int64_t(makes->calls.size()) != 2 * makes->segments) return false;
    const LinearArgs &gate = makes->calls[0], &up = makes->calls[makes->segments];
    if (gate.out != args.gate.data || up.out != args.up.data || gate.out_stride != args.gate.stride ||
        up.out_stride != args.up.stride || gate.out_width != args.width || up.out_width != args.width)
      return false;
    before.release();
    linears.reset(makes);
    return true;
  }
};

Tensor gated(const char* op, const Tensor& gate, const Tensor& up, bool is_gelu) {
  const Tensor gates = as_rows(op, "gate", gate, 2), ups = as_rows(op, "up", up, 2);
  check_shape(op, "up", up, "gate", gate);
  Tensor out = new_result(gate, {gate.size(0), gate.size(1)});
  const GateArgs args{out.mutable_data_ptr(), gate.size(1), rows_of(gates), rows_of(ups), gate.size(1), is_gelu};
  run(std::make_unique<GateCall>(args, gate.size(0), is_bf16(gate)));
  return out;
}

std::tuple<Tensor, Tensor> run_backward(const char* op, const Tensor& grad, const Tensor& gate, const Tensor& up,
                                        bool is_gelu) {
  const Tensor gates = as_rows(op, "gate", gate, 2), ups = as_rows(op, "up", up, 2), from = as_rows(op, "grad", grad, 2);
  check_shape(op, "up", up, "gate", gate);
  check_shape(op, "grad", grad, "gate", gate);
  Tensor grad_gate = new_result(gate, {gate.size(0), gate.size(1)});
  Tensor grad_up = new_result(gate, {gate.size(0), gate.size(1)});
  const GateGradArgs args{grad_gate.mutable_data_ptr(), grad_up.mutable_data_ptr(), rows_of(from), rows_of(gates),
                          rows_of(ups), gate.size(1), is_gelu};
  const Kernels& k = kernels();
  share_rows(gate.size(0), gate.size(1),
             [&](int64_t first, int64_t last) { k.gate_backward(args, first, last, is_bf16(gate)); });
  return {grad_gate, grad_up};
}

Tensor silu_gate(const Tensor gate, const Tensor up) { return gated("silu_gate", gate, up, false); }
Tensor gelu_gate(const Tensor gate, const Tensor up) { return gated("gelu_gate", gate, up, true); }

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
