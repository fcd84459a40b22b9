// y = x w^T (+ bias) with packed weights, compiled once per instruction set.
//
// A weight [N, K] is packed into panels of PANEL rows of it (columns of y). A unit is 4 bytes along K: one float32, or
// two bfloat16. Within a panel the units of all its columns stand together:
//
//   packed[panel][unit][column]     panel = n / PANEL, column = n % PANEL, unit = k or k / 2; zeros past N and K
//
// An element of y is one chain of fused multiply-adds with rising k, whatever else is computed (`product` below is the
// definition): so neither the number of rows, nor the place of a row, nor the threads change a bit of it.
#include "kernels.h"
#include "vec.h"

namespace {

constexpr int VECS = PANEL / W;

struct Float32 {
  typedef float Element;
  static constexpr int PER_UNIT = 1;
  static vf product(vf w, uint32_t x, vf sum) {
    float f;
    memcpy(&f, &x, 4);
    return fma(w, splat(f), sum);
  }
};

struct Bfloat16 {
  typedef bf16 Element;
  static constexpr int PER_UNIT = 2;
  static vf product(vf w, uint32_t x, vf sum) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
#else  // the same order as that instruction: the odd element first
    const vu pair = (vu)w;
    float low, high;
    const uint32_t first = x << 16, second = x & 0xffff0000u;
    memcpy(&low, &first, 4);
    memcpy(&high, &second, 4);
    return fma(bits(pair << 16), splat(low), fma(bits(pair & 0xffff0000u), splat(high), sum));
#endif
  }
};

template <class T>
inline uint32_t unit(const typename T::Element* row, int64_t u) {
  uint32_t x;
  memcpy(&x, row + u * T::PER_UNIT, 4);
  return x;
}

