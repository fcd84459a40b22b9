// What a kernel is told. Every pointer is to host memory; strides and sizes count elements.
#pragma once
#include <cstdint>

#include "attention_args.h"

// Columns of a panel of packed weights (`linear.cpp`).
constexpr int PANEL = 48;

// y = x w^T (+ bias).
struct LinearArgs {
  void* out;           // [T, N]
  const void* x;       // [T, K]
  const void* weight;  // packed
  const void* bias;    // [N] or null
  int64_t out_width, in_width;  // N, K
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
  X(linear, (const LinearArgs&, int64_t first_panel, int64_t last_panel, int64_t first_row, int64_t last_row,          \
             bool is_bf16))                                                                                            \
  X(pack, (void* packed, const void* w, int64_t out_width, int64_t in_width, int64_t first_panel, int64_t last_panel,  \
           bool is_bf16))                                                                                              \
  /* rows ids[first..last) of the packed weight */                                                                     \
  X(unpack, (void* out, const void* packed, const int64_t* ids, int64_t in_width, int64_t first, int64_t last,         \
             bool is_bf16))                                                                                            \
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
