// How the kernels over rows walk a row: whole vectors, then the rest of it.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace {

template <class T>
inline const T* row_of(const Rows& rows, int64_t row) {
  return (const T*)rows.data + row * rows.stride;
}

// f(i, n) for each vector of a row: n elements from i on, n = W but for the last one.
template <class F>
inline __attribute__((always_inline)) void each_vector(int64_t width, F f) {
  int64_t i = 0;
  for (; i + W <= width; i += W) f(i, W);
  if (i < width) f(i, int(width - i));
}

template <class T>
inline __attribute__((always_inline)) vf read(const T* p, int n) {
  return n == W ? load(p) : load_some(p, n);
}
template <class T>
inline __attribute__((always_inline)) void write(T* p, vf x, int n) {
  if (n == W) store(p, x);
  else store_some(p, x, n);
}

}  // namespace
