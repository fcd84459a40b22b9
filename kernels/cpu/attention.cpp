// Attention forward, over packed rows or cached pages, compiled once per instruction set.
//
// Keys are taken in extents of KEY_EXTENT by their place in the sequence (the prefix first), in rising order. Each
// has a softmax of its own, from the largest of its scores; those are merged by log-sum-exp in rising order
// (arXiv:2311.01282, sec. 3.1). Scores and outputs are chains of multiply-adds (attention.h). So a query's bits
// depend on its place and its keys alone: not on the chunk it comes in, the rows computed beside it, on pages or
// packed rows, or the threads. Keys and values that a query doesn't see change nothing as long as they are finite.
//
//   keys of an extent -> blocks of units [H / PER_UNIT][KEY_BLOCK]     values -> units [KEY_EXTENT / PER_UNIT][H]
//   GROUP_ROWS (query, head) pairs: scores [GROUP_ROWS][KEY_EXTENT] -> exp2 -> weights -> outputs [GROUP_ROWS][H];
//   the weights of some pairs are computed between the multiply-adds of the outputs of others
#include "attention.h"
#include "attention_few.h"
#include "kernels.h"

namespace {

static_assert(GROUP_ROWS % ROWS == 0);

// One thread's scratch, laid out for its part.
struct Room {
  float *keys, *values, *queries;
  float *scores, *largest, *sums, *outputs;  // of rows and an extent; maxima are times log2(e)
  float *total_outputs, *total_largest, *total_sums;

  Room(float* memory, int64_t width, int64_t rows) {
    float* at = (float*)(((uintptr_t)memory + 63) / 64 * 64);
    const auto take = [&](int64_t size) {
      float* here = at;
      at += padded(size);
      return here;
    };
    const int64_t some = rows > GROUP_ROWS ? rows : GROUP_ROWS;
    keys = take(KEY_EXTENT * width), values = take(KEY_EXTENT * width), queries = take(rows * width);
    scores = take(some * KEY_EXTENT), largest = take(some), sums = take(some), outputs = take(some * width);
    total_outputs = take(rows * width), total_largest = take(rows), total_sums = take(rows);
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

// Keys and values to come, a share at a time.
template <class T>
struct Coming {
  Lines<T, 2> keys, values;
  int64_t share;
  void fetch() {
    for (int64_t i = 0; i < share; ++i) keys.left ? keys.next() : values.next();
  }
};

template <class T>
struct Attend {
  typedef Coming<T> Next;
  typedef typename Units<T>::Type U;
  const Attention& a;
  const AttentionPart& p;
  const Sequence& s;
  const Scores scores;
  const int64_t width, row_units, stride;  // of an output, of a query in units, from one query to the next
  Room room;
  int64_t offsets[2][KEY_EXTENT];  // where an extent's rows begin, and those of the one that is prefetched
  int now = 0;
  int64_t found = -1;  // the first key of offsets[now]

  Attend(const Attention& args, const AttentionPart& part, float* memory)
      : a(args), p(part), s(args.sequences[part.sequence]), scores(args), width(padded(args.head_dim)),
        row_units(args.head_dim / U::PER_UNIT), stride(padded(row_units)), room(memory, width, rows()) {}

  int64_t group_of(int64_t kv_head) const { return a.first_head[kv_head + 1] - a.first_head[kv_head]; }
  int64_t heads_before(int64_t kv_head) const { return a.first_head[kv_head] - a.first_head[p.first_kv_head]; }
  int64_t rows() const { return p.num_queries * heads_before(p.first_kv_head + p.num_kv_heads); }

  // Place of a row's query and head in [T, N]; the rows of a query stand together.
  int64_t query_of(int64_t row, int64_t group) const { return p.first_query + row / group; }
  int64_t head_of(int64_t kv_head, int64_t row, int64_t group) const {
    return a.heads[a.first_head[kv_head] + row % group];
  }

  // First elements of the keys [first, first + n) for kv head 0; up to a multiple of KEY_BLOCK the
  // last one again.
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
    for (; i % KEY_BLOCK; ++i) offsets[i] = offsets[n - 1];
  }

  // Those of an extent and of the next one, in this order from offsets[now ^ 1] on; gives the keys of the next one.
  int64_t take_offsets(int64_t first, int64_t n, int64_t end) {
    const int64_t left = end - first - n, next = left < 0 ? 0 : left < KEY_EXTENT ? left : KEY_EXTENT;
    if (found != first) find(first, n, offsets[now]);
    now ^= 1, found = first + n;
    if (next > 0) find(found, next, offsets[now]);
    return next;
  }

  void take_queries() {
    for (int64_t k = p.first_kv_head; k < p.first_kv_head + p.num_kv_heads; ++k) {
      const int64_t group = group_of(k), first = heads_before(k) * p.num_queries;
      for (int64_t r = 0; r < p.num_queries * group; ++r) {
        const int64_t at = (s.first_query + query_of(r, group)) * a.num_heads + head_of(k, r, group);
        float* to = room.queries + (first + r) * stride;
        for (int64_t u = 0; u < row_units; u += W) store(to + u, load_units<U>((const T*)a.q + at * a.head_dim, u, a.head_dim));
      }
    }
  }

  // Makes scores of the products of `count` rows with the n first keys of an extent, `block` [count][KEY_EXTENT], as
  // far as `weighing` doesn't; gives the rows' maxima [count].
  void find_largest(int64_t kv_head, int64_t group, int64_t row, int64_t count, int64_t first, int64_t n, float* block,
                    float* maxima) const {
    const int vecs = (n + W - 1) / W;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = query_of(row + r, group), head = head_of(kv_head, row + r, group);
      const Seen seen(s, a.window, query, first, n);
      const int whole = seen.whole();
      float* const at = block + r * KEY_EXTENT;
      vf most = splat(-INF);
      if (scores.is_plain()) {
        vf other = most;
        int v = 0;
        for (; v + 2 <= whole; v += 2) {
          most = larger(load(at + v * W), most);
          other = larger(load(at + (v + 1) * W), other);
        }
        most = larger(other, most);
        for (; v < vecs; ++v) {
          const vf x = select(seen.of(v), load(at + v * W), splat(-INF));
          store(at + v * W, x);
          most = larger(x, most);
        }
        maxima[r] = largest(most) * scores.factor;
      } else {
        for (int v = 0; v < vecs; ++v) {
          vf x = scores.of(load(at + v * W), head, query + s.offset - first, v, seen.kept);
          if (v >= whole) x = select(seen.of(v), x, splat(-INF));
          store(at + v * W, x);
          most = larger(x, most);
        }
        maxima[r] = largest(most);
      }
    }
  }

