// Attention forward, over packed rows or cached pages, compiled once per instruction set.
//
// Keys are taken in blocks of KEY_BLOCK by their place in the sequence (the prefix first), in rising order, with a
// running maximum and sum (arXiv:2205.14135); every KEY_EXTENT keys a new softmax begins, and those are merged by
// log-sum-exp in rising order (arXiv:2311.01282, sec. 3.1). Scores and outputs are chains of multiply-adds (attention.h).
// So a query's bits depend on its place and its keys alone: not on the chunk it comes in, the rows computed beside it,
// on pages or packed rows, or the threads. Keys and values that a query doesn't see change nothing as long as they are
// finite.
//
//   rows of keys -> units [H / PER_UNIT][KEY_BLOCK]       rows of values -> units [KEY_BLOCK / PER_UNIT][H]
//   up to ROWS (query, head) pairs: scores [ROWS][KEY_BLOCK] -> exp2 -> weights -> output [ROWS][H]
#include <initializer_list>

#include "attention.h"
#include "attention_few.h"
#include "kernels.h"

namespace {

// Outputs, maxima (times log2(e)) and sums of some rows.
struct State {
  float *outputs, *largest, *sums;
};

// One thread's scratch, laid out for its part.
struct Room {
  float *keys, *values, *queries, *sums;  // sums: [rows][16], one per lane
  float *scores, *keep;                   // of few rows: [rows][KEY_BLOCK], [rows][16]
  State part, total;

  Room(float* memory, int64_t width, int64_t rows) {
    float* at = (float*)(((uintptr_t)memory + 63) / 64 * 64);
    const auto take = [&](int64_t size) {
      float* here = at;
      at += size;
      return here;
    };
    keys = take(KEY_BLOCK * width), values = take(KEY_BLOCK * width), queries = take(rows * width);
    part.outputs = take(rows * width), total.outputs = take(rows * width), sums = take(rows * 16), scores = take(rows * KEY_BLOCK), keep = take(rows * 16);
    part.largest = take(rows), part.sums = take(rows), total.largest = take(rows), total.sums = take(rows);
  }
};

// Adds one part's softmax to the total of the parts before it.
inline void merge(float* outputs, float& most, float& sum, const float* part, float part_most, float part_sum,
                  int64_t width) {
  const float next = part_most > most ? part_most : most, base = next == -INF ? 0 : next;
  const float keep = exp2(most - base), add = exp2(part_most - base);
  for (int64_t h = 0; h < width; h += W)
    store(outputs + h, fma(load(part + h), splat(add), load(outputs + h) * keep));
  sum = fma(splat(part_sum), splat(add), splat(sum * keep))[0];
  most = next;
}

template <class T>
struct Attend {
  typedef typename Units<T>::Type U;
  const Attention& a;
  const AttentionPart& p;
  const Sequence& s;
  const Scores scores;
  const int64_t width, row_units;  // of an output, of a query in units
  Room room;
  int64_t offsets[2][KEY_BLOCK];  // where a block's rows begin, and those of the one that is prefetched
  int now = 0;
  int64_t found = -1;  // the first key of offsets[now]

  Attend(const Attention& args, const AttentionPart& part, float* memory)
      : a(args), p(part), s(args.sequences[part.sequence]), scores(args), width(padded(args.head_dim)),
        row_units(args.head_dim / U::PER_UNIT), room(memory, width, rows()) {}

  int64_t group_of(int64_t kv_head) const { return a.first_head[kv_head + 1] - a.first_head[kv_head]; }
  int64_t heads_before(int64_t kv_head) const { return a.first_head[kv_head] - a.first_head[p.first_kv_head]; }
  int64_t rows() const { return p.num_queries * heads_before(p.first_kv_head + p.num_kv_heads); }

  // Place of a row's query and head in [T, N]; the rows of a query stand together.
  int64_t query_of(int64_t row, int64_t group) const { return p.first_query + row / group; }
  int64_t head_of(int64_t kv_head, int64_t row, int64_t group) const {
    return a.heads[a.first_head[kv_head] + row % group];
  }

