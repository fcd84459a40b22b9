// Paged attention on tensor cores: a warp holds 16 rows, pairs (query, head) of one kv head's group, in registers, and goes
// over the keys in tiles of 32 that come in by cp.async, two buffers in turn (arXiv:2307.08691; the split: flash-decoding).
//
//   split:  every warp has a part of the keys and buffers of its own, rows are the chunk's at most 16
//   whole:  the four warps share the tiles, each has 16 of the block's 64 rows and merges part after part; the totals
//           stand in shared memory, each thread's where no other looks
#pragma once
#include "attention.cuh"
#include "ptx.cuh"

namespace {

constexpr int SPLIT_WARPS = 2, WHOLE_WARPS = 4, ROWS = 16;

template <class T>
__device__ __forceinline__ unsigned pack(float x, float y);
template <>
__device__ __forceinline__ unsigned pack<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const unsigned*>(&v);
}
template <>
__device__ __forceinline__ unsigned pack<__half>(float x, float y) {
  const __half2 v = __floats2half2_rn(x, y);
  return *reinterpret_cast<const unsigned*>(&v);
}

template <int D>
struct Shape {
  static constexpr int LINE = D + 8;  // elements from row to row of a tile: 16 bytes more, so that banks differ
  static constexpr int TILE_SIZE = TILE * LINE, STAGE = 2 * TILE_SIZE, BUFFERS = 2 * STAGE;
};

// A warp's 16 rows: two per thread, g and g + 8.
struct Rows {
  int query[2], position[2], head[2];
  bool is_used[2];
  float slope[2];

  __device__ Rows(const AttentionPagedArgs& a, const Chunk& c, int kv_head, int first) {
    const int start = a.head_starts[kv_head], group = a.head_starts[kv_head + 1] - start;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + threadIdx.x % 32 / 4 + 8 * r;
      is_used[r] = row < c.queries * group;
      query[r] = is_used[r] ? row / group : 0;
      head[r] = is_used[r] ? a.heads[start + row % group] : 0;
      position[r] = c.position(query[r]);
      slope[r] = a.slopes && is_used[r] ? a.slopes[head[r]] : 0.f;
    }
  }
  __device__ int64_t pair(const AttentionPagedArgs& a, const Chunk& c, int r) const {
    return (c.first_row + query[r]) * a.num_heads + head[r];
  }
};

// Running softmax of a thread's two rows over one part.
template <int D>
struct Part {
  float max[2], sum[2], values[D / 8][4];

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) max[r] = -INFINITY, sum[r] = 0.f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[n][i] = 0.f;
  }
};

// Starts to copy rows [first, first + COUNT) of the tile's keys and values, by one warp; absent ones become 0.
template <class T, int D, int COUNT>
__device__ __forceinline__ void fetch(const AttentionPagedArgs& a, const Tile& tile, int kv_head, int first, T* stage) {
  constexpr int PER_ROW = D / 8, LINE = Shape<D>::LINE;
  const int lane = threadIdx.x % 32;
  const int64_t own = tile.offset(a, tile.first + lane, kv_head);  // lane l looks up key l
#pragma unroll
  for (int i = 0; i < COUNT * PER_ROW / 32; ++i) {
    const int row = first + (i * 32 + lane) / PER_ROW, column = lane % PER_ROW * 8;
    const int64_t offset = __shfl_sync(ALL_LANES, own, row);
    const int64_t from = offset < 0 ? 0 : offset + column;
    T* to = stage + row * LINE + column;
    ptx::cp_async16(to, static_cast<const T*>(a.key_cache) + from, offset < 0 ? 0 : 16);
    ptx::cp_async16(to + Shape<D>::TILE_SIZE, static_cast<const T*>(a.value_cache) + from, offset < 0 ? 0 : 16);
  }
}

