// Draws tokens from rows of logits without sorting them; `kernels.sampling` defines what is drawn. Compiled once per
// instruction set.
//
// Weights are integers, so a sum of them is the same in any order. What lies at a given place of the sorted row is found
// by histograms: the bucket that holds the place, then that bucket's tokens alone in finer buckets, until few are left
// to sort. Buckets are equal parts of the range of logits, so nothing equal is ever parted.
#include <math.h>

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "kernels.h"
#include "vec.h"

namespace {

constexpr int BUCKETS = 1024, FEW = 128;  // FEW: sorted at once
constexpr int64_t ONE = int64_t(1) << 42;  // the weight of the likeliest token
constexpr int HALF = W / 2;

typedef double vd __attribute__((vector_size(W * 4), aligned(8), may_alias));
typedef int64_t vl __attribute__((vector_size(W * 4), aligned(8), may_alias));
typedef float vhf __attribute__((vector_size(W * 2), aligned(4), may_alias));

inline vd splat_d(double x) { return x - vd{}; }

inline vd fma(vd a, vd b, vd c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// round(ONE * exp(x)) for x <= 0; 0 from x = -32 down. Cody and Waite's reduction, then Taylor's series to r^11 / 11!.
inline vl weight(vd x) {
  const vl is_low = x < splat_d(-50.0);
  x = (vd)(((vl)x & ~is_low) | ((vl)splat_d(-50.0) & is_low));
  const vd shifter = splat_d(6755399441055744.0);  // 1.5 * 2^52: adding it rounds to an integer, kept in the low bits
  const vd shifted = fma(x, splat_d(1.4426950408889634), shifter), n = shifted - shifter;
  vd r = fma(n, splat_d(-6.93147180369123816490e-01), x);
  r = fma(n, splat_d(-1.90821492927058770002e-10), r);
  vd y = splat_d(1.0 / 39916800);
  for (double factor : {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                        1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    y = fma(y, r, splat_d(factor));
  const vd scaled = (vd)((vl)y + ((vl)shifted << 52));  // y * 2^n
  const vd whole = fma(scaled, splat_d(double(ONE)), splat_d(4503599627370496.0));  // + 2^52
  return (vl)whole - (vl)splat_d(4503599627370496.0);
}

inline vd widened(const float* logits) {
#if defined(__AVX512F__)  // GCC 12 would convert by halves
  return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(logits));
#else
  return __builtin_convertvector(*(const vhf*)logits, vd);
#endif
}

inline vl weight(const float* logits, double largest, double scale) {
  return weight((widened(logits) - largest) * scale);
}

// f(i, weights, n) for HALF tokens at a time; n < HALF of them in the last call, the others' weights are 0.
template <class F>
void each_weight(const float* logits, int64_t count, double largest, double scale, F f) {
  int64_t i = 0;
  for (; i + HALF <= count; i += HALF) f(i, weight(logits + i, largest, scale), HALF);
  if (i == count) return;
  float rest[HALF];
  for (int j = 0; j < HALF; ++j) rest[j] = i + j < count ? logits[i + j] : -__builtin_inff();
  f(i, weight(rest, largest, scale), int(count - i));
}

struct Range {
  float low, high;
  bool has_nan;
};

Range range_of(const float* logits, int64_t count) {
  constexpr int CHAINS = 4;
  vf low[CHAINS], high[CHAINS];
  vi has_nan[CHAINS] = {};
  for (int c = 0; c < CHAINS; ++c) low[c] = splat(__builtin_inff()), high[c] = -low[c];
  int64_t i = 0;
  for (; i + CHAINS * W <= count; i += CHAINS * W)
    for (int c = 0; c < CHAINS; ++c) {
      const vf x = load(logits + i + c * W);
      low[c] = select((vi)(x < low[c]), x, low[c]);
      high[c] = select((vi)(x > high[c]), x, high[c]);
      has_nan[c] |= (vi)(x != x);
    }
  Range range{__builtin_inff(), -__builtin_inff(), false};
  const auto add = [&](float least, float most, bool is_nan) {
    if (least < range.low) range.low = least;
    if (most > range.high) range.high = most;
    range.has_nan |= is_nan;
  };
  for (int c = 0; c < CHAINS; ++c)
    for (int j = 0; j < W; ++j) add(low[c][j], high[c][j], has_nan[c][j]);
  for (; i < count; ++i) add(logits[i], logits[i], logits[i] != logits[i]);
  return range;
}

struct Token {
  int64_t weight;
  float logit;
  int32_t id;
};

inline bool before(const Token& a, const Token& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

// Tokens with rising ids, and room for their places in a histogram.
struct List {
  float* logits;
  int32_t* ids;
  int64_t* weights;
  uint16_t* buckets;
  int64_t count = 0;

  explicit List(int64_t room) {
    room += W;  // vectors are stored whole
    logits = (float*)malloc(room * sizeof(float));
    ids = (int32_t*)malloc(room * sizeof(int32_t));
    weights = (int64_t*)malloc(room * sizeof(int64_t));
    buckets = (uint16_t*)malloc(room * sizeof(uint16_t));
    logits[0] = 0;  // for the compiler, which sees that an empty list might be read
  }
  ~List() { free(logits), free(ids), free(weights), free(buckets); }
  List(const List&) = delete;

  void add(float logit, int32_t id) {
    logits[count] = logit;
    ids[count++] = id;
  }

  // A whole row.
  void fill(const float* row, int64_t size) {
    memcpy(logits, row, size * sizeof(float));
    for (int64_t i = 0; i < size; ++i) ids[i] = int32_t(i);
    count = size;
  }

  // Tokens that are no less than `floor`, of a row or (with its ids) of this list.
  void fill_from(float floor, const float* from, const int32_t* from_ids, int64_t size) {
    count = 0;
    for (int64_t i = 0; i < size; ++i) {
      const float logit = from[i];
      logits[count] = logit;
      ids[count] = from_ids ? from_ids[i] : int32_t(i);
      count += logit >= floor;
    }
  }
};

struct Place {
  int32_t id;
  float logit;
  int64_t sum;  // of the weights up to it, its own included
};

// A list in the order of falling logits and rising ids, as far as it needs to be known.
class Order {
 public:
  explicit Order(const List& list) : list(list) {
    const Range range = range_of(list.logits, list.count);
    high = range.high, low = range.low;
    scale = (BUCKETS - 1) / (high - low);
    is_counted = list.count > FEW && high > low && scale <= __FLT_MAX__;
    if (is_counted) count();
  }

  // The first token at which the running sum of weights exceeds x, which is less than the whole sum.
  Place find(int64_t x) const {
    if (!is_counted) return high > low ? find_sorted(x) : find_in_order(x);
    int64_t sum = 0;
    int bucket = 0;
    for (; bucket < BUCKETS - 1 && sum + sums[bucket] <= x; ++bucket) sum += sums[bucket];
    int64_t found = 0;
    for (int64_t i = 0; i < list.count; i += STEP) found += count_in(bucket, i);
    List part(found);
    for (int64_t i = 0; i < list.count; i += STEP) {
      if (!count_in(bucket, i)) continue;
      for (int64_t j = i; j < list.count && j < i + STEP; ++j) {
        if (list.buckets[j] != bucket) continue;
        part.weights[part.count] = list.weights[j];
        part.add(list.logits[j], list.ids[j]);
      }
    }
    Place place = Order(part).find(x - sum);
    place.sum += sum;
    return place;
  }

 private:
  const List& list;
  float high, low, scale;
  bool is_counted;
  int64_t sums[BUCKETS];
  static constexpr int64_t STEP = 256;

  int count_in(int bucket, int64_t first) const {
    const int64_t stop = first + STEP < list.count ? first + STEP : list.count;
    uint16_t found = 0;
    for (int64_t i = first; i < stop; ++i) found += list.buckets[i] == uint16_t(bucket);
    return found;
  }

  void count() {
    for (int64_t i = 0; i < list.count; ++i) {
      const int32_t bucket = int32_t((high - list.logits[i]) * scale);
      list.buckets[i] = uint16_t(bucket < BUCKETS ? bucket : BUCKETS - 1);
    }
    memset(sums, 0, sizeof sums);
    for (int64_t i = 0; i < list.count; ++i) sums[list.buckets[i]] += list.weights[i];
  }

  Place find_in_order(int64_t x) const {
    Place place{};
    for (int64_t i = 0; i < list.count && place.sum <= x; ++i)
      place = {list.ids[i], list.logits[i], place.sum + list.weights[i]};
    return place;
  }

  Place find_sorted(int64_t x) const {
    Token* tokens = (Token*)malloc(list.count * sizeof(Token));
    for (int64_t i = 0; i < list.count; ++i) tokens[i] = {list.weights[i], list.logits[i], list.ids[i]};
    std::sort(tokens, tokens + list.count, before);
    Place place{};
    for (int64_t i = 0; i < list.count && place.sum <= x; ++i)
      place = {tokens[i].id, tokens[i].logit, place.sum + tokens[i].weight};
    free(tokens);
    return place;
  }
};

// Where `value`, which is among the logits, comes first; whole steps are compared in vectors.
int64_t first_of(const float* logits, int64_t count, float value) {
  constexpr int64_t STEP = 256;
  int64_t i = 0;
  for (; i + STEP <= count; i += STEP) {
    int32_t found = 0;
    for (int64_t j = i; j < i + STEP; ++j) found |= logits[j] == value;
    if (found) break;
  }
  while (logits[i] != value) ++i;
  return i;
}

// room: for a list of all tokens, made when it is first needed.
int64_t draw_one(const DrawArgs& a, int64_t n, std::optional<List>& room) {
  const float* logits = a.logits + a.rows[n] * a.row_stride;
  const Range range = range_of(logits, a.vocab);
  const float largest = range.high;
  if (range.has_nan || __builtin_fabsf(largest) > __FLT_MAX__) return -1;
  const double temperature = a.temperature[n];
  if (temperature <= 0) return first_of(logits, a.vocab, largest);
  if (!room) room.emplace(a.vocab);
  List& list = *room;
  double floor = largest - 33 * temperature;  // below, weights are 0
  if (a.min_p[n] > 0) floor = std::max(floor, largest + temperature * log(a.min_p[n]));
  if (range.low >= float(floor)) list.fill(logits, a.vocab);
  else list.fill_from(float(floor), logits, nullptr, a.vocab);
  if (a.top_k[n] > 0 && a.top_k[n] < list.count) {
    for (int64_t i = 0; i < list.count; ++i) list.weights[i] = 1;
    list.fill_from(Order(list).find(a.top_k[n] - 1).logit, list.logits, list.ids, list.count);
  }
  vl sums = {};
  each_weight(list.logits, list.count, largest, 1 / temperature, [&](int64_t i, vl w, int) {
    *(vl*)(list.weights + i) = w;
    sums += w;
  });
  int64_t total = 0;
  for (int i = 0; i < HALF; ++i) total += sums[i];
  const Order order(list);
  if (a.top_p[n] < 1) {
    const double mass = ceil(a.top_p[n] * double(total));
    const int64_t least = mass < 1 ? 1 : mass < double(total) ? int64_t(mass) : total;
    total = order.find(least - 1).sum;
  }
  const auto quantile = (unsigned __int128)(uint64_t(a.u[n] * 9007199254740992.0));  // 2^53
  return order.find(int64_t((quantile * uint64_t(total)) >> 53)).id;
}

void logprob_one(const LogProbArgs& a, int64_t n) {
  const float* logits = a.logits + a.rows[n] * a.row_stride;
  const float largest = range_of(logits, a.vocab).high;
  vl sums = {};
  each_weight(logits, a.vocab, largest, 1.0, [&](int64_t, vl w, int) { sums += w; });
  int64_t total = 0;
  for (int i = 0; i < HALF; ++i) total += sums[i];
  const double norm = largest + log(double(total) / double(ONE));
  a.logprob[n] = logits[a.ids[n]] - norm;
  int64_t* ids = a.top_ids + n * a.width;
  double* values = a.top_logprobs + n * a.width;
  int64_t found = 0;
  for (int64_t i = 0; i < a.vocab && a.num_top[n] > 0; ++i) {  // kept sorted; of equals the earlier stays before
    const float x = logits[i];
    if ((found == a.num_top[n] && x <= values[found - 1]) || x == -__builtin_inff()) continue;
    int64_t at = found < a.num_top[n] ? found++ : found - 1;
    for (; at > 0 && values[at - 1] < x; --at) values[at] = values[at - 1], ids[at] = ids[at - 1];
    values[at] = x, ids[at] = i;
  }
  for (int64_t i = 0; i < found; ++i) values[i] -= norm;
  for (int64_t i = found; i < a.width; ++i) values[i] = -__builtin_inf(), ids[i] = -1;
}

}  // namespace

KERNEL(draw)(const DrawArgs& args, int64_t first, int64_t last) {
  std::optional<List> room;
  for (int64_t n = first; n < last; ++n) args.ids[n] = draw_one(args, n, room);
}

KERNEL(logprobs)(const LogProbArgs& args, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) logprob_one(args, n);
}
