// y = x w^T (+ x' w'^T) (+ bias) with packed weights, compiled once per instruction set.
//
// A weight [N, K] is packed into panels of PANEL rows of it (columns of y). A unit is 4 bytes along K: one float32, or
// two bfloat16. Within a panel the units of all its columns stand together:
//
//   packed[panel][unit][column]     panel = n / PANEL, column = n % PANEL, unit = k or k / 2; zeros past N and K
//
// An element of y is one chain of fused multiply-adds in float32 with rising k, product after product (`multiply_add`
// below is the definition of a link), whatever else is computed: so neither the number of rows, nor the place of a row,
// nor the threads change a bit of it. A chain may be laid down in a float32 output and taken up again.
#include "kernels.h"
#include "vec.h"

namespace {

constexpr int LINE = 64, UNIT_BYTES = PANEL * 4;  // of a cache line; of one unit of all columns of a panel
constexpr int LINES = UNIT_BYTES / LINE;

// As many rows at a time as registers hold with this many vectors of a panel, one weight vector each and an x.
#if defined(__AVX512F__)
constexpr int ROWS = 9, VECS = 3;
#else
constexpr int ROWS = 4, VECS = 3;
#endif
static_assert(PANEL % (VECS * W) == 0);

struct Float32 {
  typedef float Element;
  static constexpr int PER_UNIT = 1;
  static vf multiply_add(vf w, vf x, vf sum) { return fma(w, x, sum); }
};

struct Bfloat16 {
  typedef bf16 Element;
  static constexpr int PER_UNIT = 2;
  static vf multiply_add(vf w, vf x, vf sum) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#else  // the same order as that instruction: the odd element first
    const vu high = splat_bits(0xffff0000u);
    return fma(bits((vu)w << 16), bits((vu)x << 16), fma(bits((vu)w & high), bits((vu)x & high), sum));
#endif
  }
};

template <int R, int V, class F>
inline void for_each(vf (&sum)[R][V], int64_t left, const F& one) {
#pragma GCC unroll 12
  for (int v = 0; v < V; ++v) {
    const int64_t n = left - v * W;
    if (n > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) one(r, v, n < W ? int(n) : W, sum[r][v]);
    }
  }
}

template <class E>
inline void put(E* to, vf y, int n) {
  if (n == W) store(to, y);
  else store_some(to, y, n);
}

// Memory to prefetch: one line of it, or some, for every unit that is multiplied, `step` bytes on each time.
struct Ahead {
  const char* at;
  int64_t step;
};

// R rows times V vectors of columns; PREFETCH lines for every unit, all LINES of them without gaps.
template <class T, int R, int V, int PREFETCH>
__attribute__((noinline)) void tile(const LinearArgs& a, int64_t panel, int first_vec, int64_t row, Ahead ahead) {
  typedef typename T::Element E;
  const int64_t column = panel * PANEL + first_vec * W, left = a.out_width - column;
  vf sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
    for (int v = 0; v < V; ++v) sum[r][v] = vf{};
  if (a.accumulate)
    for_each(sum, left, [&](int r, int v, int n, vf& s) {
      const float* from = (const float*)a.out + (row + r) * a.out_stride + column + v * W;
      s = n == W ? load(from) : load_some(from, n);
    });
  for (int p = 0; p < a.num_products; ++p) {
    const Product& term = a.products[p];
    const int64_t whole = term.in_width / T::PER_UNIT, units = (term.in_width + T::PER_UNIT - 1) / T::PER_UNIT;
    const int64_t stride = term.x_stride * sizeof(E);
    const float* w = (const float*)term.weight + panel * units * PANEL + first_vec * W;
    const char* x[(R + 2) / 3];  // rows in threes: a base and one stride reach them, and registers suffice
    for (int i = 0; i < (R + 2) / 3; ++i) x[i] = (const char*)term.x + (row + 3 * i) * stride;
#pragma GCC unroll 2
    for (int64_t u = 0; u < whole; ++u) {
      vf weights[V];
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) weights[v] = load(w + v * W);
#pragma GCC unroll 4
      for (int line = 0; line < PREFETCH; ++line) __builtin_prefetch(ahead.at + line * LINE);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf one = broadcast(x[r / 3] + (r % 3) * stride);
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) sum[r][v] = T::multiply_add(weights[v], one, sum[r][v]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < (R + 2) / 3; ++i) x[i] += 4;
      w += PANEL;
      if (PREFETCH) ahead.at += PREFETCH == LINES ? UNIT_BYTES : ahead.step;
    }
    if (whole < units) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {  // the pair's second is zero, as in the weight
        const vf one = bits(splat_bits(*(const uint16_t*)(x[r / 3] + (r % 3) * stride)));
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) sum[r][v] = T::multiply_add(load(w + v * W), one, sum[r][v]);
      }
    }
  }
  if (a.bias)
    for_each(sum, left, [&](int, int v, int n, vf& s) { s += load_some((const E*)a.bias + column + v * W, n); });
  if (a.float_out)
    for_each(sum, left, [&](int r, int v, int n, vf& s) {
      put((float*)a.out + (row + r) * a.out_stride + column + v * W, s, n);
    });
  else
    for_each(sum, left, [&](int r, int v, int n, vf& s) {
      put((E*)a.out + (row + r) * a.out_stride + column + v * W, s, n);
    });
}

