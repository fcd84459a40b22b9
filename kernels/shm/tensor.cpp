#include "tensor.h"

#include <new>

namespace {

constexpr size_t LINE = 64;
constexpr char NAME[] = "dlpack_exchange_api";

const DLPackExchangeAPI* torch = nullptr;
PyTypeObject* tensor_type = nullptr;

}  // namespace

bool find_torch() {
  PyObject* const module = PyImport_ImportModule("torch");
  PyObject* const type = module == nullptr ? nullptr : PyObject_GetAttrString(module, "Tensor");
  PyObject* const capsule = type == nullptr ? nullptr : PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  if (capsule != nullptr) torch = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, NAME));
  tensor_type = reinterpret_cast<PyTypeObject*>(type);  // it and torch's functions stay
  Py_XDECREF(capsule);
  Py_XDECREF(module);
  if (torch != nullptr && torch->header.version.major == DLPACK_MAJOR_VERSION &&
      torch->dltensor_from_py_object_no_sync != nullptr) {
    return true;
  }
  PyErr_SetString(PyExc_ImportError, "torch has no exchange API of DLPack 1; it takes torch 2.11 or newer");
  return false;
}

bool View::read(PyObject* tensor) {
  if (!PyObject_TypeCheck(tensor, tensor_type)) {
    PyErr_Format(PyExc_TypeError, "x=%R is no tensor", tensor);
    return false;
  }
  return torch->dltensor_from_py_object_no_sync(tensor, &t_) == 0;
}

bool View::read_contiguous(PyObject* tensor) {
  if (!read(tensor)) return false;
  if (is_contiguous() || t_.device.device_type != kDLCPU) return true;
  copy_ = PyObject_CallMethod(tensor, "contiguous", nullptr);
  return copy_ != nullptr && read(copy_);
}

uint64_t View::items(int from, int to) const {
  uint64_t product = 1;
  for (int dim = from; dim < to; dim++) product *= uint64_t(t_.shape[dim]);
  return product;
}

bool View::is_contiguous() const {
  if (t_.device.device_type != kDLCPU) return false;
  int64_t stride = 1;
  bool in_order = true;
  for (int dim = t_.ndim - 1; dim >= 0; dim--) {
    if (t_.shape[dim] == 0) return true;
    in_order = in_order && (t_.shape[dim] == 1 || t_.strides[dim] == stride);
    stride *= t_.shape[dim];
  }
  return in_order;
}

Result::Result(const View& like, int dim, int64_t size) {
  const int n = like.num_dims();
  const size_t head = (sizeof(DLManagedTensorVersioned) + 2 * n * sizeof(int64_t) + LINE - 1) / LINE * LINE;
  const uint64_t bytes = like.items(0, dim) * uint64_t(size) * like.items(dim + 1, n) * like.item_bytes();
  void* const memory = std::malloc(LINE + head + bytes);  // aligned_alloc takes the long way through its heap each time
  if (memory == nullptr) throw std::bad_alloc();
  const uint64_t at = (reinterpret_cast<uint64_t>(memory) + LINE - 1) / LINE * LINE;
  block_.reset(new (reinterpret_cast<void*>(at)) DLManagedTensorVersioned{});
  block_->manager_ctx = memory;
  const auto shape = reinterpret_cast<int64_t*>(block_.get() + 1), strides = shape + n;
  int64_t stride = 1;
  for (int i = n - 1; i >= 0; i--) {
    shape[i] = i == dim ? size : like.size(i);
    strides[i] = stride;
    stride *= shape[i];
  }
  block_->version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  block_->deleter = [](DLManagedTensorVersioned* self) { std::free(self->manager_ctx); };
  block_->dl_tensor = {reinterpret_cast<uint8_t*>(at + head), {kDLCPU, 0}, n, like.dtype(), shape, strides, 0};
}

PyObject* Result::release() {
  void* tensor = nullptr;
  if (torch->managed_tensor_to_py_object_no_sync(block_.get(), &tensor) != 0) return nullptr;
  block_.release();
  return static_cast<PyObject*>(tensor);
}