  // First elements of the keys [first, first + n) for kv head 0; up to KEY_BLOCK the last one again.
  void find(int64_t first, int64_t n, int64_t* offsets) const {
    const int64_t size = a.num_kv_heads * a.head_dim;
    int64_t i = 0;
    if (!a.table)
      for (; i < n; ++i) offsets[i] = (s.first_key + first + i) * size;
    while (i < n) {
      const bool in_prefix = first + i < s.prefix;
      const uint64_t at = first + i - (in_prefix ? 0 : s.prefix), page = at / uint64_t(a.page_size);
      const int64_t slot = at - page * a.page_size;
      const int64_t* pages = in_prefix ? a.prefix_table + p.sequence * a.prefix_width : a.table + p.sequence * a.table_width;
      int64_t end = i + a.page_size - slot;  // of this page or the prefix
      if (in_prefix && end > s.prefix - first) end = s.prefix - first;
      if (end > n) end = n;
      for (int64_t offset = (pages[page] * a.page_size + slot) * size; i < end; ++i, offset += size) offsets[i] = offset;
    }
    for (; i < KEY_BLOCK; ++i) offsets[i] = offsets[n - 1];
  }

  void take_queries() {
    for (int64_t k = p.first_kv_head; k < p.first_kv_head + p.num_kv_heads; ++k) {
      const int64_t group = group_of(k), first = heads_before(k) * p.num_queries;
      for (int64_t r = 0; r < p.num_queries * group; ++r) {
        const int64_t at = (s.first_query + query_of(r, group)) * a.num_heads + head_of(k, r, group);
        float* to = room.queries + (first + r) * width;
        for (int64_t u = 0; u < row_units; u += W) store(to + u, load_units<U>((const T*)a.q + at * a.head_dim, u, a.head_dim));
      }
    }
  }

  void begin() {
    const int64_t count = rows();
    memset(room.part.outputs, 0, count * width * sizeof(float));
    memset(room.sums, 0, count * 16 * sizeof(float));
    for (int64_t r = 0; r < count; ++r) room.part.largest[r] = -INF;
  }

  // Products of `count` rows with the n first keys of a block, `block` [count][KEY_BLOCK], become their weights; `keep`:
  // what the rows' outputs so far are multiplied by.
  void weigh(int64_t kv_head, int64_t group, int64_t row, int64_t count, int64_t first, int64_t n, float* block,
             float* keep) const {
    const int64_t begin = heads_before(kv_head) * p.num_queries + row;
    const int vecs = (n + W - 1) / W;
    float fall[16] = {};
    vf top[FEW_ROWS];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = query_of(row + r, group), head = head_of(kv_head, row + r, group);
      const Seen seen(s, a.window, query, first, n);
      const int64_t distance = query + s.offset - first;
      vf most = splat(-INF);
      const bool all = seen.all();
      for (int v = 0; v < vecs; ++v) {
        vf x = scores.of(load(block + r * KEY_BLOCK + v * W), head, distance, v, seen.kept);
        if (!all) x = select(seen.of(v), x, splat(-INF));
        store(block + r * KEY_BLOCK + v * W, x);
        most = larger(x, most);
      }
      float& before = room.part.largest[begin + r];
      const float next = largest(larger(most, splat(before)));
      const float base = next == -INF ? 0 : next;  // nothing seen so far
      fall[r] = before - base;
      before = next;
      top[r] = splat(base);
    }
    for (int r = 0; r < count; r += W) store(keep + r, exp2(load(fall + r)));
    for (int64_t r = 0; r < count; ++r) {
      vf w[KEY_VECS], sum = load(room.sums + (begin + r) * 16) * keep[r];
      for (int v = 0; v < vecs; ++v) {
        w[v] = exp2(load(block + r * KEY_BLOCK + v * W) - top[r]);
        sum += w[v];
      }
      store(room.sums + (begin + r) * 16, sum);
      store_weights((U*)nullptr, block + r * KEY_BLOCK, w, vecs);
    }
  }

  void attend_block(int64_t kv_head, int64_t first, int64_t n) const {
    const int64_t group = group_of(kv_head), count = p.num_queries * group;
    const int64_t before = heads_before(kv_head) * p.num_queries;
    // queries that see nothing of it come first
    const int64_t blind = first - s.offset - p.first_query, start = blind > 0 ? blind * group : 0;
    const int64_t tiles = (count - start + ROWS - 1) / ROWS;
    for (int64_t t = 0; t < tiles; ++t) {  // balanced: 9 rows are 5 + 4
      const int64_t row = start + (count - start) * t / tiles, some = start + (count - start) * (t + 1) / tiles - row;
      alignas(64) float weights[ROWS * KEY_BLOCK], keep[16];
      const int64_t last = query_of(row + some - 1, group) + s.offset + 1 - first;  // one past the last seen key
      const int64_t visible = last < n ? last : n;
      product<U, Into::NEW>(some, weights, KEY_BLOCK, nullptr, room.queries + (before + row) * width, width, 1, room.keys,
                             KEY_BLOCK, row_units, (visible + W - 1) / W);
      weigh(kv_head, group, row, some, first, visible, weights, keep);
      product<U, Into::KEPT>(some, room.part.outputs + (before + row) * width, width, keep, weights, KEY_BLOCK, 1,
                             room.values, width, (visible + U::PER_UNIT - 1) / U::PER_UNIT, (a.head_dim + W - 1) / W);
    }
  }

