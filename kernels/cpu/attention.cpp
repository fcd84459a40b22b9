// Attention over cached pages, compiled once per instruction set.
//
// Keys are taken in blocks of BLOCK by absolute position (the prefix comes first), in rising order, with a running
// maximum and sum (arXiv:2205.14135). Within a block every score is one chain of multiply-adds along the head, every
// output element one along the keys. So a query's bits depend on its position and its keys alone: not on the chunk
// it comes in, the rows computed beside it or the thread. Keys and values that a query doesn't see change nothing as long
// as they are finite.
//
//   pages -> keys [units][BLOCK] (transposed), values [BLOCK][H] in float  -> up to 4 rows (query, head) at a time:
//   scores of 64 keys in registers -> mask, exp -> weights [64] -> output [H] += weights x values
#include "kernels.h"
#include "vec.h"

namespace {

constexpr int BLOCK = 64, VECS = BLOCK / W, ROWS = 4;

// How a product of q and k is summed: float32 units, or pairs of bfloat16 where the processor multiplies those.
struct Floats {
  static constexpr int PER_UNIT = 1;
  static vf multiply_add(vf keys, float q, vf sum) { return fma(keys, splat(q), sum); }
};
#ifdef __AVX512BF16__
struct Pairs {
  static constexpr int PER_UNIT = 2;
  static vf multiply_add(vf keys, float q, vf sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)keys, (__m512bh)(__m512)splat_bits(q));
  }
  static vf splat_bits(float q) {
    int32_t i;
    memcpy(&i, &q, 4);
    return (vf)_mm512_set1_epi32(i);
  }
};
#endif

template <class T>
struct Units { typedef Floats Type; };
#ifdef __AVX512BF16__
template <>
struct Units<bf16> { typedef Pairs Type; };
#endif

// One vector of units of a row, zeros past its end.
template <class U, class T>
inline vf load_units(const T* row, int64_t first, int64_t count) {
  if constexpr (U::PER_UNIT == 1) {
    return first + W <= count ? load(row + first) : load_some(row + first, count > first ? count - first : 0);
  } else {
    float units[W] = {};
    const int64_t left = count - first;  // pairs
    if (left >= W) return load((const float*)(row + 2 * first));
    if (left > 0) memcpy(units, row + 2 * first, left * 4);
    return load(units);
  }
}

inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// One thread's room, laid out for its part.
struct Room {
  int64_t units, width;  // of a row, padded to vectors
  float *memory, *keys, *values, *queries, *outputs, *largest, *sums;

  Room(int64_t num_units, int64_t head_dim, int64_t rows) : units(up_to(num_units, W)), width(up_to(head_dim, W)) {
    const int64_t sizes[] = {units * BLOCK, BLOCK * width, rows * units, rows * width, rows, rows};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    float* at = memory = new float[total];
    float** parts[] = {&keys, &values, &queries, &outputs, &largest, &sums};
    for (int i = 0; i < 6; ++i) {
      *parts[i] = at;
      at += sizes[i];
    }
    for (int64_t i = 0; i < rows * width; ++i) outputs[i] = 0;
    for (int64_t i = 0; i < rows; ++i) largest[i] = -__builtin_inff(), sums[i] = 0;
  }
  ~Room() { delete[] memory; }
  Room(const Room&) = delete;
};

template <class T>
struct Attend {
  typedef typename Units<T>::Type U;
  const PagedAttention& a;
  const Part& part;
  int64_t start, count, length, prefix;  // the chunk's: first query row, queries, keys, prefix entries among them

  Attend(const PagedAttention& args, const Part& p) : a(args), part(p) {
    const int64_t* c = a.chunks + 4 * p.chunk;
    start = c[0], count = c[1], length = c[2] + c[3], prefix = c[3];
  }

  int64_t position(int64_t query) const { return length - count + query; }  // query: within the chunk

