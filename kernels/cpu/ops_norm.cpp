// The ops of norm.cpp: checks the arguments, then hands out rows.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "calls.h"
#include "check_rows.h"
#include "dispatch.h"

namespace {

Tensor checked_weight(const char* op, const Tensor& weight, const Tensor& x) {
  check_same(op, "weight", weight, x);
  const Tensor entries = dense(op, "weight", weight, 1, x.scalar_type());
  STD_TORCH_CHECK(weight.size(0) == x.size(1), op, ": weight has ", weight.size(0), " entries, x ", x.size(1));
  return entries;
}

void norm(const NormArgs& args, const Tensor& x) { run(std::make_unique<NormCall>(args, x.size(0), is_bf16(x))); }

Tensor rms_norm(const Tensor x, const Tensor weight, double eps) {
  const Tensor from = as_rows("rms_norm", "x", x, 2);
  const Tensor entries = checked_weight("rms_norm", weight, x);
  Tensor out = new_result(x, {x.size(0), x.size(1)});
  norm({out.mutable_data_ptr(), nullptr, rows_of(from), {}, entries.const_data_ptr(), float(eps), x.size(1)}, x);
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor x, const Tensor delta, const Tensor weight, double eps) {
  const Tensor from = as_rows("add_rms_norm", "x", x, 2), added = as_rows("add_rms_norm", "delta", delta, 2);
  check_shape("add_rms_norm", "delta", delta, "x", x);
  const Tensor entries = checked_weight("add_rms_norm", weight, x);
  Tensor sum = new_result(x, {x.size(0), x.size(1)});
  Tensor out = new_result(x, {x.size(0), x.size(1)});
  norm({out.mutable_data_ptr(), sum.mutable_data_ptr(), rows_of(from), rows_of(added), entries.const_data_ptr(),
       float(eps), x.size(1)},
      x);
  return {sum, out};
}

// (gradient of x, gradient of the weight: of no entries unless wanted). grad_sum is the gradient of add_rms_norm's sum.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor grad, const std::optional<Tensor> grad_sum, const Tensor x,
                                             const Tensor weight, double eps, bool wants_weight) {
  const char* op = "rms_norm_backward";
  const Tensor from = as_rows(op, "x", x, 2), grads = as_rows(op, "grad", grad, 2);
  check_shape(op, "grad", grad, "x", x);
  const Tensor entries = checked_weight(op, weight, x);
  std::optional<Tensor> sums;
  if (grad_sum) {
    sums = as_rows(op, "grad_sum", *grad_sum, 2);
    check_shape(op, "grad_sum", *grad_sum, "x", x);
  }
  const int64_t rows = x.size(0), width = x.size(1), blocks = (rows + NORM_BLOCK - 1) / NORM_BLOCK;
  Tensor grad_x = new_result(x, {rows, width});
  Tensor grad_weight = new_result(x, {wants_weight ? width : 0});
  Tensor parts = new_result(x, {wants_weight ? blocks : 0, width}, ScalarType::Float);
  float* weight_parts = wants_weight ? static_cast<float*>(parts.mutable_data_ptr()) : nullptr;
  const NormGradArgs args{grad_x.mutable_data_ptr(), weight_parts, rows_of(grads), sums ? rows_of(*sums) : Rows{},
                          rows_of(from), entries.const_data_ptr(), float(eps), rows, width};
  const Kernels& k = kernels();
  share_rows(blocks, NORM_BLOCK * width,
             [&](int64_t first, int64_t last) { k.norm_backward(args, first, last, is_bf16(x)); });
  if (wants_weight) k.sum_rows(grad_weight.mutable_data_ptr(), weight_parts, blocks, width, is_bf16(x));
  return {grad_x, grad_weight};
}

}  // namespace

void NormCall::work(int64_t thread, int64_t threads) {
  const Share share(rows, thread, threads);
  kernels().norm(args, share.first, share.last, bf16);
}

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, float eps, bool wants_weight) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