template <class T, int V, int PREFETCH, int R>
void rows(int64_t count, const LinearArgs& a, int64_t panel, int first_vec, int64_t row, Ahead ahead) {
  if constexpr (R > 0) {
    if (count == R) tile<T, R, V, PREFETCH>(a, panel, first_vec, row, ahead);
    else rows<T, V, PREFETCH, R - 1>(count, a, panel, first_vec, row, ahead);
  }
}

// One group of rows times one panel; nothing is prefetched where `ahead` is null.
template <class T>
void group(int64_t count, const LinearArgs& a, int64_t panel, int64_t row, int64_t groups, Ahead ahead) {
  const int64_t left = a.out_width - panel * PANEL;
  for (int v = 0; v < PANEL / W && v * W < left; v += VECS) {
    if (left - v * W <= W) rows<T, 1, 0, ROWS>(count, a, panel, v, row, ahead);
    else if (v > 0 || !ahead.at) rows<T, VECS, 0, ROWS>(count, a, panel, v, row, ahead);
    else if (groups == 1) rows<T, VECS, LINES, ROWS>(count, a, panel, v, row, ahead);
    else if (groups == 2) rows<T, VECS, 2, ROWS>(count, a, panel, v, row, ahead);
    else rows<T, VECS, 1, ROWS>(count, a, panel, v, row, ahead);
  }
}

int64_t groups_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }

constexpr int64_t BLOCK_BYTES = 512 << 10;  // of x that stay in the second-level cache while all panels pass by
constexpr int64_t AHEAD = 16 << 10;

// Panels [first_panel, last_panel) of the groups [first_group, last_group), which count on from segment to segment;
// then the thread reads `next`, or nothing. While a panel is multiplied, memory is read for later. One group of rows:
// the same stream, AHEAD bytes on. More: what follows the panel, evenly spread over the groups, so that memory never
// waits for arithmetic.
template <class T>
void some_panels(const LinearArgs* segments, int64_t count, int64_t first_panel, int64_t last_panel, int64_t first_group,
                 int64_t last_group, const char* next) {
  const Product& x = segments[0].products[0];
  const int64_t units = (x.in_width + T::PER_UNIT - 1) / T::PER_UNIT, row_bytes = x.in_width * sizeof(typename T::Element);
  const int64_t most = BLOCK_BYTES / (row_bytes * ROWS + 1) + 1, mine = last_group - first_group;
  const int64_t blocks = (mine + most - 1) / most;
  const char* const weight = (const char*)x.weight;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = first_group + mine * b / blocks, last = first_group + mine * (b + 1) / blocks;
    const char* const end = b + 1 < blocks ? weight + first_panel * units * UNIT_BYTES : next;
    for (int64_t p = first_panel; p < last_panel; ++p) {
      const char* const here = weight + p * units * UNIT_BYTES;
      Ahead ahead{p + 1 < last_panel ? here + units * UNIT_BYTES : end, UNIT_BYTES / (last - first)};
      if (last - first == 1) ahead.at = here + AHEAD;
      for (int64_t s = 0, before = 0; s < count; ++s) {
        const LinearArgs& a = segments[s];
        const int64_t groups = groups_of(a.rows);
        const int64_t low = first > before ? first - before : 0, high = last - before < groups ? last - before : groups;
        for (int64_t g = low; g < high; ++g) {  // balanced: 10 rows are 5 + 5
          const int64_t row = a.rows * g / groups, stop = a.rows * (g + 1) / groups;
          group<T>(stop - row, a, p, row, last - first, ahead);
          if (ahead.at) ahead.at += units * ahead.step;
        }
        before += groups;
      }
    }
  }
}

constexpr int64_t MANY_GROUPS = 14;  // from here on threads share rows, below panels

