// What the attention kernels share, so that they give the same bits: which keys a part holds, a score, a merge.
//
// Multiplications and additions that the compiler could fuse in one kernel and not in another are spelled out.
#pragma once
#include <cmath>

#include "kernels.h"
#include "vector.cuh"

namespace {

constexpr int TILE = 32;         // keys per step of the running softmax
constexpr int PART_TILES = 4;    // tiles per part
constexpr float LOG2_E = 1.4426950408889634f;

// One chunk's numbers. Its tiles in order: those of the prefix, then those of the document from `first_tile` on, at the
// border of a part; no query sees a key before.
struct Chunk {
  int64_t first_row, first_key;
  int queries, keys, prefix, offset;
  int prefix_tiles, first_tile, num_tiles;
  const int64_t *table, *prefix_table;

  __device__ Chunk(const AttentionPagedArgs& a, int64_t b) {
    const int64_t* c = a.chunks + 6 * b;
    first_row = c[0], queries = int(c[1]), keys = int(c[2]), prefix = int(c[3]), first_key = c[4], offset = int(c[5]);
    table = a.block_table ? a.block_table + b * a.table_width : nullptr;
    prefix_table = a.prefix_table + b * a.prefix_width;
    // whole parts, so that a part is a multiple of PART_TILES in this numbering
    prefix_tiles = (prefix + TILE * PART_TILES - 1) / (TILE * PART_TILES) * PART_TILES;
    const int lowest = a.window ? offset - a.window + 1 : 0;
    first_tile = lowest > 0 ? lowest / (TILE * PART_TILES) * PART_TILES : 0;
    num_tiles = prefix_tiles + (keys + TILE - 1) / TILE - first_tile;
  }
  __device__ int position(int query) const { return offset + query; }
  // How many of the tiles a query at this position may see.
  __device__ int seen_tiles(int position) const {
    const int last = min(position, keys - 1);
    return last < 0 ? prefix_tiles : prefix_tiles + last / TILE + 1 - first_tile;
  }
};

// A tile's keys: positions first .. first + 31 of one of the two segments, those from `length` on absent.
struct Tile {
  bool is_prefix;
  int first, length;
  int64_t first_row;  // of packed keys
  const int64_t* table;

  __device__ Tile(const Chunk& c, int tile) {
    is_prefix = tile < c.prefix_tiles;
    first = (is_prefix ? tile : c.first_tile + tile - c.prefix_tiles) * TILE;
    length = is_prefix ? c.prefix : c.keys;
    table = is_prefix ? c.prefix_table : c.table;
    first_row = c.first_key;
  }
  __device__ bool visible(int key, int position, int window) const {
    return key < length && (is_prefix || (key <= position && (!window || position - key < window)));
  }
  // Whether all of its keys are.
  __device__ bool all_visible(int position, int window) const {
    return visible(first, position, window) && visible(first + TILE - 1, position, window);
  }
  // Where key and value of a position lie, in elements; -1 for an absent one.
  __device__ int64_t offset(const AttentionPagedArgs& a, int key, int kv_head) const {
    if (key >= length) return -1;
    const int64_t slot = table ? table[key / a.page_size] * a.page_size + key % a.page_size : first_row + key;
    return (slot * a.num_kv_heads + kv_head) * a.head_dim;
  }
};

// The score of a product q.k; `distance` is key - position. In units of log 2 it would be rounded once more, and lse
// twice, which the gradients of sharp weights feel.
__device__ __forceinline__ float score(const AttentionPagedArgs& a, float product, float slope, bool is_prefix,
                                       int distance) {
  float s = __fmul_rn(product, a.scale);
  if (a.softcap > 0) s = __fmul_rn(a.softcap, tanhf(s / a.softcap));
  return is_prefix ? s : __fmaf_rn(slope, float(distance), s);
}

// exp(x - top) where top may be -inf because nothing was seen yet.
__device__ __forceinline__ float weight(float x, float top) {
  return top == -INFINITY ? 0.f : exp2f(__fmul_rn(x - top, LOG2_E));
}

// Adds a part's (maximum, sum) to the total's; values are to be multiplied by `keep` (the total's) and `add`.
__device__ __forceinline__ void merge(float& max, float& sum, float part_max, float part_sum, float& keep, float& add) {
  const float top = fmaxf(max, part_max);
  keep = weight(max, top);
  add = weight(part_max, top);
  sum = __fmaf_rn(part_sum, add, __fmul_rn(sum, keep));
  max = top;
}
__device__ __forceinline__ float merged(float total, float keep, float part, float add) {
  return __fmaf_rn(part, add, __fmul_rn(total, keep));
}

__device__ __forceinline__ float normalised(float value, float sum) { return sum > 0 ? value / sum : 0.f; }
__device__ __forceinline__ float log_sum(float max, float sum) { return sum > 0 ? max + logf(sum) : -INFINITY; }

// What a split chunk's warp leaves for the merge.
struct Partials {
  float *values, *stats;
  __device__ Partials(const AttentionPagedArgs& a, int64_t row, int64_t head) {
    const int64_t at = row * a.num_heads + head;
    values = a.partials + at * a.head_dim;
    stats = a.partials + a.partial_rows * a.num_heads * a.head_dim + 2 * at;
  }
};

}  // namespace