  Weighing weighing(int64_t count, int64_t n, float* block, const float* maxima, float* sums) const {
    return {block, maxima, sums, scores.is_plain() ? scores.factor : 1.0f, count, (n + W - 1) / W};
  }

  // Products become weights; gives the rows' maxima and sums, too.
  void weigh(int64_t kv_head, int64_t group, int64_t row, int64_t count, int64_t first, int64_t n, float* block,
             float* maxima, float* sums) const {
    find_largest(kv_head, group, row, count, first, n, block, maxima);
    weigh_rows<U>(weighing(count, n, block, maxima, sums));
  }

  // Rows [row, row + count) of one kv head and the n packed keys from `first` on.
  void attend_rows(int64_t kv_head, int64_t row, int64_t count, int64_t first, int64_t n, Next& next) const {
    const int64_t group = group_of(kv_head), tiles = (count + ROWS - 1) / ROWS;
    const int64_t last = query_of(row + count - 1, group) + s.offset + 1 - first;  // one past the last seen key
    const int64_t visible = last < n ? last : n;
    const float* const queries = room.queries + (heads_before(kv_head) * p.num_queries + row) * stride;
    const auto start = [&](int64_t tile) { return count * (tile < tiles ? tile : tiles) / tiles; };  // 9 rows are 4 + 5
    for (int64_t j = 0; j < visible; j += KEY_BLOCK) {
      const int64_t left = visible - j, vecs = ((left < KEY_BLOCK ? left : KEY_BLOCK) + W - 1) / W;
      for (int64_t t = 0; t < tiles; ++t)
        product<U, Into::NEW>(start(t + 1) - start(t), room.scores + start(t) * KEY_EXTENT + j, KEY_EXTENT,
                              queries + start(t) * stride, stride, 1, room.keys + j * stride, KEY_BLOCK, row_units,
                              vecs);
      next.fetch();
    }
    find_largest(kv_head, group, row, count, first, visible, room.scores, room.largest);
    const auto weighing_of = [&](int64_t t) {
      const int64_t r = start(t);
      return weighing(start(t + 1) - r, visible, room.scores + r * KEY_EXTENT, room.largest + r, room.sums + r);
    };
    weigh_rows<U>(weighing_of(0));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r = start(t);
      product_and_weights<U>(start(t + 1) - r, room.outputs + r * width, width, room.scores + r * KEY_EXTENT,
                             KEY_EXTENT, room.values, width, (visible + U::PER_UNIT - 1) / U::PER_UNIT, (a.head_dim + W - 1) / W,
                             weighing_of(t + 1));
    }
  }

