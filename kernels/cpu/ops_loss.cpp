// The ops of loss.cpp: checks the arguments, then hands out rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "call.h"
#include "checks.h"
#include "dispatch.h"

namespace {

Tensor log_sum_exp(const Tensor logits) {
  check_type("log_sum_exp", "logits", logits, 2, ScalarType::Float);
  Tensor out = new_result(logits, {logits.size(0)});
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t first, int64_t last) {
    k.log_sum_exp(static_cast<float*>(out.mutable_data_ptr()), static_cast<const float*>(logits.const_data_ptr()),
                  logits.size(1), first, last);
  });
  return out;
}

// In the logits' place: row t's gradient begins where its logits did, whether it is as wide as they or half of that.
void loss_gradient(Tensor logits, const Tensor lse, const Tensor target, bool bf16) {
  const char* op = "loss_gradient";
  check_type(op, "logits", logits, 2, ScalarType::Float);
  check_type(op, "lse", lse, 1, ScalarType::Float);
  check_type(op, "target", target, 1, ScalarType::Long);
  const int64_t rows = logits.size(0), width = logits.size(1);
  STD_TORCH_CHECK(lse.size(0) == rows && target.size(0) == rows, op, ": lse and target must have ", rows, " entries");
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(integers(target)[i] >= -1 && integers(target)[i] < width, op, ": target[", i, "]=",
                    integers(target)[i], " of ", width, " columns (-1: none of them)");
  float* const x = static_cast<float*>(logits.mutable_data_ptr());
  const float* const from = static_cast<const float*>(lse.const_data_ptr());
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float* const here = x + row * width;
      k.loss_gradient(here, here, from + row, integers(target) + row, width, 0, 1, bf16);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(onemesh, m) {
  m.def("log_sum_exp(Tensor logits) -> Tensor");
  m.def("loss_gradient(Tensor(a!) logits, Tensor lse, Tensor target, bool bf16) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(onemesh, CPU, m) {
  m.impl("log_sum_exp", TORCH_BOX(&log_sum_exp));
  m.impl("loss_gradient", TORCH_BOX(&loss_gradient));
}
