// What a kernel is told. Every pointer is to host memory; strides and sizes count elements.
#pragma once
#include <cstdint>

#include "attention_args.h"

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

// A packed weight [N, K] (out_width, in_width) into the packed [K, N]; `to` is where its panel `first` goes.
struct TurnArgs {
  void* to;
  const void* from;
  int64_t out_width, in_width, first;
};

// x [T, N] into [N, T rounded up to whole units].
struct TransposeArgs {
  void* to;
  const void* from;
  int64_t stride, rows;
};

// Rows of a matrix that lie `stride` elements apart; the elements of a row are dense.
struct Rows {
  const void* data;
  int64_t stride;
};

// out = weight * x / rms(x); with `sum`: sum = x + delta takes the place of x.
struct NormArgs {
  void* out;  // [T, width]
  void* sum;  // [T, width] or null
  Rows x, delta;
  const void* weight;  // [width]
  float eps;
  int64_t width;
};

// Rows whose gradients of the weight are summed before blocks are: fixed, so that threads don't matter.
constexpr int64_t NORM_BLOCK = 32;

struct NormGradArgs {
  void* grad_x;         // [T, width]
  float* weight_parts;  // [blocks, width] or null
  Rows grad, grad_sum, x;  // grad_sum.data may be null
  const void* weight;
  float eps;
  int64_t num_rows, width;
};

struct GateArgs {
  void* out;  // [T, width]
  int64_t out_stride;
  Rows gate, up;
  int64_t width;
  bool is_gelu;
};

struct GateGradArgs {
  void *grad_gate, *grad_up;  // [T, width]
  Rows grad, gate, up;
  int64_t width;
  bool is_gelu;
};

struct RotaryArgs {
  void* out;  // [T, N, H]
  Rows x;
  const float *cos, *sin;  // [T, H]
  int64_t num_heads, head_dim;
  float sign;  // of the angles
};

// Where rotated keys, and values, are kept.
struct PagesArgs {
  void *keys, *values;  // [P, S, K, H]
  Rows k, v;
  const int64_t* slots;  // [T]
  int64_t num_kv_heads;
};

struct EmbeddingGradArgs {
  void* grad_weight;  // [V, width]
  Rows grad;
  const int64_t* starts;  // [V + 1]: tokens of id i are tokens[starts[i]] .. tokens[starts[i + 1] - 1], ascending
  const int64_t* tokens;  // [T]
  int64_t width;
};

// Draws from rows of logits; `kernels.sampling` has the definition.
struct DrawArgs {
  int64_t* ids;  // [n], -1 where a row's largest logit isn't finite
  const float* logits;
  int64_t row_stride;
  const int64_t* rows;  // [n] of the logits
  const double* temperature;  // [n], 0: the largest
  const int64_t* top_k;
  const double *top_p, *min_p, *u;
  int64_t vocab;
};

// Log-probabilities of ids, and the largest num_top <= width ones of their rows.
struct LogProbArgs {
  double* logprob;       // [n]
  int64_t* top_ids;      // [n, width], -1 past the last
  double* top_logprobs;  // [n, width]
  const float* logits;
  int64_t row_stride;
  const int64_t *rows, *ids, *num_top;  // [n]
  int64_t width, vocab;
};

// Every kernel and its arguments. Compiled once per instruction set as <name>_<ISA> (KERNEL below defines one).
#define EVERY_KERNEL(X)                                                                                                \
  X(attend, (const Attention&, const AttentionPart&, float* room, bool is_bf16))                                       \
  /* a query's parts [first, last) into out and lse */                                                                 \
  X(attend_join, (const Attention&, const AttentionPart&, int64_t first, int64_t last, float* room, bool is_bf16))     \
  /* adds to sums [2][keys][width] of one sequence and kv head, block by block when its turn comes */                   \
  X(attend_backward, (const Attention&, const AttentionGrads&, const AttentionPart&, float* room, float* sums,         \
                      int32_t* turns, bool is_bf16))                                                                   \
  X(attend_backward_finish, (const Attention&, const AttentionGrads&, const AttentionPart&, float* room, float* sums,  \
                             bool is_bf16))                                                                            \
  /* thread's share of calls [parts][segments]: parts differ in columns, segments in rows, x and out point there; */  \
  /* `next`: a weight that the thread will read after these, or null */                                               \
  X(linear, (const LinearArgs* calls, int64_t parts, int64_t segments, int64_t thread, int64_t threads,                \
             const void* next, bool is_bf16))                                                                          \
  X(pack, (const PackArgs&, int64_t first_panel, int64_t last_panel))                                                  \
  /* columns [first, last) of x */                                                                                     \
  X(transpose_rows, (const TransposeArgs&, int64_t first, int64_t last, bool is_bf16))                                 \
  /* panels [first, last) of the transpose */                                                                          \
  X(turn, (const TurnArgs&, int64_t first, int64_t last, bool is_bf16))                                                \
  /* rows ids[first..last) of the packed weight */                                                                     \
  X(gather, (void* out, const void* packed, const int64_t* ids, int64_t in_width, int64_t first, int64_t last,         \
             bool is_bf16))                                                                                            \
  /* rows [first, last) of float logits [T, width]; target -1: none in these columns */                                \
  X(log_sum_exp, (float* out, const float* x, int64_t width, int64_t first, int64_t last))                             \
  X(loss_gradient, (void* out, const float* x, const float* lse, const int64_t* target, int64_t width, int64_t first,  \
                    int64_t last, bool is_bf16))                                                                       \
  /* rows [first, last) */                                                                                             \
  X(norm, (const NormArgs&, int64_t first, int64_t last, bool is_bf16))                                                \
  X(norm_backward, (const NormGradArgs&, int64_t first_block, int64_t last_block, bool is_bf16))                       \
  X(sum_rows, (void* out, const float* x, int64_t num_rows, int64_t width, bool is_bf16))                              \
  X(gate, (const GateArgs&, int64_t first, int64_t last, bool is_bf16))                                                \
  X(gate_backward, (const GateGradArgs&, int64_t first, int64_t last, bool is_bf16))                                   \
  X(rotary, (const RotaryArgs&, int64_t first, int64_t last, bool is_bf16))                                            \
  X(rotary_write, (const RotaryArgs& q, const PagesArgs&, int64_t first, int64_t last, bool is_bf16))                  \
  X(embedding_backward, (const EmbeddingGradArgs&, int64_t first_id, int64_t last_id, bool is_bf16))                   \
  X(draw, (const DrawArgs&, int64_t first, int64_t last))                                                              \
  X(logprobs, (const LogProbArgs&, int64_t first, int64_t last))

struct Kernels {
  const char* name;  // of the instruction set
#define MEMBER(name, args) void (*name) args;
  EVERY_KERNEL(MEMBER)
#undef MEMBER
};

#define JOINED_(a, b) a##_##b
#define JOINED(a, b) JOINED_(a, b)
#define KERNEL(name) extern "C" __attribute__((visibility("hidden"))) void JOINED(name, ISA)
