#pragma once
// torch's tensors by DLPack's C exchange API (dmlc/dlpack 1.3), which is the same for every version of torch from 2.11 on.
// A look at one takes some nanoseconds where each of Python's methods takes fifty, and a new one takes no dispatcher.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <ATen/dlpack.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

// Finds torch's functions. False: Python's error says why.
bool find_torch();

// What a tensor is, while somebody holds it.
class View {
 public:
  View() = default;
  View(const View&) = delete;
  ~View() { Py_XDECREF(copy_); }

  bool read(PyObject* tensor);             // false: Python's error says why
  bool read_contiguous(PyObject* tensor);  // a copy of one with gaps

  uint8_t* data() const { return static_cast<uint8_t*>(t_.data) + t_.byte_offset; }
  int num_dims() const { return t_.ndim; }
  int64_t size(int dim) const { return t_.shape[dim]; }
  uint64_t items(int from, int to) const;  // of dims [from, to)
  uint64_t items() const { return items(0, t_.ndim); }
  uint64_t item_bytes() const { return (uint64_t(t_.dtype.bits) * t_.dtype.lanes + 7) / 8; }
  uint64_t bytes() const { return items() * item_bytes(); }
  DLDataType dtype() const { return t_.dtype; }
  bool is_contiguous() const;  // and on the CPU

 private:
  DLTensor t_;
  PyObject* copy_ = nullptr;
};

// A new contiguous tensor like `like`, with `size` at `dim`.
class Result {
 public:
  Result(const View& like, int dim, int64_t size);
  uint8_t* data() const { return static_cast<uint8_t*>(block_->dl_tensor.data); }
  PyObject* release();  // null: Python's error says why

 private:
  struct Free {
    void operator()(DLManagedTensorVersioned* block) const { std::free(block->manager_ctx); }
  };
  std::unique_ptr<DLManagedTensorVersioned, Free> block_;
};
