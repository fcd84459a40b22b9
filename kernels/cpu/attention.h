// Tiles that the attention kernels share: products, exp2, scores, and blocks of keys and values packed for them.
//
// A unit is 4 bytes of a chain of multiply-adds: one float32, or a pair of bfloat16 where the processor multiplies those
// (elsewhere bfloat16 becomes float32 when it is packed). Every element of a product is one chain with rising units, so
// its bits depend neither on the tile it is computed in nor on what else is in that tile.
#pragma once
#include "attention_args.h"
#include "vec.h"

namespace {

struct Floats {
  static constexpr int PER_UNIT = 1;
  static vf multiply_add(vf b, vf a, vf sum) { return fma(b, a, sum); }
  static vf multiply_add(vf b, const float* a, vf sum) { return fma(b, splat(*a), sum); }
};
#ifdef __AVX512BF16__
struct Pairs {
  static constexpr int PER_UNIT = 2;
  static vf multiply_add(vf b, vf a, vf sum) { return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)a); }
  static vf multiply_add(vf b, const float* a, vf sum) {
    int32_t pair;
    memcpy(&pair, a, 4);
    return multiply_add(b, (vf)_mm512_set1_epi32(pair), sum);
  }
};
#endif

template <class T>
struct Units { typedef Floats Type; };
#ifdef __AVX512BF16__
template <>
struct Units<bf16> { typedef Pairs Type; };
#endif

#if defined(__AVX512F__)
constexpr int ROWS = 6, COLUMNS = 4;  // of a tile of sums in registers; columns in vectors
#else
constexpr int ROWS = 6, COLUMNS = 2;
#endif
constexpr int KEY_VECS = KEY_BLOCK / W;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr float INF = __builtin_inff();

inline vi lanes() {
  vi i;
  for (int l = 0; l < W; ++l) i[l] = l;
  return i;
}