template <class T>
void linear(const LinearArgs* calls, int64_t parts, int64_t segments, int64_t thread, int64_t threads, const char* next) {
  int64_t panels = 0, groups = 0;
  for (int64_t i = 0; i < parts; ++i) panels += panels_of(calls[i * segments].out_width);
  for (int64_t s = 0; s < segments; ++s) groups += groups_of(calls[s].rows);
  const bool by_rows = groups >= MANY_GROUPS || panels < threads;
  int64_t first = panels * thread / threads, last = panels * (thread + 1) / threads;
  for (int64_t i = 0; i < parts; ++i) {
    const LinearArgs* part = calls + i * segments;
    const int64_t here = panels_of(part->out_width);
    const bool goes_on = i + 1 < parts && (by_rows || last > here);
    const char* then = goes_on ? (const char*)part[segments].products[0].weight : next;
    if (by_rows) {
      some_panels<T>(part, segments, 0, here, groups * thread / threads, groups * (thread + 1) / threads, then);
    } else {
      const int64_t low = first > 0 ? first : 0, high = last < here ? last : here;
      if (low < high) some_panels<T>(part, segments, low, high, 0, groups, then);
    }
    first -= here, last -= here;
  }
}

// Units of W columns of a matrix whose rows are `stride` elements apart: [k, n] -> the pair (k, k + 1), or k alone.
template <class E, class S>
inline vf unit_of_columns(const S* at, int64_t stride, int n, bool is_last) {
  const auto part = [n](const S* p) { return n == W ? load(p) : load_some(p, n); };
  if constexpr (sizeof(E) == 4) return part(at);
  const vu low = round_bf16(part(at));
  return bits(is_last ? low : low | round_bf16(part(at + stride)) << 16);
}

// W units of one row.
template <class E, class S>
inline vf units_of_row(const S* at, int64_t elements) {
  constexpr int PER_UNIT = 4 / sizeof(E), ALL = W * PER_UNIT;
  E some[ALL] = {};
  if (elements > ALL) elements = ALL;
  if constexpr (sizeof(S) == sizeof(E)) {
    if (elements == ALL) return load((const float*)at);
    if (elements > 0) memcpy(some, at, elements * sizeof(E));
  } else {
    for (int64_t i = 0; i < elements; i += W)
      put(some + i, elements - i < W ? load_some(at + i, elements - i) : load(at + i), elements - i < W ? elements - i : W);
  }
  return load((const float*)some);
}

// Packs panels [first, last) of w [N, K], whose element [n, k] is at n * row_stride + k * column_stride; one of the
// strides is 1.
template <class E, class S>
void pack(const PackArgs& a, int64_t first, int64_t last) {
  constexpr int PER_UNIT = 4 / sizeof(E);
  const int64_t units = (a.in_width + PER_UNIT - 1) / PER_UNIT;
  const S* w = (const S*)a.from;
  for (int64_t p = first; p < last; ++p) {
    float* panel = (float*)a.to + p * units * PANEL;
    if (a.column_stride == 1) {
      for (int64_t u = 0; u < units; u += W)
        for (int c = 0; c < PANEL; c += W) {
          vf block[W];
          for (int i = 0; i < W; ++i) {
            const int64_t n = p * PANEL + c + i, k = u * PER_UNIT;
            block[i] = n < a.out_width ? units_of_row<E>(w + n * a.row_stride + k, a.in_width - k) : vf{};
          }
          transpose(block);
          for (int i = 0; i < W && u + i < units; ++i) store(panel + (u + i) * PANEL + c, block[i]);
        }
    } else {
      for (int64_t u = 0; u < units; ++u)
        for (int c = 0; c < PANEL; c += W) {
          const int64_t n = p * PANEL + c, k = u * PER_UNIT, left = a.out_width - n;
          const vf one = left <= 0 ? vf{}
                                   : unit_of_columns<E>(w + n + k * a.column_stride, a.column_stride, left < W ? left : W,
                                                        k + 1 == a.in_width);
          store(panel + u * PANEL + c, one);
        }
    }
  }
}

// out[n] = row n of the transposed x [T, N], with room for whole units: T rounded up, filled with a zero.
template <class E>
void transpose_rows(const TransposeArgs& a, int64_t first, int64_t last) {
  constexpr int PER_UNIT = 4 / sizeof(E);
  const int64_t units = (a.rows + PER_UNIT - 1) / PER_UNIT;
  const E* x = (const E*)a.from;
  for (int64_t n = first; n < last; n += W) {
    const int width = last - n < W ? last - n : W;
    for (int64_t u = 0; u < units; u += W) {
      vf block[W];
      for (int i = 0; i < W; ++i) {
        const int64_t t = (u + i) * PER_UNIT;
        block[i] = t < a.rows ? unit_of_columns<E>(x + t * a.stride + n, a.stride, width, t + 1 == a.rows) : vf{};
      }
      transpose(block);
      for (int i = 0; i < width; ++i) put((float*)a.to + (n + i) * units + u, block[i], units - u < W ? units - u : W);
    }
  }
}

