// What a kernel is told. Every pointer is to host memory; strides and sizes count elements.
#pragma once
#include <cstdint>

// Attention of one serving step over cached pages; `kernels.reference.attention_paged` is the spec.
struct PagedAttention {
  void* out;            // [T, N, H]
  float* lse;           // [T, N]
  const void* q;        // [T, N, H]
  const void* keys;     // [P, S, K, H]
  const void* values;
  const int64_t* chunks;        // [B, 4]: first query row, queries, keys without prefix, prefix entries
  const int64_t* table;         // [B, table_width] pages
  const int64_t* prefix_table;  // [B, prefix_width]
  const int64_t* heads;         // [N] kv head of every query head
  int64_t num_chunks, table_width, prefix_width, num_heads, num_kv_heads, head_dim, page_size;
  int64_t window;  // 0: none
  float scale;
};

// Queries of one chunk and kv heads that one thread works on without interruption.
struct Part {
  int64_t chunk, first_query, num_queries, first_kv_head, num_kv_heads;
};

// Columns of a panel of packed weights (`linear.cpp`).
constexpr int PANEL = 48;
inline int64_t panels_of(int64_t out_width) { return (out_width + PANEL - 1) / PANEL; }

constexpr int MOST_PRODUCTS = 4;

// One term x w^T of a sum.
struct Product {
  const void* x;  // [T, K]
  int64_t x_stride, in_width;
  const void* weight;  // packed
};

// out = sum of products (+ bias), by chains of multiply-adds in float32.
struct LinearArgs {
  void* out;  // [T, N]
  int64_t rows, out_stride, out_width;
  const void* bias;  // [N] or null
  Product products[MOST_PRODUCTS];
  int num_products;
  bool float_out;   // float32 whatever the operands are
  bool accumulate;  // the chains go on from what stands in a float32 out
};

// A matrix w [N, K] into panels; its element [n, k] stands at n * row_stride + k * column_stride, one stride is 1.
struct PackArgs {
  void* to;
  const void* from;
  int64_t row_stride, column_stride, out_width, in_width;
  bool from_bf16, to_bf16;
};

// x [T, N] into [N, T rounded up to whole units].
struct TransposeArgs {
  void* to;
  const void* from;
  int64_t stride, rows;
};

// Every kernel and its arguments. Compiled once per instruction set as <name>_<ISA> (KERNEL below defines one).
#define EVERY_KERNEL(X)                                                                                                \
  X(attend, (const PagedAttention&, const Part&, bool is_bf16))                                                        \
  /* thread's share of calls [parts][segments]: parts differ in columns, segments in rows, x and out point there */   \
  X(linear, (const LinearArgs* calls, int64_t parts, int64_t segments, int64_t thread, int64_t threads, bool is_bf16)) \
  X(pack, (const PackArgs&, int64_t first_panel, int64_t last_panel))                                                  \
  /* columns [first, last) of x */                                                                                     \
  X(transpose_rows, (const TransposeArgs&, int64_t first, int64_t last, bool is_bf16))                                 \
  /* rows of panels [first, last) */                                                                                   \
  X(unpack, (void* out, const void* packed, int64_t out_width, int64_t in_width, int64_t first, int64_t last,          \
             bool is_bf16))                                                                                            \
  /* rows ids[first..last) of the packed weight */                                                                     \
  X(gather, (void* out, const void* packed, const int64_t* ids, int64_t in_width, int64_t first, int64_t last,         \
             bool is_bf16))                                                                                            \
  /* rows [first, last) of float logits [T, width]; target -1: none in these columns */                                \
  X(log_sum_exp, (float* out, const float* x, int64_t width, int64_t first, int64_t last))                             \
  X(loss_gradient, (void* out, const float* x, const float* lse, const int64_t* target, int64_t width, int64_t first,  \
                    int64_t last, bool is_bf16))                                                                       \
  /* elements [first, last) */                                                                                         \
  X(silu_gate, (void* out, const void* gate, const void* up, int64_t first, int64_t last, bool is_bf16))               \
  /* rows [first, last) of [T, width] */                                                                               \
  X(rms_norm, (void* out, const void* x, const void* weight, float eps, int64_t width, int64_t first, int64_t last,    \
               bool is_bf16))                                                                                          \
  X(rotary, (void* out, const void* x, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim,        \
             int64_t first, int64_t last, bool is_bf16))

struct Kernels {
  const char* name;  // of the instruction set
#define MEMBER(name, args) void (*name) args;
  EVERY_KERNEL(MEMBER)
#undef MEMBER
};

#define JOINED_(a, b) a##_##b
#define JOINED(a, b) JOINED_(a, b)
#define KERNEL(name) extern "C" __attribute__((visibility("hidden"))) void JOINED(name, ISA)
