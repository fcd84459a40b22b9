// Attention backward, compiled once per instruction set: gradients of q, k and v from those of out and lse.
//
// Per block of keys and rows of queries, with P = exp2(S - lse) (arXiv:2205.14135, algorithm 4, and the term of lse):
//
//   dS = P * (dO V^T - rowsum(dO * O) + dlse)      dV += P^T dO      dK += dS^T Q      dQ += dS K
//
// P and dS are rounded to bfloat16 where the processor multiplies pairs of it. A segment of queries keeps its dQ; keys
// take the sums of the segments in their order, each block of keys in turn. So the bits are those of any thread count.
#include <sched.h>

#include "attention.h"
#include "kernels.h"

namespace {

constexpr int TILE = BACKWARD_TILE;

template <class T>
struct Backward {
  typedef typename Units<T>::Type U;
  static constexpr int PER = U::PER_UNIT;
  const Attention& a;
  const AttentionGrads& g;
  const AttentionPart& p;
  const Sequence& s;
  const Scores scores;
  const int64_t width, stride, row_units, kv_head, group, vecs;
  float *q, *q_pairs, *d, *d_pairs, *dq;     // of a segment's rows, d: of out's gradient
  float *lse, *shift;                        // times log2(e); what is taken from dP
  float *keys, *key_pairs, *values;          // of a block
  float *weights, *grads, *grad_rows;        // of a tile: P and dS as pairs of rows, dS as rows
  float *dk, *dv;                            // sums of all keys

  Backward(const Attention& args, const AttentionGrads& grads_, const AttentionPart& part, float* room, float* sums)
      : a(args), g(grads_), p(part), s(args.sequences[part.sequence]), scores(args), width(padded(args.head_dim)),
        stride(padded(args.head_dim / PER)), row_units(args.head_dim / PER), kv_head(part.first_kv_head),
        group(a.first_head[kv_head + 1] - a.first_head[kv_head]), vecs((args.head_dim + W - 1) / W), dk(sums),
        dv(sums + s.keys * width) {
    float* at = (float*)(((uintptr_t)room + 63) / 64 * 64);
    const auto take = [&](int64_t size) {
      float* here = at;
      at += padded(size);
      return here;
    };
    const int64_t rows = padded(segment_queries(group) * group + 1);
    q = take(rows * stride), d = take(rows * stride), dq = take(rows * width);
    q_pairs = PER == 1 ? q : take(rows / 2 * width), d_pairs = PER == 1 ? d : take(rows / 2 * width);
    lse = take(rows), shift = take(rows);
    keys = take(KEY_BLOCK * width), key_pairs = take(KEY_BLOCK * width), values = take(KEY_BLOCK * width);
    weights = take(TILE * KEY_BLOCK), grads = take(TILE * KEY_BLOCK);
    grad_rows = PER == 1 ? grads : take(TILE * KEY_BLOCK);
  }

  int64_t at(int64_t first_query, int64_t row) const {  // in [T, N]
    return (s.first_query + first_query + row / group) * a.num_heads + a.heads[a.first_head[kv_head] + row % group];
  }

  // Everything of the segment's rows; one row of zeros more where their number is odd.
  void take_rows(int64_t first_query, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = at(first_query, r);
      const T *from_q = (const T*)a.q + place * a.head_dim, *from_d = (const T*)g.out + place * a.head_dim;
      const T* out = (const T*)a.out + place * a.head_dim;
      for (int64_t u = 0; u < row_units; u += W) {
        store(q + r * stride + u, load_units<U>(from_q, u, a.head_dim));
        store(d + r * stride + u, g.out ? load_units<U>(from_d, u, a.head_dim) : vf{});
      }
      vf delta = {};
      for (int64_t h = 0; g.out && h < a.head_dim; h += W) {
        const int64_t left = a.head_dim - h;
        delta = left >= W ? fma(load(from_d + h), load(out + h), delta)
                          : fma(load_some(from_d + h, left), load_some(out + h, left), delta);
      }
      lse[r] = a.lse[place] == -INF ? INF : a.lse[place] * LOG2_E;  // sees nothing: P is 0
      shift[r] = sum(delta) - (g.lse ? g.lse[place] : 0);
    }
    for (int64_t r = rows; r < rows + rows % PER; ++r) {
      memset(q + r * stride, 0, stride * sizeof(float)), memset(d + r * stride, 0, stride * sizeof(float));
      lse[r] = INF, shift[r] = 0;
    }
    memset(dq, 0, (rows + rows % PER) * width * sizeof(float));
    if constexpr (PER == 2) {
      const int64_t pair[2] = {0, stride * 2};  // elements
      for (int64_t r = 0; r < rows; r += 2) {
        pack_units<U>(q_pairs + r / 2 * width, (const T*)(q + r * stride), pair, 2, a.head_dim);
        pack_units<U>(d_pairs + r / 2 * width, (const T*)(d + r * stride), pair, 2, a.head_dim);
      }
    }
  }