// Panels [first, last) of the transpose [K, N] of a packed weight [N, K]. What its last units have past N is zero, as the
// weight's own panels are there.
template <class E>
void turn(const TurnArgs& a, int64_t first, int64_t last) {
  constexpr int PER_UNIT = 4 / sizeof(E), ACROSS = PANEL / PER_UNIT;
  constexpr int LINE_UNITS = (ACROSS + W - 1) / W * W;  // whole vectors
  const int64_t units = (a.in_width + PER_UNIT - 1) / PER_UNIT, out_units = (a.out_width + PER_UNIT - 1) / PER_UNIT;
  for (int64_t from = 0; from < a.out_width; from += PANEL)  // in the order in which the source lies in memory
    for (int64_t p = first; p < last; ++p) {
      alignas(64) E block[PANEL][LINE_UNITS * PER_UNIT];  // W[from + i][p * PANEL + j]
      const float* source = (const float*)a.from + (from / PANEL * units + p * ACROSS) * PANEL;
      const int64_t across = units - p * ACROSS < ACROSS ? units - p * ACROSS : ACROSS;
      for (int c = 0; c < PANEL; c += W)
        for (int64_t u = 0; u < LINE_UNITS; u += W) {
          vf some[W];
          for (int i = 0; i < W; ++i) {
            const float* at = source + (u + i) * PANEL + c;
            some[i] = u + i < across ? load(at) : vf{};
            if (u + i < across) __builtin_prefetch(at + 2 * ACROSS * PANEL);
          }
          transpose(some);
          for (int i = 0; i < W; ++i) store((float*)block[c + i] + u, some[i]);
        }
      uint32_t* to = (uint32_t*)a.to + ((p - a.first) * out_units + from / PER_UNIT) * PANEL;
      const int64_t down = out_units - from / PER_UNIT < ACROSS ? out_units - from / PER_UNIT : ACROSS;
      for (int64_t u = 0; u < down; ++u)
        for (int c = 0; c < PANEL; ++c)
          if constexpr (PER_UNIT == 1)
            memcpy(to + u * PANEL + c, &block[u][c], 4);
          else
            to[u * PANEL + c] = uint32_t(block[2 * u][c]) | uint32_t(block[2 * u + 1][c]) << 16;
    }
}

template <class E>
void gather(E* out, const E* packed, const int64_t* ids, int64_t in_width, int64_t first, int64_t last) {
  constexpr int64_t per_unit = 4 / sizeof(E);
  const int64_t units = (in_width + per_unit - 1) / per_unit;
  for (int64_t t = first; t < last; ++t) {
    const E* from = packed + (ids[t] / PANEL * units * PANEL + ids[t] % PANEL) * per_unit;
    for (int64_t k = 0; k < in_width; ++k) out[t * in_width + k] = from[k / per_unit * PANEL * per_unit + k % per_unit];
  }
}

}  // namespace

KERNEL(linear)(const LinearArgs* calls, int64_t parts, int64_t segments, int64_t thread, int64_t threads, const void* next,
               bool is_bf16) {
  if (is_bf16)
    linear<Bfloat16>(calls, parts, segments, thread, threads, (const char*)next);
  else
    linear<Float32>(calls, parts, segments, thread, threads, (const char*)next);
}

KERNEL(pack)(const PackArgs& args, int64_t first, int64_t last) {
  if (!args.to_bf16)
    pack<float, float>(args, first, last);
  else if (args.from_bf16)
    pack<bf16, bf16>(args, first, last);
  else
    pack<bf16, float>(args, first, last);
}

KERNEL(transpose_rows)(const TransposeArgs& args, int64_t first, int64_t last, bool is_bf16) {
  if (is_bf16)
    transpose_rows<bf16>(args, first, last);
  else
    transpose_rows<float>(args, first, last);
}

KERNEL(turn)(const TurnArgs& args, int64_t first, int64_t last, bool is_bf16) {
  if (is_bf16)
    turn<bf16>(args, first, last);
  else
    turn<float>(args, first, last);
}

KERNEL(gather)(void* out, const void* packed, const int64_t* ids, int64_t in_width, int64_t first, int64_t last,
               bool is_bf16) {
  if (is_bf16)
    gather((bf16*)out, (const bf16*)packed, ids, in_width, first, last);
  else
    gather((float*)out, (const float*)packed, ids, in_width, first, last);
}
