// Products of the few rows of one query with keys and values that are read where they lie.
//
// The chains are those of attention.h's tiles, so the bits are too; but nothing is packed: W keys are transposed in
// registers, and values come as they are.
#pragma once
#include <type_traits>

#include "attention.h"

namespace {

#if defined(__AVX512F__)
constexpr int FEW_ROWS = 9;  // sums in registers beside W transposed keys
#else
constexpr int FEW_ROWS = ROWS;
#endif
template <int N>
using Number = std::integral_constant<int, N>;
constexpr int RUN = 16;  // keys, or values, of a step
// Steps from prefetching to reading, and from prefetching once more; which rows are: those of more than ONCE lines. Where
// more is computed for a line than of pairs, further ahead and twice for short rows costs more than it brings.
template <class U>
struct Ahead {
  static constexpr bool PAIRS = U::PER_UNIT == 2;
  static constexpr int FAR = PAIRS ? 9 : 5, SOON = PAIRS ? 3 : 2, ONCE = PAIRS ? 0 : 2;
};
static_assert(RUN % W == 0 && KEY_BLOCK % RUN == 0);

// The lines of some rows, to be prefetched in the order of memory: in another one it takes twice as long. They come one
// by one between the multiply-adds, as all at once they wait for each other, and what is computed for them. A processor
// drops a prefetch while as many lines as it can keep track of are under way, so lines are asked for once more, shortly
// before they are read.
template <class T, int LOCALITY = 3>
struct Lines {
  const T *from, *from_again = nullptr;
  const int64_t *rows, *rows_again;
  int64_t left, per_row, line = 0;
  // `count` rows of `size` elements
  Lines(const T* at, const int64_t* offsets, int64_t count, int64_t size)
      : from(at), rows(offsets), rows_again(offsets), per_row((size * int64_t(sizeof(T)) + 63) / 64) {
    left = count * per_row;
  }
  // `soon`: as many rows, or none
  void ask_again(const Lines& soon) {
    if (left == 0) *this = soon;
    else if (soon.left) from_again = soon.from, rows_again = soon.rows;
  }
  __attribute__((always_inline)) void next() {
    if (left == 0) return;
    __builtin_prefetch((const char*)(from + *rows) + 64 * line, 0, LOCALITY);
    if (from_again) __builtin_prefetch((const char*)(from_again + *rows_again) + 64 * line, 0, LOCALITY);
    --left;
    if (++line == per_row) line = 0, ++rows, ++rows_again;
  }
  void all() {
    asm volatile("");  // GCC takes a function that only prefetches for one without effect, and drops the calls
    while (left) next();
  }
};

// scores[r][key] = q[r] . key for the W keys that begin at these offsets.
template <class U, int R, class T>
inline void score_keys(float* scores, const float* q, int64_t q_row, const T* keys, const int64_t* offsets,
                       int64_t head_dim, Lines<T>& ahead) {
  const int64_t units = head_dim / U::PER_UNIT;
  vf sum[R];
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r) sum[r] = vf{};
  for (int64_t u = 0; u < units; u += W) {
    vf key[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) key[i] = load_units<U>(keys + offsets[i], u, head_dim);
    transpose(key);
    const auto add = [&](int i) {
      ahead.next();
#pragma GCC unroll 9
      for (int r = 0; r < R; ++r) sum[r] = U::multiply_add(key[i], q + r * q_row + u + i, sum[r]);
    };
    if (units - u >= W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) add(i);
    } else {
      for (int i = 0; i < units - u; ++i) add(i);
    }
  }
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r) store(scores + r * KEY_EXTENT, sum[r]);
}

// scores [rows][KEY_EXTENT] of RUN keys.
template <class U, int R = FEW_ROWS, class T>
inline void few_scores(int64_t rows, float* scores, const float* q, int64_t q_row, const T* keys,
                       const int64_t* offsets, int64_t head_dim, Lines<T>& ahead) {
  if constexpr (R > 0) {
    if (rows != R) return few_scores<U, R - 1>(rows, scores, q, q_row, keys, offsets, head_dim, ahead);
    for (int i = 0; i < RUN; i += W) score_keys<U, R>(scores + i, q, q_row, keys, offsets + i, head_dim, ahead);
  }
}

// V vectors, from element h on, of a unit of values: of one row, or of two side by side.
template <class U, int V, class T>
inline void load_values(vf (&x)[V], const T* values, const int64_t* offsets, int64_t h, int64_t head_dim) {
  if constexpr (U::PER_UNIT == 1) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load_units<U>(values + offsets[0], h + v * W, head_dim);
  } else {
#ifdef __AVX512BF16__
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 2) {
      const vf a = load_units<U>(values + offsets[0], (h + v * W) / 2, head_dim);
      const vf b = load_units<U>(values + offsets[1], (h + v * W) / 2, head_dim);
      x[v] = pairs_of<0>(a, b);
      if (v + 1 < V) x[v + 1] = pairs_of<1>(a, b);
    }
#endif
  }
}

// V vectors of outputs, new ones or those that are there, go on by `units` of weights x values.
template <class U, int R, int V, class T>
inline void add_values(float* out, int64_t width, bool is_new, const float* weights, const T* values,
                       const int64_t* offsets, int64_t units, int64_t h, int64_t head_dim, Lines<T>& ahead) {
  vf sum[R][V];
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = is_new ? vf{} : load(out + r * width + h + v * W);
  for (int64_t i = 0; i < units; ++i) {
    vf x[V];
    load_values<U>(x, values, offsets + i * U::PER_UNIT, h, head_dim);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) ahead.next();
#pragma GCC unroll 9
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = U::multiply_add(x[v], weights + r * KEY_EXTENT + i, sum[r][v]);
  }
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * width + h + v * W, sum[r][v]);
}

// out [rows][width] from at most RUN values; weights [rows][KEY_EXTENT].
template <class U, int R = FEW_ROWS, class T>
inline void few_outputs(int64_t rows, float* out, int64_t width, bool is_new, const float* weights, const T* values,
                        const int64_t* offsets, int64_t units, int64_t head_dim, Lines<T>& ahead) {
  if constexpr (R > 0) {
    if (rows != R)
      return few_outputs<U, R - 1>(rows, out, width, is_new, weights, values, offsets, units, head_dim, ahead);
    constexpr int V = R > ROWS ? 2 : COLUMNS;
    const auto add = [&](auto vecs, int64_t h) {
      add_values<U, R, vecs()>(out, width, is_new, weights, values, offsets, units, h, head_dim, ahead);
    };
    int64_t h = 0;
    for (; head_dim - h > (V - 1) * W; h += V * W) add(Number<V>(), h);
    const int64_t left = head_dim - h;
    if constexpr (V > 2) {
      if (left > 2 * W) add(Number<3>(), h);
      else if (left > W) add(Number<2>(), h);
    }
    if (left > 0 && left <= W) add(Number<1>(), h);
  }
}

}  // namespace