  // Keys and values [first, first + n) of an extent, packed for many rows; those of the next one come to the second
  // cache level beside what is computed.
  void attend_many(int64_t first, int64_t n, int64_t end, int64_t part) {
    const int64_t coming = take_offsets(first, n, end);
    const int64_t* const here = offsets[now ^ 1];
    for (int64_t k = p.first_kv_head; k < p.first_kv_head + p.num_kv_heads; ++k) {
      const int64_t group = group_of(k), count = p.num_queries * group, before = heads_before(k) * p.num_queries;
      if (group == 0) continue;
      const T *const keys = (const T*)a.keys + k * a.head_dim, *const values = (const T*)a.values + k * a.head_dim;
      for (int64_t j = 0; j < n; j += KEY_BLOCK)
        pack_columns<U>(room.keys + j * stride, keys, here + j, KEY_BLOCK, a.head_dim);
      pack_units<U>(room.values, values, here, (n + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK, a.head_dim);
      Next next{{keys, offsets[now], coming, a.head_dim}, {values, offsets[now], coming, a.head_dim}, 0};
      next.share = (2 * next.keys.left * GROUP_ROWS * KEY_BLOCK + count * n - 1) / (count * n);
      const int64_t blind = first - s.offset - p.first_query;  // queries that see nothing of it come first
      for (int64_t row = blind > 0 ? blind * group : 0; row < count; row += GROUP_ROWS) {
        const int64_t tile = count - row < GROUP_ROWS ? count - row : GROUP_ROWS;
        attend_rows(k, row, tile, first, n, next);
        for (int64_t r = 0; r < tile; ++r) add(before + row + r, part, r);
      }
    }
  }

  // What row `from` of the room holds of one extent is that of row `row` of the part.
  void add(int64_t row, int64_t part, int64_t from) const {
    const float* const outputs = room.outputs + from * width;
    if (p.part < 0) {
      merge(room.total_outputs + row * width, room.total_largest[row], room.total_sums[row], outputs,
            room.largest[from], room.sums[from], width);
      return;
    }
    float* to = a.parts + (part * a.num_heads + a.first_head[p.first_kv_head] + row) * (width + 2);
    memcpy(to, outputs, width * sizeof(float));
    to[width] = room.largest[from], to[width + 1] = room.sums[from];
  }

  void add_nothing(int64_t row, int64_t part) const {
    float* to = a.parts + (part * a.num_heads + a.first_head[p.first_kv_head] + row) * (width + 2);
    memset(to, 0, (width + 2) * sizeof(float));
    to[width] = -INF;
  }

  // Packing pays where many rows use what was packed.
  bool is_few() const {
    bool few = p.num_queries == 1;
    for (int64_t k = p.first_kv_head; k < p.first_kv_head + p.num_kv_heads; ++k) few &= group_of(k) <= FEW_ROWS;
    return few;
  }

  // One query's heads and the keys of an extent: RUN keys of one kv head after the other, then the values, from where
  // they lie in memory; what later steps read is prefetched.
  void attend_few(int64_t first, int64_t n, int64_t end, int64_t part) {
    const bool is_cold = found != first;
    const int64_t next = take_offsets(first, n, end), steps = 2 * steps_of(n);
    const int64_t* const here = offsets[now ^ 1];
    for (int64_t step = 0; is_cold && step < Ahead<U>::FAR; ++step) lines_of(step, n, here).all();
    const auto lines_at = [&](int64_t at) {
      return at < steps ? lines_of(at, n, here) : lines_of(at - steps, next, offsets[now]);
    };
    const auto ahead_of = [&](int64_t step) {
      Lines<T> lines = lines_at(step + Ahead<U>::FAR);
      if (lines.per_row > Ahead<U>::ONCE) lines.ask_again(lines_at(step + Ahead<U>::SOON));
      return lines;
    };
    const int64_t last_head = p.first_kv_head + p.num_kv_heads;
    int64_t step = 0;
    for (int64_t i = 0; i < n; i += RUN)
      for (int64_t k = p.first_kv_head; k < last_head; ++k) {
        Lines<T> ahead = ahead_of(step++);
        few_scores<U>(group_of(k), scores_of(k) + i, room.queries + heads_before(k) * stride, stride,
                      (const T*)a.keys + k * a.head_dim, here + i, a.head_dim, ahead);
        ahead.all();
      }
    for (int64_t k = p.first_kv_head; k < last_head; ++k)
      weigh(k, group_of(k), 0, group_of(k), first, n, scores_of(k), room.largest + heads_before(k),
            room.sums + heads_before(k));
    for (int64_t i = 0; i < n; i += RUN)
      for (int64_t k = p.first_kv_head; k < last_head; ++k) {
        const int64_t some = n - i < RUN ? n - i : RUN;
        Lines<T> ahead = ahead_of(step++);
        few_outputs<U>(group_of(k), room.outputs + heads_before(k) * width, width, i == 0,
                       scores_of(k) + i / U::PER_UNIT, (const T*)a.values + k * a.head_dim, here + i,
                       (some + U::PER_UNIT - 1) / U::PER_UNIT, a.head_dim, ahead);
        ahead.all();
      }
    for (int64_t r = 0; r < rows(); ++r) add(r, part, r);
  }

  float* scores_of(int64_t kv_head) const { return room.scores + heads_before(kv_head) * KEY_EXTENT; }

  // Steps through n keys, as many as through its values.
  int64_t steps_of(int64_t n) const { return (n + RUN - 1) / RUN * p.num_kv_heads; }

  // What a step reads.
  Lines<T> lines_of(int64_t step, int64_t n, const int64_t* rows) const {
    const int64_t keys = steps_of(n), at = step < keys ? step : step - keys, run = at / p.num_kv_heads;
    const T* const from = (const T*)(step < keys ? a.keys : a.values) +
                          (p.first_kv_head + at - run * p.num_kv_heads) * a.head_dim;
    return Lines<T>(from, rows + run * RUN, step < 2 * keys ? RUN : 0, a.head_dim);
  }

  void run() {
    take_queries();
    const int64_t count = rows(), last_seen = p.first_query + p.num_queries + s.offset;
    const int64_t end = last_seen < p.last_key ? last_seen : p.last_key;
    const int64_t oldest = a.window ? p.first_query + s.offset - a.window + 1 : 0;
    const bool few = is_few();
    memset(room.total_outputs, 0, count * width * sizeof(float));
    for (int64_t r = 0; r < count; ++r) room.total_largest[r] = -INF, room.total_sums[r] = 0;
    for (int64_t first = p.first_key, part = p.part; first < p.last_key; first += KEY_EXTENT, ++part) {
      // blocks before the window: whole ones alone, so that vectors stay in their places
      int64_t from = first, to = first + KEY_EXTENT < end ? first + KEY_EXTENT : end;
      while (from < to && from + KEY_BLOCK <= oldest && from >= s.prefix) from += KEY_BLOCK;
      if (from >= to) {
        for (int64_t r = 0; p.part >= 0 && r < count; ++r) add_nothing(r, part);
      } else if (few) {
        attend_few(from, to - from, end, part);
      } else {
        attend_many(from, to - from, end, part);
      }
    }
    if (p.part >= 0) return;
    for (int64_t k = p.first_kv_head; k < p.first_kv_head + p.num_kv_heads; ++k) {
      const int64_t group = group_of(k), before = heads_before(k) * p.num_queries;
      for (int64_t r = 0; r < p.num_queries * group; ++r)
        finish(s.first_query + query_of(r, group), head_of(k, r, group), room.total_outputs + (before + r) * width,
               room.total_largest[before + r], room.total_sums[before + r]);
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
      float *out = room.total_outputs, most = -INF, sum = 0;
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