template <class T, int D>
__device__ __forceinline__ void attend(const AttentionPagedArgs& a, const Tile& tile, const Rows& rows,
                                       const unsigned (&q)[D / 16][4], const T* keys, Part<D>& part) {
  constexpr int LINE = Shape<D>::LINE;
  const T* values = keys + Shape<D>::TILE_SIZE;
  const int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
  float s[TILE / 8][4] = {};
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int n = 0; n < TILE / 16; ++n) {
      unsigned b[4];
      ptx::ldmatrix_x4(b, keys + (n * 16 + matrix / 2 * 8 + line) * LINE + k * 16 + matrix % 2 * 8);
      ptx::mma_m16n8k16(s[2 * n], q[k], {b[0], b[1]}, s[2 * n], T{});
      ptx::mma_m16n8k16(s[2 * n + 1], q[k], {b[2], b[3]}, s[2 * n + 1], T{});
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = part.max[r];
    const bool all_visible = rows.is_used[r] && tile.all_visible(rows.position[r], a.window);
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][2 * r + i];
        const int key = tile.first + n * 8 + lane % 4 * 2 + i;
        const bool visible = all_visible || (rows.is_used[r] && tile.visible(key, rows.position[r], a.window));
        x = visible ? score(a, x, rows.slope[r], tile.is_prefix, key - rows.position[r]) : -INFINITY;
        top = fmaxf(top, x);
      }
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));  // the four lanes of a row
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
    const float keep = weight(part.max[r], top);
    float sum = __fmul_rn(part.sum[r], keep);
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][2 * r + i];
        x = weight(x, top);
        sum = __fadd_rn(sum, x);
      }
    part.sum[r] = sum;
    part.max[r] = top;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      part.values[n][2 * r] = __fmul_rn(part.values[n][2 * r], keep);
      part.values[n][2 * r + 1] = __fmul_rn(part.values[n][2 * r + 1], keep);
    }
  }
#pragma unroll
  for (int k = 0; k < TILE / 16; ++k) {
    // what the scores' product leaves in a lane is what the next one takes as its left factor
    const unsigned p[4] = {pack<T>(s[2 * k][0], s[2 * k][1]), pack<T>(s[2 * k][2], s[2 * k][3]),
                           pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]), pack<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      unsigned b[4];
      ptx::ldmatrix_x4_trans(b, values + (k * 16 + matrix % 2 * 8 + line) * LINE + n * 16 + matrix / 2 * 8);
      ptx::mma_m16n8k16(part.values[2 * n], p, {b[0], b[1]}, part.values[2 * n], T{});
      ptx::mma_m16n8k16(part.values[2 * n + 1], p, {b[2], b[3]}, part.values[2 * n + 1], T{});
    }
  }
}

// The sum over a row's four lanes, once a part is through.
template <int D>
__device__ __forceinline__ void finish(Part<D>& part) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    part.sum[r] = __fadd_rn(part.sum[r], __shfl_xor_sync(ALL_LANES, part.sum[r], 1));
    part.sum[r] = __fadd_rn(part.sum[r], __shfl_xor_sync(ALL_LANES, part.sum[r], 2));
  }
}

