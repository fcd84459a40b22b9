// The library as a Python module (kernels/_shm.pyi), for every version from 3.11 on: only the limited API is used.
//
// Calls take integers, addresses among them, and let go of Python's lock. They cost a tenth of a microsecond, a third of
// what ctypes takes.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cerrno>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "collectives.h"

namespace {

struct Object {
  PyObject_HEAD
  Arena* arena;
};

Arena* arena_of(PyObject* self) { return reinterpret_cast<Object*>(self)->arena; }

template <class F>
auto without_lock(const F& f) {
  PyThreadState* const state = PyEval_SaveThread();
  const auto result = f();
  PyEval_RestoreThread(state);
  return result;
}

bool read(PyObject* from, uint64_t& to, const Arena&) {
  to = PyLong_AsUnsignedLongLong(from);
  return to != uint64_t(-1) || PyErr_Occurred() == nullptr;
}

bool read(PyObject* from, int& to, const Arena&) {
  const long value = PyLong_AsLong(from);
  to = int(value);
  return value != -1 || PyErr_Occurred() == nullptr;
}

template <class T>
bool read(PyObject* from, T*& to, const Arena&) {
  to = static_cast<T*>(PyLong_AsVoidPtr(from));
  return to != nullptr || PyErr_Occurred() == nullptr;  // an empty tensor is nowhere
}

struct PerRank {  // a list or tuple with one number for each rank
  std::vector<uint64_t> numbers;
  operator const uint64_t*() const { return numbers.data(); }
};

bool read(PyObject* from, PerRank& to, const Arena& arena) {
  const Py_ssize_t count = PySequence_Size(from);
  if (count != arena.n) {
    if (count >= 0) PyErr_Format(PyExc_ValueError, "%zd sizes for %d ranks; give one for each", count, arena.n);
    return false;
  }
  to.numbers.resize(count);
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject* const item = PySequence_GetItem(from, i);
    const bool is_read = item != nullptr && read(item, to.numbers[i], arena);
    Py_XDECREF(item);
    if (!is_read) return false;
  }
  return true;
}

template <class T>
struct Read {
  using type = T;
};

template <>
struct Read<const uint64_t*> {
  using type = PerRank;
};

// A function of collectives.h as a method; what it returns is the method's result.
template <auto function>
struct Method;

template <class... Ts, int (*function)(Arena*, Ts...)>
struct Method<function> {
  static PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t count) {
    if (count != sizeof...(Ts)) {
      return PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", count, Py_ssize_t(sizeof...(Ts)));
    }
    return call(arena_of(self), values, std::index_sequence_for<Ts...>());
  }

 private:
  template <size_t... I>
  static PyObject* call(Arena* arena, [[maybe_unused]] PyObject* const* values, std::index_sequence<I...>) {
    std::tuple<typename Read<Ts>::type...> arguments;
    if (!(read(values[I], std::get<I>(arguments), *arena) && ...)) return nullptr;
    return PyLong_FromLong(without_lock([&] { return function(arena, std::get<I>(arguments)...); }));
  }
};

template <auto function>
PyMethodDef method(const char* name) {
  const auto call = static_cast<PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t)>(Method<function>::call);
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};
}

PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject*) {
  int fd, rank, size;
  double timeout_s;
  if (!PyArg_ParseTuple(arguments, "iiid", &fd, &rank, &size, &timeout_s)) return nullptr;
  if (rank < 0 || rank >= size) {
    return PyErr_Format(PyExc_ValueError, "place=%d is none of %d ranks; use 0 to size - 1", rank, size);
  }
  auto arena = std::make_unique<Arena>(fd, rank, size, timeout_s);
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
  PerRank read_pids;
  if (!PyArg_ParseTuple(arguments, "Op", &pids, &crowded)) return nullptr;
  if (!read(pids, read_pids, *arena_of(self))) return nullptr;
  const std::vector<int> numbers(read_pids.numbers.begin(), read_pids.numbers.end());
  if (!arena_of(self)->watch(numbers.data(), crowded != 0)) return PyErr_SetFromErrno(PyExc_OSError);
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* lost(PyObject* self, PyObject*) { return PyLong_FromLong(arena_of(self)->lost()); }

PyObject* direct(PyObject* self, PyObject*) {
  return Py_BuildValue("NN", PyLong_FromVoidPtr(reinterpret_cast<void*>(&all_reduce)),
                       PyLong_FromVoidPtr(arena_of(self)));
}

PyMethodDef methods[] = {
    method<all_reduce>("all_reduce"),
    method<reduce_scatter>("reduce_scatter"),
    method<all_gather>("all_gather"),
    method<broadcast>("broadcast"),
    method<barrier>("barrier"),
    method<send>("send"),
    method<receive>("receive"),
    {"watch", watch, METH_VARARGS, nullptr},
    {"lost", lost, METH_NOARGS, nullptr},
    {"direct", direct, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"kernels._shm.Arena", sizeof(Object), 0, Py_TPFLAGS_DEFAULT, slots};

int add_types(PyObject* module) {
  PyObject* const type = PyType_FromSpec(&spec);
  const int failed = type == nullptr ? -1 : PyModule_AddObjectRef(module, "Arena", type);
  Py_XDECREF(type);
  return failed;
}

PyModuleDef_Slot steps[] = {{Py_mod_exec, reinterpret_cast<void*>(add_types)}, {0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_shm", nullptr, 0, nullptr, steps, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__shm() { return PyModuleDef_Init(&definition); }