// a where it is larger, else b: NaN in b stays.
inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}
inline float largest(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float most = x[0];
  for (int i = 1; i < W; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// 2^f for |f| <= 1/2, 1 at 0, by minimax polynomials: within 2 units in the last place of a float; within 3e-6, for
// what is rounded to bfloat16.
inline vf power(vf f) {
  vf y = splat(1.535336172e-04f);
  y = fma(y, f, splat(1.339887448e-03f));
  y = fma(y, f, splat(9.618437359e-03f));
  y = fma(y, f, splat(5.550332471e-02f));
  y = fma(y, f, splat(2.402264791e-01f));
  y = fma(y, f, splat(6.931472029e-01f));
  return fma(y, f, splat(1.0f));
}
inline vf rough_power(vf f) {
  vf y = splat(9.582852945e-03f);
  y = fma(y, f, splat(5.590642616e-02f));
  y = fma(y, f, splat(2.402409911e-01f));
  y = fma(y, f, splat(6.931241751e-01f));
  return fma(y, f, splat(1.0f));
}

// 2^x for x <= 127 as precise as the power, 0 far below; NaN stays.
template <vf (*POWER)(vf) = power>
inline vf exp2(vf x) {
#if defined(__AVX512F__)
  const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // x less the nearest integer
  return _mm512_scalef_ps(POWER(f), x - f);
#else
  const vi is_normal = ~(x < splat(-126.0f));
  const vf moved = select(is_normal, x, vf{}) + splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer
  const vf y = POWER(select(is_normal, x, vf{}) - (moved - splat(12582912.0f)));
  return select(is_normal, (vf)((vi)y + ((vi)moved << 23)), vf{});
#endif
}
inline float exp2(float x) { return exp2(splat(x))[0]; }
inline vf weight_of(Floats*, vf x) { return exp2(x); }
#ifdef __AVX512BF16__
inline vf weight_of(Pairs*, vf x) { return exp2<rough_power>(x); }
#endif

// Cephes' tanhf: a polynomial near 0, 1 - 2 / (e^2x + 1) beyond.
inline vf tanh(vf x) {
  const vf size = larger(x, -x), z = x * x;
  const vf e = exp2(splat(-2 * LOG2_E) * size);
  const vf far = (1.0f - e) / (1.0f + e);
  vf near = splat(-5.70498872745e-3f);
  near = fma(near, z, splat(2.06390887954e-2f));
  near = fma(near, z, splat(-5.37397155531e-2f));
  near = fma(near, z, splat(1.33314422036e-1f));
  near = fma(near, z, splat(-3.33332819422e-1f));
  near = fma(near * z, x, x);
  return select(size < splat(0.625f), near, select(x < vf{}, -far, far));
}

// What a product does with what lies in its place: forgets it, or adds to it.
enum class Into { NEW, SUM };

struct Nothing {
  template <class F>
  void operator()(const F&) const {}
};

// c[R][V vectors] = a x b (+ ...): n units; a is read unit by unit, b vector by vector. `beside` is given a function
// that does one more unit, if any is left, to call between what it computes.
template <class U, Into I, int R, int V, class Beside = Nothing>
inline void tile(float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_unit, const float* b, int64_t b_unit,
                 int64_t n, const Beside& beside = {}) {
  vf sum[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = vf{};
  const auto unit = [&]() INLINE {
    vf x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf one = broadcast(a + r * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = U::multiply_add(x[v], one, sum[r][v]);
    }
    a += a_unit, b += b_unit, --n;
  };
  beside([&]() INLINE {
    if (n > 0) unit();
  });
  while (n > 0) unit();
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_row + v * W;
      store(to, I == Into::SUM ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <class U, Into I, int R>
void tiles(float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_unit, const float* b, int64_t b_unit,
           int64_t n, int64_t vecs) {
  int64_t v = 0;
  for (; v + COLUMNS <= vecs; v += COLUMNS)
    tile<U, I, R, COLUMNS>(c + v * W, c_row, a, a_row, a_unit, b + v * W, b_unit, n);
  const int64_t left = vecs - v;
  if constexpr (COLUMNS > 2) {
    if (left == 3) tile<U, I, R, 3>(c + v * W, c_row, a, a_row, a_unit, b + v * W, b_unit, n);
    if (left == 2) tile<U, I, R, 2>(c + v * W, c_row, a, a_row, a_unit, b + v * W, b_unit, n);
  }
  if (left == 1) tile<U, I, R, 1>(c + v * W, c_row, a, a_row, a_unit, b + v * W, b_unit, n);
}

// `rows` <= ROWS rows of a product.
template <class U, Into I, int R = ROWS>
inline void product(int64_t rows, float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_unit,
                    const float* b, int64_t b_unit, int64_t n, int64_t vecs) {
  if constexpr (R > 0) {
    if (rows == R) tiles<U, I, R>(c, c_row, a, a_row, a_unit, b, b_unit, n, vecs);
    else product<U, I, R - 1>(rows, c, c_row, a, a_row, a_unit, b, b_unit, n, vecs);
  }
}

// One vector of units of a row of `count` elements, zeros past its end.
template <class U, class T>
inline vf load_units(const T* row, int64_t unit, int64_t count) {
  const int64_t left = count - unit * U::PER_UNIT;  // elements
#if defined(__AVX512F__)
  const int64_t lane = left > 0 ? left < W * U::PER_UNIT ? left : W * U::PER_UNIT : 0;
  const uint32_t some = uint32_t((uint64_t(1) << lane) - 1);  // no branch: the same for every row of a block
  if constexpr (U::PER_UNIT == 2) return (vf)_mm512_maskz_loadu_epi16(some, row + 2 * unit);
  else if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(some, row + unit);
  else return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row + unit)), 16);
#else
  return left >= W ? load(row + unit) : load_some(row + unit, left > 0 ? left : 0);
#endif
}

// [units][KEY_BLOCK]: unit u of n rows, which begin at these offsets; n goes up to a multiple of W, as far as offsets do.
template <class U, class T>
inline void pack_columns(float* to, const T* rows, const int64_t* offsets, int64_t n, int64_t head_dim) {
  for (int64_t first = 0; first < n; first += W)
    for (int64_t u = 0; u * U::PER_UNIT < head_dim; u += W) {
      vf v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load_units<U>(rows + offsets[first + i], u, head_dim);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(to + (u + i) * KEY_BLOCK + first, v[i]);
    }
}

#ifdef __AVX512BF16__
// The first (HALF 0) or last W elements of two rows of 2 W, side by side: a0, b0, a1, b1, ...
template <int HALF>
inline vf pairs_of(vf a, vf b) {
  constexpr int A = 0x10000;
  const __m512i each = _mm512_mullo_epi32(_mm512_set1_epi32(A + 1), (__m512i)lanes());
  const __m512i order = _mm512_add_epi32(each, _mm512_set1_epi32(32 * A + HALF * (16 * A + 16)));
  return (vf)_mm512_permutex2var_epi16((__m512i)a, order, (__m512i)b);
}
#endif

// [n / PER_UNIT][width]: a unit holds an element of one row, or those of two rows side by side.
template <class U, class T>
inline void pack_units(float* to, const T* rows, const int64_t* offsets, int64_t n, int64_t head_dim) {
  const int64_t width = padded(head_dim);
  for (int64_t h = 0; h < width; h += W * U::PER_UNIT) {
    if constexpr (U::PER_UNIT == 1) {
      for (int64_t i = 0; i < n; ++i) store(to + i * width + h, load_units<U>(rows + offsets[i], h, head_dim));
    } else {
#ifdef __AVX512BF16__
      const bool both = h + W < width;
      for (int64_t i = 0; i < n; i += 2) {
        const vf a = load_units<U>(rows + offsets[i], h / 2, head_dim);
        const vf b = load_units<U>(rows + offsets[i + 1], h / 2, head_dim);
        float* unit = to + i / 2 * width + h;
        store(unit, pairs_of<0>(a, b));
        if (both) store(unit + W, pairs_of<1>(a, b));
      }
#endif
    }
  }
}

// One row of floats as the units of a product's `a`.
inline void store_weights(Floats*, float* to, const vf* x, int vecs) {
  for (int v = 0; v < vecs; ++v) store(to + v * W, x[v]);
}
#ifdef __AVX512BF16__
inline void store_weights(Pairs*, float* to, const vf* x, int vecs) {
  for (int v = 0; v < vecs; v += 2)
    _mm512_storeu_si512(to + v * W / 2, (__m512i)_mm512_cvtne2ps_pbh(v + 1 < vecs ? x[v + 1] : vf{}, x[v]));
}
#endif

// Rows of scores that become weights where they are, 2^(factor x score - largest).
struct Weighing {
  float* scores;  // [rows][KEY_EXTENT]
  const float* largest;
  float* sums;  // [rows], of the weights
  float factor;
  int64_t rows, vecs;
};

// TIGHT: `between` is called for each vector, and leaves few registers.
template <class U, bool TIGHT = false, class F = Nothing>
inline void weigh_rows(const Weighing& t, const F& between = {}) {
  for (int64_t r = 0; r < t.rows; ++r) {
    float* const at = t.scores + r * KEY_EXTENT;
    const float factor = t.factor, top = t.largest[r] == -INF ? 0 : -t.largest[r];
    const auto every_lane = [](const float& x) INLINE { return TIGHT ? broadcast(&x) : splat(x); };
    vf sum_of[2] = {}, w[2];
    const auto weigh = [&](int64_t v, int i) INLINE {
      if constexpr (TIGHT) between();
      w[i] = weight_of((U*)nullptr, fma(load(at + v * W), every_lane(factor), every_lane(top)));
      sum_of[i] += w[i];
    };
    int64_t v = 0;
    for (; v + 2 <= t.vecs; v += 2) {
      weigh(v, 0), weigh(v + 1, 1);
      store_weights((U*)nullptr, at + v * W / U::PER_UNIT, w, 2);
    }
    if (v < t.vecs) {
      weigh(v, 0);
      store_weights((U*)nullptr, at + v * W / U::PER_UNIT, w, 1);
    }
    t.sums[r] = sum(sum_of[0] + sum_of[1]);
  }
}

// A new `product`, and other rows become weights: where registers suffice between its multiply-adds, as half of what an
// exponential takes goes to other ports of the processor.
template <class U>
inline void product_and_weights(int64_t rows, float* c, int64_t c_row, const float* a, int64_t a_row, const float* b,
                                int64_t b_unit, int64_t n, int64_t vecs, const Weighing& others) {
  int64_t done = 0;
  if (W == 16 && rows == ROWS && vecs >= COLUMNS) {
    done = COLUMNS;
    tile<U, Into::NEW, ROWS, COLUMNS>(c, c_row, a, a_row, 1, b, b_unit, n,
                                      [&](const auto& unit) INLINE { weigh_rows<U, true>(others, unit); });
  } else {
    weigh_rows<U>(others);
  }
  product<U, Into::NEW>(rows, c + done * W, c_row, a, a_row, 1, b + done * W, b_unit, n, vecs - done);
}

// Rows of KEY_BLOCK floats as units along the rows: one row, or two as pairs.
inline void store_unit_rows(Floats*, float* to, const float (*rows)[KEY_BLOCK]) { memcpy(to, rows, sizeof(*rows)); }
#ifdef __AVX512BF16__
inline void store_unit_rows(Pairs*, float* to, const float (*rows)[KEY_BLOCK]) {
  constexpr int A = 0x10000;  // lane i of the first, then of the second
  const __m512i order = _mm512_mullo_epi32(_mm512_set1_epi32(A + 1), (__m512i)lanes());
  for (int v = 0; v < KEY_BLOCK; v += W) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(load(rows[1] + v), load(rows[0] + v));
    _mm512_storeu_si512(to + v, _mm512_permutexvar_epi16(_mm512_add_epi32(order, _mm512_set1_epi32(16 * A)), both));
  }
}
#endif

// Which of at most KEY_EXTENT keys a row sees: lanes j < stop with j >= begin or j < kept.
struct Seen {
  int32_t begin, kept, stop;
  Seen(const Sequence& s, int64_t window, int64_t query, int64_t first, int64_t n) {
    const int64_t position = query + s.offset, last = position + 1 - first;
    const int64_t low = window ? position - window + 1 - first : 0, prefix = s.prefix - first;
    stop = last < n ? (last > 0 ? last : 0) : n;
    begin = low > 0 ? (low < KEY_EXTENT ? low : KEY_EXTENT) : 0;
    kept = prefix > 0 ? (prefix < KEY_EXTENT ? prefix : KEY_EXTENT) : 0;
  }
  int whole() const { return begin <= kept ? stop / W : 0; }  // so many vectors hold seen keys alone
  vi of(int v) const {
    const vi j = lanes() + v * W;
    return (j < stop) & ((j >= begin) | (j < kept));
  }
};

// From a product of query and key to a score times log2(e).
struct Scores {
  float factor, cap, inside;  // scale * log2(e), or with a cap cap * log2(e) and scale / cap
  const float* slopes;
  explicit Scores(const Attention& a)
      : factor(a.scale * LOG2_E), cap(a.soft_cap * LOG2_E), inside(a.soft_cap ? a.scale / a.soft_cap : 0),
        slopes(a.slopes) {}

  bool is_plain() const { return !cap && !slopes && factor > 0; }  // rises with the product: so does the maximum

  // `distance`: of the first lane's key from the query; entries of the prefix (lanes < kept) have none.
  vf of(vf x, int64_t head, int64_t distance, int v, int32_t kept) const {
    x = cap ? tanh(x * inside) * cap : x * factor;
    if (slopes) {
      const vi j = lanes() + v * W;
      const vf far = __builtin_convertvector(int32_t(distance) - j, vf);
      x = select(j < kept, x, fma(far, splat(-slopes[head] * LOG2_E), x));
    }
    return x;
  }

  // With a cap: how the score falls behind the product, 1 - tanh^2.
  vf bend(vf x) const {
    const vf y = tanh(x * inside);
    return 1.0f - y * y;
  }
};

}  // namespace