  // Keys and values [first, last) into room.part.
  void attend_keys(int64_t first, int64_t last, int64_t end) {
    begin();
    const bool few = is_few();
    for (; first < last; first += KEY_BLOCK) {
      const int64_t n = last - first < KEY_BLOCK ? last - first : KEY_BLOCK;
      if (few) {
        attend_block_few(first, n, end);
        continue;
      }
      find(first, n, offsets[0]);
      for (int64_t k = p.first_kv_head; k < p.first_kv_head + p.num_kv_heads; ++k) {
        if (group_of(k) == 0) continue;
        pack_columns<U>(room.keys, (const T*)a.keys + k * a.head_dim, offsets[0], KEY_BLOCK, a.head_dim);
        pack_units<U>(room.values, (const T*)a.values + k * a.head_dim, offsets[0], KEY_BLOCK, a.head_dim);
        attend_block(k, first, n);
      }
    }
    for (int64_t r = 0; r < rows(); ++r) room.part.sums[r] = sum(load(room.sums + r * 16));
  }

  // Packing pays where many rows use what was packed.
  bool is_few() const {
    bool few = p.num_queries == 1;
    for (int64_t k = p.first_kv_head; k < p.first_kv_head + p.num_kv_heads; ++k) few &= group_of(k) <= FEW_ROWS;
    return few;
  }

  // One query's heads: RUN keys of one kv head after the other, then the values, from where they lie in memory; AHEAD
  // such steps before, they are prefetched.
  void attend_block_few(int64_t first, int64_t n, int64_t end) {
    const int64_t left = end - first - n, next = left < 0 ? 0 : left < KEY_BLOCK ? left : KEY_BLOCK;
    const int64_t steps = 2 * steps_of(n);
    if (found != first) {
      find(first, n, offsets[0]);
      for (int64_t step = 0; step < AHEAD; ++step) fetch(step, n, offsets[0]);
      now = 0;
    }
    const int64_t* const here = offsets[now];
    now ^= 1, found = first + n;
    if (next > 0) find(found, next, offsets[now]);
    const auto fetch_ahead = [&](int64_t step) {
      if (step + AHEAD < steps) fetch(step + AHEAD, n, here);
      else fetch(step + AHEAD - steps, next, offsets[now]);
    };
    const int64_t last_head = p.first_kv_head + p.num_kv_heads;
    int64_t step = 0;
    for (int64_t i = 0; i < n; i += RUN)
      for (int64_t k = p.first_kv_head; k < last_head; ++k) {
        fetch_ahead(step++);
        few_scores<U>(group_of(k), scores_of(k) + i, room.queries + heads_before(k) * width, width,
                      (const T*)a.keys + k * a.head_dim, here + i, a.head_dim);
      }
    for (int64_t k = p.first_kv_head; k < last_head; ++k)
      weigh(k, group_of(k), 0, group_of(k), first, n, scores_of(k), room.keep + 16 * heads_before(k));
    for (int64_t i = 0; i < n; i += RUN)
      for (int64_t k = p.first_kv_head; k < last_head; ++k) {
        fetch_ahead(step++);
        const int64_t some = n - i < RUN ? n - i : RUN;
        few_outputs<U>(group_of(k), room.part.outputs + heads_before(k) * width, width,
                       i ? nullptr : room.keep + 16 * heads_before(k), scores_of(k) + i / U::PER_UNIT,
                       (const T*)a.values + k * a.head_dim, here + i, (some + U::PER_UNIT - 1) / U::PER_UNIT, a.head_dim);
      }
  }

  float* scores_of(int64_t kv_head) const { return room.scores + heads_before(kv_head) * KEY_BLOCK; }

  // Steps through the keys of a block of n, as many as through its values.
  int64_t steps_of(int64_t n) const { return (n + RUN - 1) / RUN * p.num_kv_heads; }

