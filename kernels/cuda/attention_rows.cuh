// Paged attention without tensor cores: any head size up to 256, float32 too. A warp works on one row, a pair (query,
// head), at a time: for the scores of a tile its lanes are the keys, for the values the elements of the head.
#pragma once
#include "attention.cuh"

namespace {

constexpr int ROW_WARPS = 4, ROWS_PER_BLOCK = 64, MAX_HEAD_DIM = 256, PER_LANE = MAX_HEAD_DIM / 32;

// The product of a key with the query (in shared memory, float32): in steps of 16 elements, each summed by itself first.
// So the gradients' products (product.cuh) have the same bits in float32, and lse is that of their scores.
template <class T, bool WHOLE>
__device__ __forceinline__ float dot(const float* q, const T* key, int head_dim) {
  constexpr int N = Vec<T>::N;
  float sum = 0;
  for (int first = 0; first < head_dim; first += 16) {
    float part = 0;
#pragma unroll
    for (int i = first; i < first + 16; i += N) {
      if (i >= head_dim) break;
      float x[N];
      load<WHOLE>(key + i, head_dim - i, x);
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (WHOLE || i + j < head_dim) part = __fmaf_rn(q[i + j], x[j], part);
    }
    sum = __fadd_rn(sum, part);
  }
  return sum;
}

struct Running {
  float max = -INFINITY, sum = 0, values[PER_LANE] = {};
};

// Adds a tile's keys to the running softmax of the warp's row; `sum` stays the lane's own share.
template <class T, bool WHOLE>
__device__ __forceinline__ void attend(const AttentionPagedArgs& a, const Tile& tile, const float* q, int kv_head,
                                       int position, float slope, Running& run) {
  const int lane = threadIdx.x % 32, head_dim = a.head_dim, key = tile.first + lane;
  const bool visible = tile.visible(key, position, a.window);
  const unsigned any = __ballot_sync(ALL_LANES, visible);
  if (!any) return;
  const int64_t offset = visible ? tile.offset(a, key, kv_head) : 0;
  float s = -INFINITY;
  if (visible) {
    const float product = dot<T, WHOLE>(q, static_cast<const T*>(a.key_cache) + offset, head_dim);
    s = score(a, product, slope, tile.is_prefix, key - position);
  }
  float top = s;
#pragma unroll
  for (int distance = 16; distance; distance /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, distance));
  top = fmaxf(top, run.max);
  const float keep = weight(run.max, top), p = weight(s, top);
  run.max = top;
  run.sum = __fadd_rn(__fmul_rn(run.sum, keep), p);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) run.values[i] = __fmul_rn(run.values[i], keep);
#pragma unroll 4
  for (int j = 0; j < TILE; ++j) {
    if (!(any >> j & 1)) continue;
    const float w = __shfl_sync(ALL_LANES, p, j);
    const T* value = static_cast<const T*>(a.value_cache) + __shfl_sync(ALL_LANES, offset, j) + lane;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (i * 32 + lane < head_dim) run.values[i] = __fmaf_rn(w, to_float(value[i * 32]), run.values[i]);
  }
}

