// Rows of tensors for the ops over rows, and how many of them a thread should get.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "call.h"
#include "checks.h"
#include "kernels.h"

namespace {

inline Tensor copied(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(!is_recording(), op, ": ", name, " lies scattered, and a copy can't be recorded");
  return torch::stable::contiguous(x);
}

// x as rows: as it is if only its first dim has an odd stride (a part of a wider matrix), else a dense copy.
inline Tensor as_rows(const char* op, const char* name, const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.dim() == dims, op, ": ", name, " has ", x.dim(), " dimensions, not ", dims);
  STD_TORCH_CHECK(is_bf16(x) || x.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32 or bfloat16");
  int64_t dense = 1;
  for (int64_t i = dims - 1; i > 0; --i) {
    if (x.size(i) != 1 && x.stride(i) != dense) return copied(op, name, x);
    dense *= x.size(i);
  }
  return x;
}

// x without gaps: itself or a copy.
inline Tensor dense(const char* op, const char* name, const Tensor& x, int64_t dims, ScalarType type) {
  STD_TORCH_CHECK(x.dim() == dims, op, ": ", name, " has ", x.dim(), " dimensions, not ", dims);
  STD_TORCH_CHECK(x.scalar_type() == type, op, ": ", name, " has the wrong dtype");
  return x.is_contiguous() ? x : copied(op, name, x);
}

inline Rows rows_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0)}; }

inline void check_shape(const char* op, const char* name, const Tensor& x, const char* other_name, const Tensor& other) {
  check_same(op, name, x, other);
  bool same = x.dim() == other.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == other.size(i);
  STD_TORCH_CHECK(same, op, ": ", other_name, " and ", name, " differ in shape");
}

// f(first, last) for parts of `rows` rows of `width` elements, each worth a thread.
template <class F>
void share_rows(int64_t rows, int64_t width, const F& f) {
  const int64_t threads = threads_for(rows, width);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    f(Share(rows, first, threads).first, Share(rows, last, threads).first);
  });
}

}  // namespace
