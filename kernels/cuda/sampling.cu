// Draws a token from each row of logits, and finds log-probabilities, without sorting the row: what lies at a given place
// of the sorted row is found digit by digit of the logit, from sums per digit.
//
// Weights are integers: sums are the same in whatever order the threads add, and atomics may add them.
#include "vector.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, DIGITS = 256;
constexpr double ONE = 4398046511104.0;  // 2^42, the weight of the largest logit
constexpr double LOWEST = 33;            // temperatures below the largest: weights are 0 from 30 on
using Count = unsigned long long;

// Smaller for a larger logit, the same for equal ones.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.f);  // -0 becomes 0
  return bits >> 31 ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float logit_of(unsigned key) {
  return __uint_as_float(key >> 31 ? key : ~key & 0x7fffffffu);
}

// The sum of `own` over this thread and those before it.
__device__ __forceinline__ Count block_scan(Count own) {
  SHARED(Count, sums, WARPS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Count before = __shfl_up_sync(ALL_LANES, own, distance);
    if (lane >= distance) own += before;
  }
  if (lane == 31) sums[warp] = own;
  __syncthreads();
  for (int w = 0; w < warp; ++w) own += sums[w];
  __syncthreads();  // the next call writes again
  return own;
}

struct Row {
  const float* logits;
  int64_t width;
  double largest, scale;
  unsigned limit;  // keys beyond are out

  __device__ Count weight(unsigned key) const {
    return Count(llrint(exp((double(logit_of(key)) - largest) * scale) * ONE));
  }
};

// What lies at place x of the order: its key and the sum before the first token of this key.
struct Place {
  unsigned key;
  Count before;
};

// Where the running sum of the weights (or, COUNTS, of ones) of the sorted row first exceeds x, which is less than the
// whole sum.
template <bool COUNTS>
__device__ Place find(const Row& row, Count x) {
  SHARED(Count, sums, DIGITS);
  SHARED(Place, found, 1);
  Place place{0, 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    sums[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < row.width; i += THREADS) {
      const unsigned key = key_of(row.logits[i]);
      if (key > row.limit || (shift < 24 && key >> (shift + 8) != place.key)) continue;
      atomicAdd(&sums[key >> shift & (DIGITS - 1)], COUNTS ? Count(1) : row.weight(key));
    }
    __syncthreads();
    const Count own = sums[threadIdx.x], end = place.before + block_scan(own);
    if (end - own <= x && x < end) *found = {place.key << 8 | threadIdx.x, end - own};
    __syncthreads();
    place = *found;
  }
  __syncthreads();  // the next call writes again
  return place;
}

// The whole sum of weights, or the number of tokens.
template <bool COUNTS>
__device__ Count total(const Row& row) {
  SHARED(Count, sum, 1);
  Count own = 0;
  for (int64_t i = threadIdx.x; i < row.width; i += THREADS) {
    const unsigned key = key_of(row.logits[i]);
    if (key <= row.limit) own += COUNTS ? Count(1) : row.weight(key);
  }
  own = block_scan(own);
  if (threadIdx.x == THREADS - 1) *sum = own;
  __syncthreads();
  own = *sum;
  __syncthreads();  // the next call writes again
  return own;
}

// The id of the token with this key that has `before` others of the same key with smaller ids.
__device__ int64_t id_of(const Row& row, unsigned key, Count before) {
  SHARED(int64_t, id, 1);
  const int64_t share = (row.width + THREADS - 1) / THREADS, first = threadIdx.x * share;
  const int64_t end = min(first + share, row.width);
  Count own = 0;
  for (int64_t i = first; i < end; ++i) own += key_of(row.logits[i]) == key;
  Count place = block_scan(own) - own;
  if (place <= before && before < place + own)
    for (int64_t i = first; i < end; ++i)
      if (key_of(row.logits[i]) == key && place++ == before) *id = i;
  __syncthreads();
  return *id;
}

// The key of the largest logit; `is_valid`: it is finite and none is NaN.
__device__ unsigned largest_key(const Row& row, bool& is_valid) {
  SHARED(unsigned, keys, WARPS);
  unsigned least = ~0u;
  int has_nan = 0;
  for (int64_t i = threadIdx.x; i < row.width; i += THREADS) {
    const float x = row.logits[i];
    if (x != x) has_nan = 1;
    least = min(least, key_of(x));
  }
  has_nan = __syncthreads_or(has_nan);
#pragma unroll
  for (int distance = 16; distance; distance /= 2) least = min(least, __shfl_xor_sync(ALL_LANES, least, distance));
  if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = least;
  __syncthreads();
  for (int w = 0; w < WARPS; ++w) least = min(least, keys[w]);
  is_valid = !has_nan && fabsf(logit_of(least)) < INFINITY;
  return least;
}

