// Products of the few rows of one query with keys and values that are read where they lie.
//
// The chains are those of attention.h's tiles, so the bits are too; but nothing is packed: W keys are transposed in
// registers, and values come as they are.
#pragma once
#include "attention.h"

namespace {

#if defined(__AVX512F__)
constexpr int FEW_ROWS = 9;  // sums in registers beside W transposed keys
#else
constexpr int FEW_ROWS = ROWS;
#endif
constexpr int RUN = 16;   // keys, or values, of a step
constexpr int AHEAD = 5;  // steps from prefetching to reading; 3 to 8 take the same time
static_assert(RUN % W == 0 && KEY_BLOCK % RUN == 0);

// scores[r][key] = q[r] . key for the W keys that begin at these offsets.
template <class U, int R, class T>
inline void score_keys(float* scores, const float* q, int64_t q_row, const T* keys, const int64_t* offsets,
                       int64_t head_dim) {
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
  for (int r = 0; r < R; ++r) store(scores + r * KEY_BLOCK, sum[r]);
}

// scores [rows][KEY_BLOCK] of RUN keys.
template <class U, int R = FEW_ROWS, class T>
inline void few_scores(int64_t rows, float* scores, const float* q, int64_t q_row, const T* keys,
                       const int64_t* offsets, int64_t head_dim) {
  if constexpr (R > 0) {
    if (rows != R) return few_scores<U, R - 1>(rows, scores, q, q_row, keys, offsets, head_dim);
    for (int i = 0; i < RUN; i += W) score_keys<U, R>(scores + i, q, q_row, keys, offsets + i, head_dim);
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

// V vectors of outputs, times `keep` of their row unless that is null, go on by `units` of weights x values.
template <class U, int R, int V, class T>
inline void add_values(float* out, int64_t width, const float* keep, const float* weights, const T* values,
                       const int64_t* offsets, int64_t units, int64_t h, int64_t head_dim) {
  vf sum[R][V];
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[r][v] = load(out + r * width + h + v * W);
      if (keep) sum[r][v] *= keep[r];
    }
  for (int64_t i = 0; i < units; ++i) {
    vf x[V];
    load_values<U>(x, values, offsets + i * U::PER_UNIT, h, head_dim);
#pragma GCC unroll 9
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = U::multiply_add(x[v], weights + r * KEY_BLOCK + i, sum[r][v]);
  }
#pragma GCC unroll 9
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * width + h + v * W, sum[r][v]);
}

// out [rows][width] from at most RUN values; weights [rows][KEY_BLOCK].
template <class U, int R = FEW_ROWS, class T>
inline void few_outputs(int64_t rows, float* out, int64_t width, const float* keep, const float* weights,
                        const T* values, const int64_t* offsets, int64_t units, int64_t head_dim) {
  if constexpr (R > 0) {
    if (rows != R)
      return few_outputs<U, R - 1>(rows, out, width, keep, weights, values, offsets, units, head_dim);
    constexpr int V = R > ROWS ? 2 : COLUMNS;
    int64_t h = 0;
    for (; head_dim - h > (V - 1) * W; h += V * W)
      add_values<U, R, V>(out, width, keep, weights, values, offsets, units, h, head_dim);
    const int64_t left = head_dim - h;
    if constexpr (V > 2) {
      if (left > 2 * W) add_values<U, R, 3>(out, width, keep, weights, values, offsets, units, h, head_dim);
      else if (left > W) add_values<U, R, 2>(out, width, keep, weights, values, offsets, units, h, head_dim);
    }
    if (left > 0 && left <= W) add_values<U, R, 1>(out, width, keep, weights, values, offsets, units, h, head_dim);
  }
}

}  // namespace
