// The gradients of causal attention over packed documents (arXiv:2205.14135, 2307.08691): delta, then dq by blocks of
// queries, dk and dv by blocks of keys. Each computes the scores again from lse.
//
// A block works on SIDE positions of one document. The other side comes in by cp.async, two buffers in turn; scores and
// their gradients pass through shared memory. Tiles are counted from the document's start and nothing is summed by two
// blocks, so there are no atomics and no bit depends on the other documents.
#include "product.cuh"

namespace {

constexpr int LISTED = 64, MAX_HEAD = 256;  // positions per entry of `tiles`
// Positions of a block, and queries at a time that keys go over. Wide heads have half of them: the sums of a block fill
// the same registers, and two stages fit the shared memory of every target.
template <class T, int D>
constexpr int SIDE = (sizeof(T) == 2 ? 64 : 32) / (D > 128 ? 2 : 1);
template <class T, int D>
constexpr int STREAMED = SIDE<T, D> < 32 ? SIDE<T, D> : 32;
// How many warps lie one below the other in a tile of so many rows.
template <int ROWS>
constexpr int WARPS_DOWN = ROWS < 64 ? 2 : 4;
constexpr float LOG2_E = 1.4426950408889634f;

// A document's queries or keys among the rows of a pack.
struct Rows {
  int64_t first;
  int length;

  // One head of [rows, heads, head_dim].
  template <class T>
  __device__ Matrix<T> head(const void* x, int64_t head, int64_t heads, int head_dim) const {
    return Matrix<T>(static_cast<const T*>(x) + (first * heads + head) * head_dim, length, head_dim, heads * head_dim);
  }
};

// The block's document, and from which of its queries or keys on the block works.
struct Document {
  Rows queries, keys;
  int offset, start;

  // A block has SIZE positions.
  template <int SIZE>
  __device__ static Document of(const int64_t* tiles) {
    constexpr int PARTS = LISTED / SIZE;
    const int64_t* item = tiles + 6 * (blockIdx.x / PARTS);
    return {{item[0], int(item[1])}, {item[2], int(item[3])}, int(item[4]),
            int(item[5]) * LISTED + int(blockIdx.x) % PARTS * SIZE};
  }
  __device__ bool visible(int query, int key, int window) const {
    const int distance = query + offset - key;
    return query < queries.length && key < keys.length && distance >= 0 && (!window || distance < window);
  }
};

struct Scoring {
  float scale, softcap;

