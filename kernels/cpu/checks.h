// Checks of the arguments of an op: each message names the op and the argument.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

inline void check_dense(const char* op, const char* name, const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.dim() == dims, op, ": ", name, " has ", x.dim(), " dimensions, not ", dims);
  STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " is not contiguous");
}

inline void check_floats(const char* op, const char* name, const Tensor& x, int64_t dims) {
  check_dense(op, name, x, dims);
  STD_TORCH_CHECK(is_bf16(x) || x.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32 or bfloat16");
}

inline void check_same(const char* op, const char* name, const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type(), op, ": ", name, " has another dtype");
}

inline void check_type(const char* op, const char* name, const Tensor& x, int64_t dims, ScalarType type) {
  check_dense(op, name, x, dims);
  STD_TORCH_CHECK(x.scalar_type() == type, op, ": ", name, " has the wrong dtype");
}

inline const int64_t* integers(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

}  // namespace