  // First element of a key or value: `key` counts prefix entries, then positions.
  const T* row(const void* cache, int64_t key, int64_t head) const {
    const int64_t at = key < prefix ? key : key - prefix;
    const int64_t* pages = key < prefix ? a.prefix_table + part.chunk * a.prefix_width : a.table + part.chunk * a.table_width;
    const int64_t slot = pages[at / a.page_size] * a.page_size + at % a.page_size;
    return (const T*)cache + (slot * a.num_kv_heads + head) * a.head_dim;
  }

  void pack(Room& room, int64_t first, int64_t n, int64_t head) const {
    const int64_t units = a.head_dim / U::PER_UNIT;
    for (int64_t group = 0; group < BLOCK; group += W) {
      const T* rows[W];
      for (int i = 0; i < W; ++i) rows[i] = group + i < n ? row(a.keys, first + group + i, head) : nullptr;
      for (int64_t u = 0; u < units; u += W) {
        vf v[W];
        for (int i = 0; i < W; ++i) v[i] = rows[i] ? load_units<U>(rows[i], u, units) : vf{};
        transpose(v);
        for (int i = 0; i < W; ++i) store(room.keys + (u + i) * BLOCK + group, v[i]);
      }
    }
    for (int64_t i = 0; i < BLOCK; ++i) {
      float* to = room.values + i * room.width;
      const T* from = i < n ? row(a.values, first + i, head) : nullptr;
      for (int64_t h = 0; h < room.width; h += W) {
        const int64_t left = a.head_dim - h;
        store(to + h, !from ? vf{} : left >= W ? load(from + h) : load_some(from + h, left));
      }
    }
  }