template <class T, int D>
__device__ __forceinline__ void load_queries(const AttentionPagedArgs& a, const Chunk& c, const Rows& rows,
                                             unsigned (&q)[D / 16][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T* row = static_cast<const T*>(a.q) + rows.pair(a, c, r) * D + threadIdx.x % 4 * 2;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        q[k][2 * half + r] = rows.is_used[r] ? *reinterpret_cast<const unsigned*>(row + k * 16 + half * 8) : 0u;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(SPLIT_WARPS * 32, D == 64 ? 4 : 2) split_mma(const AttentionPagedArgs a) {
  DYN_SHARED(T, shared);
  const int64_t* item = a.split + 3 * blockIdx.x;
  const int warp = threadIdx.x / 32, kv_head = blockIdx.y;
  const Chunk c(a, item[0]);
  const int part_index = int(item[1]) + warp, first = part_index * PART_TILES;
  if (first >= c.num_tiles) return;  // warps meet nowhere
  const int end = min(first + PART_TILES, c.num_tiles);
  T* buffers = shared + warp * Shape<D>::BUFFERS;
  const Rows rows(a, c, kv_head, 0);
  unsigned q[D / 16][4];
  load_queries<T, D>(a, c, rows, q);
  Part<D> part;
  part.clear();
  fetch<T, D, TILE>(a, Tile(c, first), kv_head, 0, buffers);
  ptx::cp_async_commit();
#pragma unroll 1
  for (int t = first; t < end; ++t) {
    if (t + 1 < end) fetch<T, D, TILE>(a, Tile(c, t + 1), kv_head, 0, buffers + (t + 1) % 2 * Shape<D>::STAGE);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncwarp();
    attend<T, D>(a, Tile(c, t), rows, q, buffers + t % 2 * Shape<D>::STAGE, part);
    __syncwarp();  // before this buffer is filled again
  }
  finish(part);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!rows.is_used[r]) continue;
    const Partials to(a, item[2] + part_index * c.queries + rows.query[r], rows.head[r]);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<float2*>(to.values + n * 8 + threadIdx.x % 4 * 2) =
          make_float2(part.values[n][2 * r], part.values[n][2 * r + 1]);
    if (threadIdx.x % 4 == 0) *reinterpret_cast<float2*>(to.stats) = make_float2(part.max[r], part.sum[r]);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(WHOLE_WARPS * 32, D == 64 ? 3 : 2) whole_mma(const AttentionPagedArgs a) {
  constexpr int THREADS = WHOLE_WARPS * 32, COPIED = TILE / WHOLE_WARPS;
  DYN_SHARED(T, buffers);
  float* totals = reinterpret_cast<float*>(buffers + Shape<D>::BUFFERS) + threadIdx.x;
  const int64_t* item = a.whole + 2 * blockIdx.x;
  const int warp = threadIdx.x / 32, kv_head = blockIdx.y;
  const int group = a.head_starts[kv_head + 1] - a.head_starts[kv_head];
  const Chunk c(a, item[0]);
  const int first_row = int(item[1]) * ROWS * WHOLE_WARPS, num_rows = c.queries * group;
  if (first_row >= num_rows) return;  // a smaller group than others have
  const Rows rows(a, c, kv_head, first_row + warp * ROWS);
  unsigned q[D / 16][4];
  load_queries<T, D>(a, c, rows, q);
  Part<D> part;
  part.clear();
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 2; ++i) totals[i * THREADS] = 0.f;
  // The last tile that a row of this block sees; the first: keys before are seen by no row.
  const int end = c.seen_tiles(c.position((min(first_row + ROWS * WHOLE_WARPS, num_rows) - 1) / group));
  fetch<T, D, COPIED>(a, Tile(c, 0), kv_head, warp * COPIED, buffers);
  ptx::cp_async_commit();
#pragma unroll 1
  for (int t = 0; t < end; ++t) {
    if (t + 1 < end)
      fetch<T, D, COPIED>(a, Tile(c, t + 1), kv_head, warp * COPIED, buffers + (t + 1) % 2 * Shape<D>::STAGE);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    attend<T, D>(a, Tile(c, t), rows, q, buffers + t % 2 * Shape<D>::STAGE, part);
    __syncthreads();  // before this buffer is filled again
    if (t % PART_TILES != PART_TILES - 1 && t + 1 != end) continue;
    finish(part);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float keep, add;
      merge(max[r], sum[r], part.max[r], part.sum[r], keep, add);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          float& total = totals[(n * 4 + i) * THREADS];
          total = merged(total, keep, part.values[n][i], add);
        }
    }
    part.clear();
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!rows.is_used[r]) continue;
    const int64_t pair = rows.pair(a, c, r);
    T* out = static_cast<T*>(a.out) + pair * D + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<unsigned*>(out + n * 8) = pack<T>(normalised(totals[(n * 4 + 2 * r) * THREADS], sum[r]),
                                                         normalised(totals[(n * 4 + 2 * r + 1) * THREADS], sum[r]));
    if (threadIdx.x % 4 == 0) a.lse[pair] = log_sum(max[r], sum[r]);
  }
}

template <class T, int D>
int launch_mma(const AttentionPagedArgs& a, cudaStream_t stream) {
  constexpr size_t buffers = Shape<D>::BUFFERS * sizeof(T), totals = WHOLE_WARPS * 32 * D / 2 * sizeof(float);
  const unsigned kv_heads = unsigned(a.num_kv_heads);
  if (a.num_split) {
    const dim3 grid(unsigned(a.num_split), kv_heads), block(SPLIT_WARPS * 32);
    const int error = launch(&split_mma<T, D>, grid, block, SPLIT_WARPS * buffers, stream, a);
    if (error) return error;
  }
  if (!a.num_whole) return cudaSuccess;
  const dim3 grid(unsigned(a.num_whole), kv_heads), block(WHOLE_WARPS * 32);
  return launch(&whole_mma<T, D>, grid, block, buffers + totals, stream, a);
}

}  // namespace