  void take_keys(int64_t first, int64_t n) {
    const int64_t size = a.num_kv_heads * a.head_dim, begin = (s.first_key + first) * size + kv_head * a.head_dim;
    int64_t offsets[KEY_BLOCK];
    for (int64_t j = 0; j < KEY_BLOCK; ++j) offsets[j] = begin + (j < n ? j : n - 1) * size;
    pack_columns<U>(keys, (const T*)a.keys, offsets, n, a.head_dim);
    pack_columns<U>(values, (const T*)a.values, offsets, n, a.head_dim);
    pack_units<U>(key_pairs, (const T*)a.keys, offsets, n, a.head_dim);
  }

  // P and dS of up to ROWS rows into the tile's buffers, from its row `place` on; an even number of rows in pairs.
  void weigh(int64_t first_query, int64_t row, int64_t count, int64_t place, int64_t first, int64_t n,
             int64_t visible) {
    alignas(64) float raw[ROWS][KEY_BLOCK], dp[ROWS][KEY_BLOCK];
    const int used = (visible + W - 1) / W;
    product<U, Into::NEW>(count, raw[0], KEY_BLOCK, q + row * stride, stride, 1, keys, KEY_BLOCK, row_units, used);
    product<U, Into::NEW>(count, dp[0], KEY_BLOCK, d + row * stride, stride, 1, values, KEY_BLOCK, row_units, used);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = first_query + (row + r) / group, head = a.heads[a.first_head[kv_head] + (row + r) % group];
      const Seen seen(s, a.window, query, first, n);
      const int whole = seen.whole();
      for (int v = 0; v < used; ++v) {
        const vf product = load(raw[r] + v * W);
        vf x = scores.of(product, head, query + s.offset - first, v, seen.kept) - lse[row + r];
        if (v >= whole) x = select(seen.of(v), x, splat(-INF));
        const vf w = exp2(x);
        vf ds = w * (load(dp[r] + v * W) - shift[row + r]);
        if (scores.cap) ds = ds * scores.bend(product);
        store(raw[r] + v * W, w), store(dp[r] + v * W, ds);
      }
      for (int v = used; v < KEY_VECS; ++v) store(raw[r] + v * W, vf{}), store(dp[r] + v * W, vf{});
    }
    for (int64_t r = 0; r < count; r += PER) {
      store_unit_rows((U*)nullptr, weights + (place + r) / PER * KEY_BLOCK, &raw[r]);
      store_unit_rows((U*)nullptr, grads + (place + r) / PER * KEY_BLOCK, &dp[r]);
    }
    if constexpr (PER == 2) {
      for (int64_t r = 0; r < count; ++r) {
        vf x[KEY_VECS];
        for (int v = 0; v < KEY_VECS; ++v) x[v] = load(dp[r] + v * W);
        store_weights((U*)nullptr, grad_rows + (place + r) * KEY_BLOCK, x, KEY_VECS);
      }
    }
  }

  // Rows [row, end) of the segment against the packed block.
  void tile_of(int64_t first_query, int64_t row, int64_t end, int64_t first, int64_t n) {
    const auto seen_by = [&](int64_t r) {  // keys of the block up to the last that row r sees
      const int64_t last = first_query + r / group + s.offset + 1 - first;
      return last < n ? last : n;
    };
    for (int64_t r = row; r < end; r += ROWS) {
      const int64_t count = end - r < ROWS ? end - r : ROWS;
      weigh(first_query, r, count, r - row, first, n, seen_by(r + count - 1));
    }
    const int64_t visible = seen_by(end - 1), units = (end - row) / PER;
    for (int64_t j = 0; j < visible; j += ROWS) {
      const int64_t count = visible - j < ROWS ? visible - j : ROWS;
      int64_t start = (first + j - s.offset - first_query) * group - row;  // first row that sees key j
      start = start > 0 ? start / PER : 0;
      product<U, Into::SUM>(count, dv + (first + j) * width, width, weights + start * KEY_BLOCK + j, 1,
                             KEY_BLOCK, d_pairs + (row / PER + start) * width, width, units - start, vecs);
      product<U, Into::SUM>(count, dk + (first + j) * width, width, grads + start * KEY_BLOCK + j, 1,
                             KEY_BLOCK, q_pairs + (row / PER + start) * width, width, units - start, vecs);
    }
    for (int64_t r = row; r < end; r += ROWS) {
      const int64_t count = end - r < ROWS ? end - r : ROWS;
      product<U, Into::SUM>(count, dq + r * width, width, grad_rows + (r - row) * KEY_BLOCK, KEY_BLOCK, 1,
                             key_pairs, width, (seen_by(r + count - 1) + PER - 1) / PER, vecs);
    }
  }

  void segment(int64_t index, int64_t first_query, int64_t queries, int32_t* turns) {
    const int64_t rows = queries * group, even = rows + rows % PER;
    take_rows(first_query, rows);
    const int64_t last = first_query + queries + s.offset, end = last < s.keys ? last : s.keys;
    const int64_t oldest = a.window ? first_query + s.offset - a.window + 1 : 0;
    for (int64_t first = oldest > 0 ? oldest / KEY_BLOCK * KEY_BLOCK : 0; first < end; first += KEY_BLOCK) {
      const int64_t n = s.keys - first < KEY_BLOCK ? s.keys - first : KEY_BLOCK;
      take_keys(first, n);
      if (turns) wait(turns[first / KEY_BLOCK], index);
      const int64_t blind = first - s.offset - first_query;  // queries that don't see it
      for (int64_t row = blind > 0 ? blind * group / PER * PER : 0; row < even; row += TILE) {
        if (a.window && first_query + row / group + s.offset - a.window >= first + n) break;
        tile_of(first_query, row, row + TILE < even ? row + TILE : even, first, n);
      }
      if (turns) __atomic_store_n(&turns[first / KEY_BLOCK], index + 1, __ATOMIC_RELEASE);
    }
    for (int64_t r = 0; r < rows; ++r) store_row((T*)g.q + at(first_query, r) * a.head_dim, dq + r * width, a.scale);
  }

  static void wait(const int32_t& turn, int32_t index) {
    for (int tries = 0; __atomic_load_n(&turn, __ATOMIC_ACQUIRE) < index; ++tries) {
      if (tries > 1000) sched_yield();
#ifdef __x86_64__
      else __builtin_ia32_pause();
#endif
    }
  }

  void store_row(T* to, const float* from, float factor) const {
    for (int64_t h = 0; h < a.head_dim; h += W) {
      const vf x = load(from + h) * factor;
      if (a.head_dim - h >= W) store(to + h, x);
      else store_some(to + h, x, a.head_dim - h);
    }
  }

  void run(int32_t* turns) {
    const int64_t step = segment_queries(group);
    for (int64_t first = p.first_query; first < p.first_query + p.num_queries; first += step) {
      const int64_t left = p.first_query + p.num_queries - first;
      segment(first / step, first, left < step ? left : step, turns);
    }
  }

  void finish() {
    for (int64_t j = 0; j < s.keys; ++j) {
      const int64_t at = ((s.first_key + j) * a.num_kv_heads + kv_head) * a.head_dim;
      store_row((T*)g.k + at, dk + j * width, a.scale), store_row((T*)g.v + at, dv + j * width, 1);
    }
  }
};

}  // namespace

KERNEL(attend_backward)(const Attention& args, const AttentionGrads& grads, const AttentionPart& part, float* room,
                        float* sums, int32_t* turns, bool is_bf16) {
  if (is_bf16)
    Backward<bf16>(args, grads, part, room, sums).run(turns);
  else
    Backward<float>(args, grads, part, room, sums).run(turns);
}

KERNEL(attend_backward_finish)(const Attention& args, const AttentionGrads& grads, const AttentionPart& part,
                               float* room, float* sums, bool is_bf16) {
  if (is_bf16)
    Backward<bf16>(args, grads, part, room, sums).finish();
  else
    Backward<float>(args, grads, part, room, sums).finish();
}