// R rows times V vectors of columns over all units. `tail`: x of the last unit where K is odd.
template <class T, int R, int V>
void tile(const LinearArgs& a, const float* panel, const float* next, int64_t row, int64_t column, int64_t left) {
  typedef typename T::Element E;
  const E* x = (const E*)a.x + row * a.in_width;
  vf sum[R][V] = {};
  const int64_t whole = a.in_width / T::PER_UNIT;
  for (int64_t u = 0; u < whole; ++u) {
    vf w[V];
#pragma GCC unroll 12
    for (int v = 0; v < V; ++v) w[v] = load(panel + u * PANEL + v * W);
    if (next) {
#pragma GCC unroll 12
      for (int v = 0; v < V * W; v += 16) __builtin_prefetch(next + u * PANEL + v);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const uint32_t one = unit<T>(x + r * a.in_width, u);
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) sum[r][v] = T::product(w[v], one, sum[r][v]);
    }
  }
  if (whole * T::PER_UNIT < a.in_width) {
    for (int r = 0; r < R; ++r) {
      const uint32_t one = (uint16_t)x[r * a.in_width + a.in_width - 1];  // the pair's second is zero, as in the weight
      for (int v = 0; v < V; ++v) sum[r][v] = T::product(load(panel + whole * PANEL + v * W), one, sum[r][v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    const int64_t n = left - v * W;
    if (n <= 0) break;
    const int some = n < W ? n : W;
    const vf bias = a.bias ? load_some((const E*)a.bias + column + v * W, some) : vf{};
    for (int r = 0; r < R; ++r) {
      E* to = (E*)a.out + (row + r) * a.out_width + column + v * W;
      const vf y = a.bias ? sum[r][v] + bias : sum[r][v];
      if (some == W) store(to, y);
      else store_some(to, y, some);
    }
  }
}

// As many rows at a time as registers hold, and as many vectors of a panel.
#if defined(__AVX512F__)
constexpr int ROWS = 9, COLUMNS = 3;
#elif defined(__AVX2__)
constexpr int ROWS = 4, COLUMNS = 3;
#else
constexpr int ROWS = 4, COLUMNS = 3;
#endif

template <class T, int R>
void rows(const LinearArgs& a, const float* panel, const float* next, int64_t row, int64_t column) {
  for (int v = 0; v < VECS; v += COLUMNS) {
    const int64_t first = column + v * W;
    if (first >= a.out_width) break;
    tile<T, R, COLUMNS>(a, panel + v * W, next ? next + v * W : nullptr, row, first, a.out_width - first);
  }
}

template <class T, int R>
void some_rows(int64_t count, const LinearArgs& a, const float* panel, const float* next, int64_t row, int64_t column) {
  if constexpr (R > 0) {
    if (count == R) rows<T, R>(a, panel, next, row, column);
    else some_rows<T, R - 1>(count, a, panel, next, row, column);
  }
}

template <class T>
void linear(const LinearArgs& a, int64_t first_panel, int64_t last_panel, int64_t first_row, int64_t last_row) {
  const int64_t units = (a.in_width + T::PER_UNIT - 1) / T::PER_UNIT, count = last_row - first_row;
  const int64_t groups = (count + ROWS - 1) / ROWS;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const float* panel = (const float*)a.weight + p * units * PANEL;
    const float* next = p + 1 < last_panel ? panel + units * PANEL : nullptr;
    for (int64_t g = 0; g < groups; ++g) {  // balanced: 10 rows are 5 + 5
      const int64_t row = first_row + count * g / groups, end = first_row + count * (g + 1) / groups;
      some_rows<T, ROWS>(end - row, a, panel, g == 0 ? next : nullptr, row, p * PANEL);
    }
  }
}

template <class E>
void pack(E* packed, const E* w, int64_t out_width, int64_t in_width, int64_t first_panel, int64_t last_panel) {
  constexpr int64_t per_unit = 4 / sizeof(E);
  const int64_t units = (in_width + per_unit - 1) / per_unit;
  for (int64_t p = first_panel; p < last_panel; ++p)
    for (int64_t u = 0; u < units; ++u)
      for (int64_t c = 0; c < PANEL; ++c)
        for (int64_t i = 0; i < per_unit; ++i) {
          const int64_t n = p * PANEL + c, k = u * per_unit + i;
          packed[((p * units + u) * PANEL + c) * per_unit + i] = n < out_width && k < in_width ? w[n * in_width + k] : 0;
        }
}

template <class E>
void unpack(E* out, const E* packed, const int64_t* ids, int64_t in_width, int64_t first, int64_t last) {
  constexpr int64_t per_unit = 4 / sizeof(E);
  const int64_t units = (in_width + per_unit - 1) / per_unit;
  for (int64_t t = first; t < last; ++t) {
    const E* from = packed + (ids[t] / PANEL * units * PANEL + ids[t] % PANEL) * per_unit;
    for (int64_t k = 0; k < in_width; ++k) out[t * in_width + k] = from[k / per_unit * PANEL * per_unit + k % per_unit];
  }
}

}  // namespace

KERNEL(linear)(const LinearArgs& args, int64_t first_panel, int64_t last_panel, int64_t first_row, int64_t last_row,
                bool is_bf16) {
  if (is_bf16)
    linear<Bfloat16>(args, first_panel, last_panel, first_row, last_row);
  else
    linear<Float32>(args, first_panel, last_panel, first_row, last_row);
}

KERNEL(pack)(void* packed, const void* w, int64_t out_width, int64_t in_width, int64_t first_panel, int64_t last_panel,
              bool is_bf16) {
  if (is_bf16)
    pack((bf16*)packed, (const bf16*)w, out_width, in_width, first_panel, last_panel);
  else
    pack((float*)packed, (const float*)w, out_width, in_width, first_panel, last_panel);
}

KERNEL(unpack)(void* out, const void* packed, const int64_t* ids, int64_t in_width, int64_t first, int64_t last,
                bool is_bf16) {
  if (is_bf16)
    unpack((bf16*)out, (const bf16*)packed, ids, in_width, first, last);
  else
    unpack((float*)out, (const float*)packed, ids, in_width, first, last);
}