  // Prefetches what a step reads. In the order of memory: in another one it takes twice as long.
  void fetch(int64_t step, int64_t n, const int64_t* rows) const {
    asm volatile("");  // GCC takes a function that only prefetches for one without effect, and drops the calls
    const int64_t keys = steps_of(n), at = step < keys ? step : step - keys, run = at / p.num_kv_heads;
    if (step >= 2 * keys) return;
    const T* const from = (const T*)(step < keys ? a.keys : a.values) +
                          (p.first_kv_head + at - run * p.num_kv_heads) * a.head_dim;
    for (int64_t i = run * RUN; i < (run + 1) * RUN; ++i)
      for (int64_t h = 0; h < a.head_dim; h += 64 / sizeof(T)) __builtin_prefetch(from + rows[i] + h);
  }

  void run() {
    take_queries();
    const int64_t count = rows(), last_seen = p.first_query + p.num_queries + s.offset;
    const int64_t end = last_seen < p.last_key ? last_seen : p.last_key;
    const int64_t oldest = a.window ? p.first_query + s.offset - a.window + 1 : 0;
    const State& total = room.total;
    if (p.part < 0) {
      memset(total.outputs, 0, count * width * sizeof(float));
      for (int64_t r = 0; r < count; ++r) total.largest[r] = -INF, total.sums[r] = 0;
    }
    for (int64_t first = p.first_key, part = p.part; first < p.last_key; first += KEY_EXTENT, ++part) {
      // blocks before the window: whole ones alone, so that blocks stay in their places
      int64_t from = first, to = first + KEY_EXTENT < end ? first + KEY_EXTENT : end;
      while (from < to && from + KEY_BLOCK <= oldest && from >= s.prefix) from += KEY_BLOCK;
      if (from < to || p.part >= 0) attend_keys(from, to, end);
      if (p.part >= 0) {
        for (int64_t r = 0; r < count; ++r) {
          float* to_part = a.parts + (part * a.num_heads + a.first_head[p.first_kv_head] + r) * (width + 2);
          memcpy(to_part, room.part.outputs + r * width, width * sizeof(float));
          to_part[width] = room.part.largest[r], to_part[width + 1] = room.part.sums[r];
        }
      } else if (from < to) {
        for (int64_t r = 0; r < count; ++r)
          merge(total.outputs + r * width, total.largest[r], total.sums[r], room.part.outputs + r * width,
                room.part.largest[r], room.part.sums[r], width);
      }
    }
    if (p.part >= 0) return;
    for (int64_t k = p.first_kv_head; k < p.first_kv_head + p.num_kv_heads; ++k) {
      const int64_t group = group_of(k), before = heads_before(k) * p.num_queries;
      for (int64_t r = 0; r < p.num_queries * group; ++r)
        finish(s.first_query + query_of(r, group), head_of(k, r, group), total.outputs + (before + r) * width,
               total.largest[before + r], total.sums[before + r]);
    }
  }

  // A query that sees no key has output 0 and lse -inf.
  void finish(int64_t query, int64_t head, const float* from, float most, float sum) const {
    const float one_over = sum == 0 ? 0 : 1 / sum;
    T* out = (T*)a.out + (query * a.num_heads + head) * a.head_dim;
    for (int64_t h = 0; h < a.head_dim; h += W) {
      const vf x = load(from + h) * one_over;
      if (a.head_dim - h >= W) store(out + h, x);
      else store_some(out + h, x, a.head_dim - h);
    }
    a.lse[query * a.num_heads + head] = sum == 0 ? -INF : most * LN_2 + __builtin_logf(sum);
  }

  // The parts [first, last) of the one query of the sequence.
  void join(int64_t first, int64_t last) {
    for (int64_t n = 0; n < a.num_heads; ++n) {
      float *out = room.total.outputs, most = -INF, sum = 0;
      memset(out, 0, width * sizeof(float));
      for (int64_t i = first; i < last; ++i) {
        const float* from = a.parts + (i * a.num_heads + n) * (width + 2);
        merge(out, most, sum, from, from[width], from[width + 1], width);
      }
      finish(s.first_query, a.heads[n], out, most, sum);
    }
  }
};

}  // namespace

KERNEL(attend)(const Attention& args, const AttentionPart& part, float* room, bool is_bf16) {
  if (is_bf16)
    Attend<bf16>(args, part, room).run();
  else
    Attend<float>(args, part, room).run();
}

KERNEL(attend_join)(const Attention& args, const AttentionPart& part, int64_t first, int64_t last, float* room,
                    bool is_bf16) {
  if (is_bf16)
    Attend<bf16>(args, part, room).join(first, last);
  else
    Attend<float>(args, part, room).join(first, last);
}