// One block per draw.
__global__ void __launch_bounds__(THREADS) draw(const DrawArgs a) {
  const int64_t c = blockIdx.x;
  Row row{a.logits + a.rows[c] * a.width, a.width, 0, 0, ~0u};
  bool is_valid;
  const unsigned largest = largest_key(row, is_valid);
  const double temperature = a.temperature[c];
  if (!is_valid || temperature == 0) {
    const int64_t id = is_valid ? id_of(row, largest, 0) : -1;
    if (threadIdx.x == 0) a.ids[c] = id;
    return;
  }
  row.largest = double(logit_of(largest));
  row.scale = 1 / temperature;
  double floor = row.largest - LOWEST * temperature;
  if (a.min_p[c] > 0) floor = fmax(floor, row.largest + temperature * log(a.min_p[c]));
  row.limit = key_of(float(floor));
  const int64_t top_k = a.top_k[c];
  if (top_k > 0 && Count(top_k) < total<true>(row)) row.limit = find<true>(row, Count(top_k) - 1).key;
  Count sum = total<false>(row);
  if (a.top_p[c] < 1) {
    const double wanted = ceil(a.top_p[c] * double(sum));
    const Count least = wanted < 1 ? 1 : wanted < double(sum) ? Count(wanted) : sum;
    const Place place = find<false>(row, least - 1);
    const Count weight = row.weight(place.key);
    sum = place.before + ((least - 1 - place.before) / weight + 1) * weight;  // whole tokens
  }
  const Count x = Count(static_cast<unsigned __int128>(a.u[c] * 9007199254740992.0) * sum >> 53);
  const Place place = find<false>(row, x);
  const int64_t id = id_of(row, place.key, (x - place.before) / row.weight(place.key));
  if (threadIdx.x == 0) a.ids[c] = id;
}

// The ids of the first `wanted` tokens of the order, `wanted` at least 1, by rising id.
__device__ void collect(const Row& row, Count wanted, int64_t* ids) {
  const Place last = find<true>(row, wanted - 1);
  const int64_t share = (row.width + THREADS - 1) / THREADS, first = min(threadIdx.x * share, row.width);
  const int64_t end = min(first + share, row.width);
  Count before = 0, equal = 0;
  for (int64_t i = first; i < end; ++i) {
    const unsigned key = key_of(row.logits[i]);
    before += key < last.key, equal += key == last.key;
  }
  Count place = block_scan(equal) - equal;  // of the thread's first among the equals
  const Count room = wanted - last.before, left = place < room ? room - place : 0, taken = min(equal, left);
  place = block_scan(before + taken) - before - taken;
  equal = 0;
  for (int64_t i = first; i < end; ++i) {
    const unsigned key = key_of(row.logits[i]);
    if (key < last.key || (key == last.key && equal++ < left)) ids[place++] = i;
  }
  __syncthreads();
}

// One block per entry. (Without a second bound nvcc spills five registers on sm_90.)
__global__ void __launch_bounds__(THREADS, 4) logprobs(const LogprobsArgs a) {
  const int64_t c = blockIdx.x;
  Row row{a.logits + a.rows[c] * a.width, a.width, 0, 1, ~0u};
  bool is_valid;
  row.largest = double(logit_of(largest_key(row, is_valid)));
  const double norm = row.largest + log(double(total<false>(row)) / ONE);
  if (threadIdx.x == 0) a.found[c] = double(row.logits[a.ids[c]]) - norm;

  const int most = int(a.most), wanted = int(min(a.num_top[c], a.most));
  int64_t *const ids = a.top_ids + c * most, *const chosen = a.workspace + c * most;
  double* const values = a.top_values + c * most;
  for (int i = threadIdx.x; i < most; i += THREADS) ids[i] = -1, values[i] = -INFINITY;
  if (wanted < 1) return;
  collect(row, Count(wanted), chosen);  // begins with a barrier: the rows are filled
  for (int i = threadIdx.x; i < wanted; i += THREADS) {
    const float logit = row.logits[chosen[i]];
    if (logit == -INFINITY) continue;
    const unsigned key = key_of(logit);
    int place = 0;
    for (int j = 0; j < wanted; ++j) {
      const unsigned other = key_of(row.logits[chosen[j]]);
      place += other < key || (other == key && j < i);
    }
    ids[place] = chosen[i], values[place] = double(logit) - norm;
  }
}

bool fits(int64_t width) { return width >= 1 && width <= 1 << 20; }  // sums fit 64 bits

}  // namespace

extern "C" int onemesh_cuda_logprobs(const LogprobsArgs* args, void* stream) {
  if (!fits(args->width) || args->most < 0 || args->most > args->width) return cudaErrorInvalidValue;
  if (!args->count) return cudaSuccess;
  return launch(&logprobs, dim3(unsigned(args->count)), dim3(THREADS), 0, cudaStream_t(stream), *args);
}

extern "C" int onemesh_cuda_draw(const DrawArgs* args, void* stream) {
  if (!fits(args->width)) return cudaErrorInvalidValue;
  if (!args->count) return cudaSuccess;
  return launch(&draw, dim3(unsigned(args->count)), dim3(THREADS), 0, cudaStream_t(stream), *args);
}