  // The score of a product q.k.
  __device__ __forceinline__ float score(float product) const {
    const float s = __fmul_rn(product, scale);
    return softcap > 0 ? __fmul_rn(softcap, tanhf(s / softcap)) : s;
  }
  // d score / d (scale q.k).
  __device__ __forceinline__ float slope(float score) const {
    return softcap > 0 ? 1.f - score / softcap * (score / softcap) : 1.f;
  }
};

// Starts to copy the tiles at position `start` of two matrices, side by side in shared memory.
template <int LINES, int D, class T>
__device__ __forceinline__ void fetch_pair(const Matrix<T>& x, const Matrix<T>& y, int64_t start, T* to) {
  fetch<LINES, D>(x, start, 0, to);
  fetch<LINES, D>(y, start, 0, to + LINES * LINE<T, D>);
}

// Rounds a tile of queries x keys to T, into shared memory.
template <class T, int KEYS, class Tile>
__device__ __forceinline__ void lay_down(Tile& tile, T* to) {
  each(tile, [&](int r, int c, float value) { to[r * LINE<T, KEYS> + c] = from_float<T>(value); });
}

// Products q.k and do.v of a tile become P and the gradient dS of the scaled products:
// dS = P (dP - delta) with delta = rowsum(dO O) - dlse; ALiBi's term doesn't depend on them.
template <class Tile, class Args>
__device__ __forceinline__ void differentiate(const Args& a, const Document& d, int head, int first_query,
                                              int first_key, Tile& scores, Tile& grads) {
  const Scoring scoring{a.scale, a.softcap};
  const float alibi = a.slopes ? a.slopes[head] : 0.f;
#pragma unroll
  for (int r = 0; r < Tile::OWN_ROWS; ++r) {
    const int query = first_query + Tile::row(r);
    const int64_t at = (d.queries.first + query) * a.num_heads + head;
    const bool is_row = query < d.queries.length;
    const float lse = is_row ? a.lse[at] : 0.f, delta = is_row ? a.delta[at] : 0.f;
#pragma unroll
    for (int c = 0; c < Tile::OWN_COLUMNS; ++c) {
      const int key = first_key + Tile::column(c);
      const bool visible = d.visible(query, key, a.window);
      const float s = scoring.score(scores.at(r, c));
      const float biased = __fmaf_rn(alibi, float(key - query - d.offset), s);
      const float p = visible ? exp2f((biased - lse) * LOG2_E) : 0.f;
      scores.at(r, c) = p;
      grads.at(r, c) = visible ? p * (grads.at(r, c) - delta) * scoring.slope(s) : 0.f;
    }
  }
}

// delta = rowsum(dO O) - dlse, a warp per row and head.
template <class T>
__global__ void __launch_bounds__(PRODUCT_THREADS) row_delta(const AttentionVarlenGradArgs a) {
  const int64_t pair = int64_t(blockIdx.x) * (PRODUCT_THREADS / 32) + threadIdx.x / 32;
  if (pair >= a.rows * a.num_heads) return;
  const int64_t at = pair * a.head_dim;
  float sum = 0;
  for (int i = threadIdx.x % 32; i < a.head_dim; i += 32)
    sum += to_float(static_cast<const T*>(a.grad_out)[at + i]) * to_float(static_cast<const T*>(a.out)[at + i]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) a.delta[pair] = a.grad_lse ? sum - a.grad_lse[pair] : sum;
}

// A tile to rows `start`, ... of one head of [rows, heads, head_dim].
template <class T, class Tile>
__device__ __forceinline__ void write_head(const Rows& rows, int start, Tile& tile, void* to, int64_t head,
                                           int64_t heads, int head_dim, float factor) {
  each(tile, [&](int r, int c, float value) {
    if (start + r < rows.length && c < head_dim)
      static_cast<T*>(to)[((rows.first + start + r) * heads + head) * head_dim + c] = from_float<T>(value * factor);
  });
}

template <class T, int D>
__global__ void __launch_bounds__(PRODUCT_THREADS) grad_queries(const AttentionVarlenGradArgs a) {
  constexpr int S = SIDE<T, D>, DOWN = WARPS_DOWN<S>, SIZE = S * LINE<T, D>;
  DYN_SHARED(T, shared);
  T *queries = shared, *grads_out = queries + SIZE, *buffers = queries + 2 * SIZE, *laid = buffers + 4 * SIZE;
  const int head = blockIdx.y, kv_head = a.kv_heads[head];
  const Document d = Document::of<S>(a.query_tiles);
  if (d.start >= d.queries.length) return;
  const auto k = d.keys.head<T>(a.k, kv_head, a.num_kv_heads, a.head_dim);
  const auto v = d.keys.head<T>(a.v, kv_head, a.num_kv_heads, a.head_dim);
  // The tiles of keys that a query of the block sees.
  const int lowest = a.window ? d.start + d.offset - a.window + 1 : 0, first = lowest > 0 ? lowest / S : 0;
  const int highest = min(min(d.start + S, d.queries.length) - 1 + d.offset, d.keys.length - 1);
  const int last = highest < 0 ? -1 : highest / S;
  fetch_pair<S, D>(d.queries.head<T>(a.q, head, a.num_heads, a.head_dim),
                   d.queries.head<T>(a.grad_out, head, a.num_heads, a.head_dim), d.start, queries);
  fetch_pair<S, D>(k, v, first * S, buffers);
  ptx::cp_async_commit();
  Tile<T, S, D, DOWN> sums;
  sums.clear();
  for (int t = first; t <= last; ++t) {
    const T* keys = buffers + (t - first) % 2 * 2 * SIZE;
    if (t < last) fetch_pair<S, D>(k, v, (t + 1) * S, buffers + (t + 1 - first) % 2 * 2 * SIZE);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    Tile<T, S, S, DOWN> scores, grads;
    scores.clear();
    grads.clear();
    scores.template add<D>(Factor<false, D, T>{queries}, Factor<false, D, T>{keys});
    grads.template add<D>(Factor<false, D, T>{grads_out}, Factor<false, D, T>{keys + SIZE});
    differentiate(a, d, head, d.start, t * S, scores, grads);
    lay_down<T, S>(grads, laid);
    __syncthreads();
    sums.template add<S>(Factor<false, S, T>{laid}, Factor<true, D, T>{keys});
    __syncthreads();  // before all of this is written again
  }
  write_head<T>(d.queries, d.start, sums, a.grad_q, head, a.num_heads, a.head_dim, a.scale);
}

template <class T, int D>
__global__ void __launch_bounds__(PRODUCT_THREADS, D > 128 ? 2 : 0) grad_keys(const AttentionVarlenGradArgs a) {
  constexpr int S = SIDE<T, D>, STEP = STREAMED<T, D>, SIZE = S * LINE<T, D>, STAGE = 2 * STEP * LINE<T, D>;
  DYN_SHARED(T, shared);
  T *keys = shared, *buffers = keys + 2 * SIZE, *weights = buffers + 2 * STAGE, *laid = weights + STEP * LINE<T, S>;
  const int kv_head = blockIdx.y;
  const Document d = Document::of<S>(a.key_tiles);
  if (d.start >= d.keys.length) return;
  // All pairs of a head that reads these keys and a tile of queries that sees them.
  const int first = max(d.start - d.offset, 0) / STEP;
  const int64_t reach = int64_t(d.start) + S - 1 - d.offset + a.window;
  const int end = a.window ? int(max(min(reach, int64_t(d.queries.length)), int64_t(0))) : d.queries.length;
  const int count = max((end + STEP - 1) / STEP - first, 0);
  const int* heads = a.heads + a.head_starts[kv_head];
  const int num_steps = (a.head_starts[kv_head + 1] - a.head_starts[kv_head]) * count;
  const auto fetch_queries = [&](int step) {
    const int head = heads[step / count];
    fetch_pair<STEP, D>(d.queries.head<T>(a.q, head, a.num_heads, a.head_dim),
                            d.queries.head<T>(a.grad_out, head, a.num_heads, a.head_dim),
                            (first + step % count) * STEP, buffers + step % 2 * STAGE);
  };
  fetch_pair<S, D>(d.keys.head<T>(a.k, kv_head, a.num_kv_heads, a.head_dim),
                   d.keys.head<T>(a.v, kv_head, a.num_kv_heads, a.head_dim), d.start, keys);
  if (num_steps) fetch_queries(0);
  ptx::cp_async_commit();
  Tile<T, S, D, WARPS_DOWN<S>> sums_k, sums_v;
  sums_k.clear();
  sums_v.clear();
  for (int step = 0; step < num_steps; ++step) {
    const T *queries = buffers + step % 2 * STAGE, *grads_out = queries + STAGE / 2;
    if (step + 1 < num_steps) fetch_queries(step + 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    Tile<T, STEP, S, 2> scores, grads;
    scores.clear();
    grads.clear();
    scores.template add<D>(Factor<false, D, T>{queries}, Factor<false, D, T>{keys});
    grads.template add<D>(Factor<false, D, T>{grads_out}, Factor<false, D, T>{keys + SIZE});
    differentiate(a, d, heads[step / count], (first + step % count) * STEP, d.start, scores, grads);
    lay_down<T, S>(scores, weights);
    lay_down<T, S>(grads, laid);
    __syncthreads();
    sums_v.template add<STEP>(Factor<true, S, T>{weights}, Factor<true, D, T>{grads_out});
    sums_k.template add<STEP>(Factor<true, S, T>{laid}, Factor<true, D, T>{queries});
    __syncthreads();  // before all of this is written again
  }
  write_head<T>(d.keys, d.start, sums_k, a.grad_k, kv_head, a.num_kv_heads, a.head_dim, a.scale);
  write_head<T>(d.keys, d.start, sums_v, a.grad_v, kv_head, a.num_kv_heads, a.head_dim, 1.f);
}

template <class T, int D>
int launch_head(const AttentionVarlenGradArgs& a, cudaStream_t stream) {
  constexpr int S = SIDE<T, D>, STEP = STREAMED<T, D>;
  constexpr size_t own = 2 * S * LINE<T, D>;  // elements; then the streamed ones and P, dS
  constexpr size_t bytes_q = (3 * own + S * LINE<T, S>) * sizeof(T);
  constexpr size_t bytes_k = (own + 4 * STEP * LINE<T, D> + 2 * STEP * LINE<T, S>) * sizeof(T);
  const auto blocks = [](int64_t tiles) { return unsigned(tiles * (LISTED / S)); };
  const dim3 of_queries(blocks(a.num_query_tiles), unsigned(a.num_heads));
  const dim3 of_keys(blocks(a.num_key_tiles), unsigned(a.num_kv_heads));
  const dim3 block(PRODUCT_THREADS);
  const int64_t pairs = a.rows * a.num_heads, per_block = PRODUCT_THREADS / 32;
  int error = cudaSuccess;
  if (a.num_query_tiles) {
    error = launch(&row_delta<T>, dim3(unsigned((pairs + per_block - 1) / per_block)), block, 0, stream, a);
    if (!error) error = launch(&grad_queries<T, D>, of_queries, block, bytes_q, stream, a);
  }
  if (!error && a.num_key_tiles) error = launch(&grad_keys<T, D>, of_keys, block, bytes_k, stream, a);
  return error;
}

}  // namespace

extern "C" int onemesh_cuda_attention_varlen_grad(const AttentionVarlenGradArgs* args, void* stream) {
  if (args->head_dim < 1 || args->head_dim > MAX_HEAD || args->num_heads > 65535) return cudaErrorInvalidValue;
  if (!args->num_heads || !args->num_kv_heads) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (sizeof(T) == 2)
      if (args->head_dim <= 64) return launch_head<T, 64>(*args, cudaStream_t(stream));
    if (args->head_dim <= 128) return launch_head<T, 128>(*args, cudaStream_t(stream));
    return launch_head<T, 256>(*args, cudaStream_t(stream));
  });
}
