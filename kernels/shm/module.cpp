// The library as a Python module (kernels/_shm.pyi), for every version from 3.11 on: only the limited API is used.
#include "tensor.h"

#include <cerrno>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "collectives.h"

namespace {

struct Object {
  PyObject_HEAD
  Arena* arena;
};

Arena* arena_of(PyObject* self) { return reinterpret_cast<Object*>(self)->arena; }

// What f returns; other threads of this rank run meanwhile.
template <class F>
auto without_lock(const F& f) {
  PyThreadState* const state = PyEval_SaveThread();
  const auto result = f();
  PyEval_RestoreThread(state);
  return result;
}

PyObject* unsuitable() { return PyLong_FromLong(UNSUITABLE); }

bool has(Py_ssize_t count, Py_ssize_t wanted) {
  if (count == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", count, wanted);
  return false;
}

bool read_below(PyObject* from, const char* what, int count, int& to) {
  const long value = PyLong_AsLong(from);
  if (value == -1 && PyErr_Occurred() != nullptr) return false;
  to = int(value);
  if (value >= 0 && value < count) return true;
  PyErr_Format(PyExc_ValueError, "%s=%ld is none of %d", what, value, count);
  return false;
}

// One number for each rank, from a list or tuple.
bool read(PyObject* from, int ranks, Numbers& to) {
  const Py_ssize_t count = PySequence_Size(from);
  if (count != ranks) {
    if (count >= 0) PyErr_Format(PyExc_ValueError, "%zd sizes for %d ranks; give one for each", count, ranks);
    return false;
  }
  for (int r = 0; r < ranks; r++) {
    PyObject* const item = PySequence_GetItem(from, r);
    if (item == nullptr) return false;
    to[r] = PyLong_AsUnsignedLongLong(item);
    Py_DECREF(item);
    if (to[r] == uint64_t(-1) && PyErr_Occurred() != nullptr) return false;
  }
  return true;
}

uint64_t sum(const Numbers& of, int ranks) { return std::accumulate(of.data(), of.data() + ranks, uint64_t(0)); }

bool is_length(const View& x, int dim, uint64_t wanted) {
  if (uint64_t(x.size(dim)) == wanted) return true;
  PyErr_Format(PyExc_ValueError, "dim %d of x has length %lld, not %llu as sizes say", dim, (long long)x.size(dim),
               (unsigned long long)wanted);
  return false;
}

// x's place among TYPES of reduce.cpp, times two, plus `maximum`; -1 for what can't be reduced.
int type_of(const View& x, bool maximum) {
  const DLDataType t = x.dtype();
  const auto is = [&](int code, int bits) { return t.code == code && t.bits == bits; };
  const int place = t.lanes != 1                              ? -1
                    : is(kDLFloat, 32)                        ? 0
                    : is(kDLFloat, 64)                        ? 1
                    : is(kDLBfloat, 16)                       ? 2
                    : is(kDLFloat, 16)                        ? 3
                    : is(kDLUInt, 8)                          ? 4
                    : is(kDLBool, 8) && maximum               ? 4
                    : is(kDLInt, 8)                           ? 5
                    : is(kDLInt, 16)                          ? 6
                    : is(kDLInt, 32)                          ? 7
                    : is(kDLInt, 64)                          ? 8
                                                              : -1;
  return place < 0 ? -1 : 2 * place + int(maximum);
}

PyObject* all_reduce_tensor(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  View x;
  int maximum;
  if (!has(count, 2) || !x.read(values[0]) || !read_below(values[1], "maximum", 2, maximum)) return nullptr;
  const int type = type_of(x, maximum);
  if (type < 0 || !x.is_contiguous()) return unsuitable();
  return PyLong_FromLong(without_lock([&] { return all_reduce(arena_of(self), x.data(), x.items(), type); }));
}

PyObject* reduce_scatter_tensor(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  Arena* const arena = arena_of(self);
  View x;
  Numbers sizes(arena->n);
  if (!has(count, 2) || !x.read_contiguous(values[0]) || !read(values[1], arena->n, sizes)) return nullptr;
  const int type = type_of(x, false);
  if (type < 0 || x.num_dims() == 0 || !x.is_contiguous()) return unsuitable();
  if (!is_length(x, 0, sum(sizes, arena->n))) return nullptr;
  Result out(x, 0, int64_t(sizes[arena->me]));
  const uint64_t row_bytes = x.items(1, x.num_dims()) * x.item_bytes();
  const int error =
      without_lock([&] { return reduce_scatter(arena, x.data(), out.data(), sizes.data(), row_bytes, type); });
  return error == OK ? out.release() : PyLong_FromLong(error);
}

PyObject* all_gather_tensor(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  Arena* const arena = arena_of(self);
  View x;
  int dim;
  Numbers sizes(arena->n);
  if (!has(count, 3) || !x.read_contiguous(values[0]) || !read(values[1], arena->n, sizes)) return nullptr;
  if (!read_below(values[2], "dim", x.num_dims(), dim) || !is_length(x, dim, sizes[arena->me])) return nullptr;
  if (!x.is_contiguous()) return unsuitable();
  Result out(x, dim, int64_t(sum(sizes, arena->n)));
  const uint64_t item_bytes = x.items(dim + 1, x.num_dims()) * x.item_bytes(), rows = x.items(0, dim);
  const int error =
      without_lock([&] { return all_gather(arena, x.data(), out.data(), sizes.data(), item_bytes, rows); });
  return error == OK ? out.release() : PyLong_FromLong(error);
}

// Of a whole tensor from one rank to others.
template <auto function>
PyObject* move_tensor(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  View x;
  int rank;
  if (!has(count, 2) || !x.read(values[0])) return nullptr;
  if (!read_below(values[1], "rank", arena_of(self)->n, rank)) return nullptr;
  if (!x.is_contiguous()) return unsuitable();
  return PyLong_FromLong(without_lock([&] { return function(arena_of(self), x.data(), x.bytes(), rank); }));
}

PyObject* wait_for_all(PyObject* self, PyObject*) {
  return PyLong_FromLong(without_lock([&] { return barrier(arena_of(self)); }));
}

PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject*) {
  int fd, place, ranks;
  double timeout_s;
  if (!PyArg_ParseTuple(arguments, "iiid", &fd, &place, &ranks, &timeout_s)) return nullptr;
  if (place < 0 || place >= ranks) return PyErr_Format(PyExc_ValueError, "place=%d is none of %d", place, ranks);
  auto arena = std::make_unique<Arena>(fd, place, ranks, timeout_s);
  if (!without_lock([&] { return arena->open(); })) return PyErr_SetFromErrno(PyExc_OSError);
  PyObject* const self = PyType_GenericAlloc(type, 0);
  if (self != nullptr) reinterpret_cast<Object*>(self)->arena = arena.release();
  return self;
}

void destroy(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete arena_of(self);
  PyObject_Free(self);
  Py_DECREF(type);
}

PyObject* watch(PyObject* self, PyObject* arguments) {
  PyObject* pids;
  int crowded;
  Numbers numbers(arena_of(self)->n);
  if (!PyArg_ParseTuple(arguments, "Op", &pids, &crowded)) return nullptr;
  if (!read(pids, arena_of(self)->n, numbers)) return nullptr;
  const std::vector<int> of_ranks(numbers.data(), numbers.data() + arena_of(self)->n);
  if (!arena_of(self)->watch(of_ranks.data(), crowded != 0)) return PyErr_SetFromErrno(PyExc_OSError);
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* lost(PyObject* self, PyObject*) { return PyLong_FromLong(arena_of(self)->lost()); }

PyObject* direct(PyObject* self, PyObject* tensor) {
  View x;
  if (!x.read(tensor)) return nullptr;
  const int type = type_of(x, false);
  if (type < 0 || !x.is_contiguous()) return unsuitable();
  return Py_BuildValue("NNi", PyLong_FromVoidPtr(reinterpret_cast<void*>(&all_reduce)),
                       PyLong_FromVoidPtr(arena_of(self)), type);
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

template <Fast function>
PyObject* guarded(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  try {
    return function(self, values, count);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

template <Fast function>
PyMethodDef fast(const char* name) {
  const auto plain = reinterpret_cast<void (*)()>(static_cast<Fast>(guarded<function>));
  return {name, reinterpret_cast<PyCFunction>(plain), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    fast<all_reduce_tensor>("all_reduce"),
    fast<reduce_scatter_tensor>("reduce_scatter"),
    fast<all_gather_tensor>("all_gather"),
    fast<move_tensor<broadcast>>("broadcast"),
    fast<move_tensor<send>>("send"),
    fast<move_tensor<receive>>("receive"),
    {"barrier", wait_for_all, METH_NOARGS, nullptr},
    {"watch", watch, METH_VARARGS, nullptr},
    {"lost", lost, METH_NOARGS, nullptr},
    {"direct", direct, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"kernels._shm.Arena", sizeof(Object), 0, Py_TPFLAGS_DEFAULT, slots};

int load(PyObject* module) {
  if (!find_torch()) return -1;
  PyObject* const type = PyType_FromSpec(&spec);
  const int failed = type == nullptr ? -1 : PyModule_AddObjectRef(module, "Arena", type);
  Py_XDECREF(type);
  return failed;
}

PyModuleDef_Slot steps[] = {{Py_mod_exec, reinterpret_cast<void*>(load)}, {0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_shm", nullptr, 0, nullptr, steps, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__shm() { return PyModuleDef_Init(&definition); }