  // Scores, weights and outputs of R rows for the packed block; query[r] counts within the chunk.
  template <int R>
  void attend_rows(Room& room, int64_t first, int64_t n, int64_t row, const int64_t* query) const {
    vf s[R][VECS] = {};
    const int64_t units = a.head_dim / U::PER_UNIT;
    const float* q = room.queries + row * room.units;
    for (int64_t u = 0; u < units; ++u) {
      vf k[VECS];
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) k[v] = load(room.keys + u * BLOCK + v * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < VECS; ++v) s[r][v] = U::multiply_add(k[v], q[r * room.units + u], s[r][v]);
    }
    float weights[R][BLOCK];
    int64_t visible = 0;
    for (int r = 0; r < R; ++r) {
      float* largest = room.largest + row + r;
      const int64_t last = position(query[r]);  // the last key it sees
      if (last - first + 1 > visible) visible = last - first + 1;
      const int32_t stop = last - first + 1 < n ? last - first + 1 : n;
      const int64_t low = a.window ? last - a.window + 1 - first : 0, shared = prefix - first;
      const int32_t begin = low > 0 ? (low < BLOCK ? low : BLOCK) : 0, kept = shared > 0 ? (shared < BLOCK ? shared : BLOCK) : 0;
      vf top = splat(*largest);
      for (int v = 0; v < VECS; ++v) {
        vi j;
        for (int i = 0; i < W; ++i) j[i] = v * W + i;
        const vi sees = (j < stop) & ((j >= begin) | (j < kept));
        s[r][v] = select(sees, s[r][v] * a.scale, splat(-__builtin_inff()));
        top = max(s[r][v], top);
      }
      const float next = max(top);
      if (next == -__builtin_inff()) {  // nothing seen so far
        for (int j = 0; j < BLOCK; ++j) weights[r][j] = 0;
        continue;
      }
      const float keep = exp(splat(*largest - next))[0];
      *largest = next;
      vf total = {};
      for (int v = 0; v < VECS; ++v) {
        const vf w = exp(s[r][v] - next);
        total += w;
        store(weights[r] + v * W, w);
      }
      room.sums[row + r] = fma(splat(room.sums[row + r]), splat(keep), splat(sum(total)))[0];
      float* out = room.outputs + (row + r) * room.width;
      if (keep != 1)
        for (int64_t h = 0; h < room.width; h += W) store(out + h, load(out + h) * keep);
    }
    if (visible > n) visible = n;
    for (int64_t h = 0; h < room.width; h += 4 * W) {
      const int vecs = room.width - h < 4 * W ? (room.width - h) / W : 4;
      if (vecs == 4) outputs<R, 4>(room, row, h, visible, weights);
      else if (vecs == 3) outputs<R, 3>(room, row, h, visible, weights);
      else if (vecs == 2) outputs<R, 2>(room, row, h, visible, weights);
      else outputs<R, 1>(room, row, h, visible, weights);
    }
  }

  template <int R, int V>
  void outputs(Room& room, int64_t row, int64_t h, int64_t n, const float (&weights)[R][BLOCK]) const {
    vf o[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) o[r][v] = load(room.outputs + (row + r) * room.width + h + v * W);
    for (int64_t j = 0; j < n; ++j) {
      vf value[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) value[v] = load(room.values + j * room.width + h + v * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) o[r][v] = fma(value[v], splat(weights[r][j]), o[r][v]);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(room.outputs + (row + r) * room.width + h + v * W, o[r][v]);
  }

  void run_head(int64_t kv_head) const {
    int64_t heads[1024], group = 0;
    for (int64_t n = 0; n < a.num_heads; ++n)
      if (a.heads[n] == kv_head) heads[group++] = n;
    if (!group) return;
    const int64_t rows = part.num_queries * group, units = a.head_dim / U::PER_UNIT;
    Room room(units, a.head_dim, rows);
    // rows of a query stand together
    const auto query_of = [&](int64_t row) { return part.first_query + row / group; };
    const auto index = [&](int64_t row) { return (start + query_of(row)) * a.num_heads + heads[row % group]; };
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t u = 0; u < room.units; u += W)
        store(room.queries + r * room.units + u, load_units<U>((const T*)a.q + index(r) * a.head_dim, u, units));
    const int64_t end = position(part.first_query + part.num_queries - 1) + 1;
    const int64_t oldest = a.window ? position(part.first_query) - a.window + 1 : 0;
    for (int64_t first = 0; first < end; first += BLOCK) {
      if (first + BLOCK <= oldest && first >= prefix) continue;
      const int64_t n = end - first < BLOCK ? end - first : BLOCK;
      pack(room, first, n, kv_head);
      for (int64_t r = 0; r < rows; r += ROWS) {
        int64_t query[ROWS];
        const int64_t some = rows - r < ROWS ? rows - r : ROWS;
        for (int64_t i = 0; i < some; ++i) query[i] = query_of(r + i);
        if (position(query[some - 1]) < first) continue;
        if (some == 4) attend_rows<4>(room, first, n, r, query);
        else if (some == 3) attend_rows<3>(room, first, n, r, query);
        else if (some == 2) attend_rows<2>(room, first, n, r, query);
        else attend_rows<1>(room, first, n, r, query);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float total = room.sums[r];
      const float one_over = total == 0 ? 0 : 1 / total;  // a query that sees no key has output 0
      T* out = (T*)a.out + index(r) * a.head_dim;
      const float* from = room.outputs + r * room.width;
      for (int64_t h = 0; h < a.head_dim; h += W) {
        const vf x = load(from + h) * one_over;
        if (a.head_dim - h >= W) store(out + h, x);
        else store_some(out + h, x, a.head_dim - h);
      }
      a.lse[index(r)] = room.largest[r] + __builtin_logf(total);
    }
  }
};

template <class T>
void attend(const PagedAttention& args, const Part& part) {
  for (int64_t k = 0; k < part.num_kv_heads; ++k) Attend<T>(args, part).run_head(part.first_kv_head + k);
}

}  // namespace

KERNEL(attend)(const PagedAttention& args, const Part& part, bool is_bf16) {
  if (is_bf16)
    attend<bf16>(args, part);
  else
    attend<float>(args, part);
}