// SPLIT: warp w computes part item[1] + w of all rows of the chunk. Else: each of the block's rows from end to end.
template <class T, bool WHOLE, bool SPLIT>
__global__ void __launch_bounds__(ROW_WARPS * 32, 4) attend_rows(const AttentionPagedArgs a) {
  SHARED(float, queries, ROW_WARPS * MAX_HEAD_DIM);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y, head_dim = a.head_dim;
  const int64_t* item = SPLIT ? a.split + 3 * blockIdx.x : a.whole + 2 * blockIdx.x;
  const int start = a.head_starts[kv_head], group = a.head_starts[kv_head + 1] - start;
  const Chunk c(a, item[0]);
  const int part = SPLIT ? int(item[1]) + warp % 2 : 0;  // two parts an item, two warps a part
  if (SPLIT && part * PART_TILES >= c.num_tiles) return;
  const int first_row = SPLIT ? 0 : int(item[1]) * ROWS_PER_BLOCK;
  const int end_row = min(first_row + ROWS_PER_BLOCK, c.queries * group);
  const int step = SPLIT ? ROW_WARPS / 2 : ROW_WARPS;
  float* q = queries + warp * MAX_HEAD_DIM;
  for (int row = first_row + (SPLIT ? warp / 2 : warp); row < end_row; row += step) {
    const int query = row / group, position = c.position(query), head = a.heads[start + row % group];
    const int64_t pair = (c.first_row + query) * a.num_heads + head;
    const float slope = a.slopes ? a.slopes[head] : 0.f;
    for (int i = lane; i < head_dim; i += 32) q[i] = to_float(static_cast<const T*>(a.q)[pair * head_dim + i]);
    __syncwarp();
    const int first = part * PART_TILES;
    const int end = SPLIT ? min(first + PART_TILES, c.num_tiles) : c.seen_tiles(position);
    Running total, run;
    for (int t = first; t < end; ++t) {
      attend<T, WHOLE>(a, Tile(c, t), q, kv_head, position, slope, run);
      if (t % PART_TILES != PART_TILES - 1 && t + 1 != end) continue;
      run.sum = warp_sum(run.sum);
      if constexpr (SPLIT) break;
      float keep, add;
      merge(total.max, total.sum, run.max, run.sum, keep, add);
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) total.values[i] = merged(total.values[i], keep, run.values[i], add);
      run = Running{};
    }
    if constexpr (SPLIT) {
      const Partials to(a, item[2] + part * c.queries + query, head);
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i)
        if (i * 32 + lane < head_dim) to.values[i * 32 + lane] = run.values[i];
      if (lane == 0) to.stats[0] = run.max, to.stats[1] = run.sum;
    } else {
      T* out = static_cast<T*>(a.out) + pair * head_dim + lane;
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i)
        if (i * 32 + lane < head_dim) out[i * 32] = from_float<T>(normalised(total.values[i], total.sum));
      if (lane == 0) a.lse[pair] = log_sum(total.max, total.sum);
    }
    __syncwarp();  // before q is written again
  }
}

// One warp per pair (query, head) of a split chunk: its parts in order.
template <class T>
__global__ void __launch_bounds__(ROW_WARPS * 32) merge_parts(const AttentionPagedArgs a) {
  const int lane = threadIdx.x % 32, head_dim = a.head_dim;
  const int64_t* item = a.merges + 2 * blockIdx.x;
  const Chunk c(a, item[0]);
  const int row = blockIdx.y * ROW_WARPS + threadIdx.x / 32, num_heads = int(a.num_heads);
  const int query = row / num_heads, head = row % num_heads;
  if (query >= c.queries) return;
  const int parts = (c.num_tiles + PART_TILES - 1) / PART_TILES;
  Running total;
  for (int p = 0; p < parts; ++p) {
    const Partials from(a, item[1] + p * c.queries + query, head);
    float keep, add;
    merge(total.max, total.sum, from.stats[0], from.stats[1], keep, add);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (i * 32 + lane < head_dim) total.values[i] = merged(total.values[i], keep, from.values[i * 32 + lane], add);
  }
  const int64_t pair = (c.first_row + query) * a.num_heads + head;
  T* out = static_cast<T*>(a.out) + pair * head_dim + lane;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i)
    if (i * 32 + lane < head_dim) out[i * 32] = from_float<T>(normalised(total.values[i], total.sum));
  if (lane == 0) a.lse[pair] = log_sum(total.max, total.sum);
}

template <class T>
int launch_rows(const AttentionPagedArgs& a, cudaStream_t stream) {
  const bool whole = on_borders(static_cast<const T*>(a.key_cache), a.head_dim);
  const unsigned kv_heads = unsigned(a.num_kv_heads);
  const dim3 block(ROW_WARPS * 32);
  if (a.num_split) {
    const auto kernel = whole ? &attend_rows<T, true, true> : &attend_rows<T, false, true>;
    const int error = launch(kernel, dim3(unsigned(a.num_split), kv_heads), block, 0, stream, a);
    if (error) return error;
  }
  if (!a.num_whole) return cudaSuccess;
  const auto kernel = whole ? &attend_rows<T, true, false> : &attend_rows<T, false, false>;
  return launch(kernel, dim3(unsigned(a.num_whole), kv_heads), block, 0, stream, a);
}

template <class T>
int launch_merges(const AttentionPagedArgs& a, cudaStream_t stream) {
  if (!a.num_merges) return cudaSuccess;
  const int64_t rows = a.max_split_queries * a.num_heads;
  const dim3 grid(unsigned(a.num_merges), unsigned((rows + ROW_WARPS - 1) / ROW_WARPS));
  return launch(&merge_parts<T>, grid, dim3(ROW_WARPS * 32), 0, stream, a);
}

}  // namespace
