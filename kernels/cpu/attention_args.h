// What the attention kernels are told. Every pointer is to host memory; strides and sizes count elements.
#pragma once
#include <cstdint>

// A softmax is merged from those of KEY_EXTENT keys each; KEY_BLOCK of them are packed together. Both lie at fixed
// positions.
constexpr int KEY_BLOCK = 64, KEY_EXTENT = 512;

constexpr int GROUP_ROWS = 24;  // (query, head) pairs whose scores of an extent are in cache together

constexpr int BACKWARD_TILE = 96;  // rows whose weights are in cache between the backward's products

// Queries that attend one run of keys. Key j of it is an entry of the prefix for j < prefix. Query i sees the keys
// j <= i + offset, with a window those with i + offset - j < window alone and the prefix.
struct Sequence {
  int64_t first_query, queries, first_key, keys, prefix, offset;
};

// `kernels.reference.attention_varlen` (no tables: keys are the rows first_key .. first_key + keys - 1) and
// `attention_paged` (tables: keys are prefix entries, then positions) are the spec.
struct Attention {
  void* out;           // [T, N, H]
  float* lse;          // [T, N]
  const void* q;       // [T, N, H]
  const void* keys;    // [S, K, H]; paged [P, page_size, K, H]
  const void* values;  // as keys
  const Sequence* sequences;
  const int64_t* table;         // [B, table_width] pages, or null
  const int64_t* prefix_table;  // [B, prefix_width]
  const int64_t* heads;         // [N] query heads, those of kv head 0 first
  const int64_t* first_head;    // [K + 1] where those of a kv head begin in `heads`
  const float* slopes;          // [N] or null
  float* parts;                 // [parts, N, width + 2]: output, maximum and sum of every KEY_EXTENT of keys
  int64_t table_width, prefix_width, num_heads, num_kv_heads, head_dim, page_size;
  int64_t window;  // 0: none
  float scale, soft_cap;  // soft_cap 0: none
};

// Gradients, besides what the forward was told; `kernels.reference`'s autograd is the spec.
struct AttentionGrads {
  void *q, *k, *v;   // as those of the forward
  const void* out;   // [T, N, H]
  const float* lse;  // [T, N] or null
};

// Queries of one sequence, kv heads and keys that one thread works on without interruption.
struct AttentionPart {
  int64_t sequence, first_query, num_queries, first_kv_head, num_kv_heads;
  int64_t first_key, last_key;  // multiples of KEY_EXTENT, or the end
  int64_t part;                 // where the results of the KEY_EXTENTs go in `parts`; -1: to out and lse
};

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }  // to a vector of any instruction set

// Floats of scratch for a forward part of `rows` (query, head) pairs.
inline int64_t attention_room(int64_t head_dim, int64_t rows) {
  const int64_t width = padded(head_dim);
  return 2 * KEY_EXTENT * width + padded(rows > GROUP_ROWS ? rows : GROUP_ROWS) * (3 * width + KEY_EXTENT + 4) + 128;
}

// Queries of a backward segment: as many rows, with `group` heads each, as the second cache level holds with all theirs.
inline int64_t segment_queries(int64_t group) { return group > 768 ? 1 : group < 3 ? 256 : 768 / group; }

inline int64_t backward_room(int64_t head_dim, int64_t group) {
  const int64_t width = padded(head_dim), rows = padded(segment_queries(group) * group + 1);
  return rows * (5 * width + 2) + 3 * KEY_BLOCK * width + 3 * BACKWARD_TILE * KEY_BLOCK + 256;
}
