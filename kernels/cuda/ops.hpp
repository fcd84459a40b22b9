// What the ops share that offer the CUDA kernels to torch through its stable ABI: arguments are checked one by one,
// then the kernel is launched on torch's stream.
//
// The library needs nothing of torch's CUDA libraries and so links and loads with a torch for CPUs too; there every op
// refuses its first tensor. What lies in device memory isn't looked at: block tables, slots and lists of work are the
// caller's word.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Registers what `implement(library)` names. The CPU key too, so that a tensor on the CPU is refused by name.
#define ONEMESH_CUDA_IMPL                                            \
  STABLE_TORCH_LIBRARY_IMPL(onemesh_cuda, CUDA, m) { implement(m); } \
  STABLE_TORCH_LIBRARY_IMPL(onemesh_cuda, CPU, m) { implement(m); }

namespace {

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    default: return "int64";
  }
}

// An op's arguments, checked one by one; the first tensor decides device and dtype.
class Call {
 public:
  Call(const char* op, const char* name, const Tensor& first) : op_(op), first_name_(name), first_(first) {
    check_device(name, first);
    dtype();
  }

  int32_t dtype() const {
    switch (first_.scalar_type()) {
      case ScalarType::Float: return FLOAT32;
      case ScalarType::Half: return FLOAT16;
      case ScalarType::BFloat16: return BFLOAT16;
      default: STD_TORCH_CHECK(false, op_, ": ", first_name_, " must be float32, float16 or bfloat16"); return 0;
    }
  }

  // Elements of the first tensor's type; rows may have gaps where `gaps`.
  const void* floats(const char* name, const Tensor& x, int64_t dims, bool gaps = false) const {
    check(name, x, dims, gaps);
    STD_TORCH_CHECK(x.scalar_type() == first_.scalar_type(), op_, ": ", name, " has another dtype than ", first_name_);
    return x.const_data_ptr();
  }

  template <class T>
  const T* typed(const char* name, const Tensor& x, int64_t dims, ScalarType type) const {
    check(name, x, dims, false);
    STD_TORCH_CHECK(x.scalar_type() == type, op_, ": ", name, " must be ", name_of(type));
    return static_cast<const T*>(x.const_data_ptr());
  }
  // A result that is there already: in float32 or of the first tensor's type.
  int32_t sum(const char* name, const Tensor& x, int64_t dims) const {
    check(name, x, dims, false);
    if (x.scalar_type() == ScalarType::Float) return FLOAT32;
    STD_TORCH_CHECK(x.scalar_type() == first_.scalar_type(), op_, ": ", name, " must be float32 or of the dtype of ",
                    first_name_);
    return dtype();
  }
  const float* angles(const char* name, const Tensor& x) const { return typed<float>(name, x, 2, ScalarType::Float); }
  const int64_t* longs(const char* name, const Tensor& x, int64_t dims) const {
    return typed<int64_t>(name, x, dims, ScalarType::Long);
  }

  void size(const char* name, const Tensor& x, int64_t dim, int64_t wanted) const {
    STD_TORCH_CHECK(x.size(dim) == wanted, op_, ": ", name, " has size ", x.size(dim), " in dim ", dim, ", not ",
                    wanted);
  }

  void shape(const char* name, const Tensor& x, std::initializer_list<int64_t> wanted) const {
    int64_t dim = 0;
    for (const int64_t one : wanted) size(name, x, dim++, one);
  }

  template <class... Parts>
  void check_that(bool holds, const Parts&... message) const {
    STD_TORCH_CHECK(holds, op_, ": ", message...);
  }

  template <class Args>
  void run(int (*launcher)(const Args*, void*), const Args& args) const {
#ifdef ONEMESH_CUDA_ON_HOST
    const int error = launcher(&args, nullptr);
#else
    const auto device = first_.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const int error = launcher(&args, torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#endif
    STD_TORCH_CHECK(error == 0, op_, ": no kernel for this shape, or it didn't start: cudaError ", error);
  }

 private:
  void check_device(const char* name, const Tensor& x) const {
#ifndef ONEMESH_CUDA_ON_HOST
    STD_TORCH_CHECK(x.is_cuda(), op_, ": ", name, " must be on a CUDA device");
    STD_TORCH_CHECK(x.get_device_index() == first_.get_device_index(), op_, ": ", name, " is on cuda:",
                    x.get_device_index(), ", ", first_name_, " on cuda:", first_.get_device_index());
#endif
  }
  void check(const char* name, const Tensor& x, int64_t dims, bool gaps) const {
    check_device(name, x);
    STD_TORCH_CHECK(x.dim() == dims, op_, ": ", name, " has ", x.dim(), " dimensions, not ", dims);
    if (!gaps) {
      STD_TORCH_CHECK(x.is_contiguous(), op_, ": ", name, " is not contiguous");
      return;
    }
    int64_t inner = 1;  // all but the first dim
    for (int64_t d = dims - 1; d > 0; --d) {
      STD_TORCH_CHECK(x.size(d) == 1 || x.stride(d) == inner, op_, ": a row of ", name, " is not contiguous");
      inner *= x.size(d);
    }
  }

  const char *op_, *first_name_;
  const Tensor& first_;
};

}  // namespace
