// The launchers of the CUDA kernels: what each is told, in plain C++. `kernels/reference.py` is the spec.
//
// Every launcher is `int onemesh_cuda_<op>(const <Op>Args*, void* stream)` and returns a cudaError_t: 0, or 1
// (cudaErrorInvalidValue) for a shape that no kernel takes. Members of the structs are pointers to device memory, float,
// int32_t and int64_t, nothing else: the tests read this file. Strides and sizes count elements; a stride is from row to
// row, within a row elements lie side by side. Sizes may be 0. Pages are int64 and are never read past a sequence's last.
#pragma once
#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };

// out = weight * (y / sqrt(mean(y^2) + eps)), y = x, or the rounded x + residual, which then goes to `sum` too.
struct RmsNormArgs {
  void* out;             // [T, D]
  void* sum;             // [T, D], may be x or residual itself; unused without residual
  const void* x;         // [T, D]
  const void* residual;  // [T, D] or null
  const void* weight;    // [D]
  int64_t rows, width;
  float eps;
  int32_t dtype;
};

// out = activation(gate) * up
struct GateArgs {
  void* out;         // [T, F]
  const void* gate;  // [T, F] by gate_stride
  const void* up;    // [T, F] by up_stride
  int64_t rows, width, gate_stride, up_stride;
  int32_t activation, dtype;
};

// Rotates q and k by the angles of their rows and stores k and v in pages; without cos and sin nothing is rotated.
struct RotaryArgs {
  void* q_out;         // [T, N, H], may be q itself if q_stride is N H
  const void* q;       // [T, N, H] by q_stride
  const void* k;       // [T, K, H] by k_stride
  const void* v;       // [T, K, H] by v_stride
  const float* cos;    // [T, H] or null
  const float* sin;    // [T, H]
  const int64_t* slots;  // [T] page * S + slot, all different
  void* key_cache;     // [P, S, K, H]
  void* value_cache;
  int64_t rows, num_heads, num_kv_heads, head_dim, q_stride, k_stride, v_stride;
  int32_t dtype;
};

// Softmax attention of the chunks of one serving step over their pages; the score of key j for the query at position p is
// softcap * tanh(scale q.k / softcap) (without a cap scale q.k) + slope (j - p), entries of a prefix without slope.
//
// Keys come in parts of 128 by absolute position, parts are merged in order, prefix first. A chunk of few queries is
// split: its parts are computed by different warps, laid down in `partials` and merged by a second kernel. Another chunk's
// are merged on the way. Both give the same bits, so that the caller may choose: every chunk is in one list.
//
// Query i of a chunk stands at position i + offset: it sees the keys up to there. Without block_table keys and values are
// packed, [S, K, H]: chunks are documents, whose queries and keys may differ in number, without prefixes.
struct AttentionPagedArgs {
  void* out;                // [T, N, H]
  float* lse;               // [T, N]
  const void* q;            // [T, N, H]
  const void* key_cache;    // [P, S, K, H]
  const void* value_cache;
  const int64_t* chunks;        // [B, 6]: first query row, queries, keys without the prefix, prefix entries, first row of
                                // packed keys, offset
  const int64_t* block_table;   // [B, table_width] or null
  const int64_t* prefix_table;  // [B, prefix_width]
  const int32_t* head_starts;   // [K + 1]: where in `heads` the query heads of a kv head start
  const int32_t* heads;         // [N]
  const float* slopes;          // [N], ALiBi's, or null
  const int64_t* whole;         // [num_whole, 2]: chunk, and which 64 of its pairs (query, head of a kv head's group)
  const int64_t* split;         // [num_split, 3]: chunk of at most 16 such pairs, first of two parts, first row of partials
  const int64_t* merges;        // [num_merges, 2]: split chunk, first row of partials
  float* partials;              // [R, N, H] sums of values, then [R, N, 2] maximum and sum; part-major, R = parts x queries
  int64_t partial_rows, num_whole, num_split, num_merges, max_split_queries;
  int64_t table_width, prefix_width, num_heads, num_kv_heads;
  int32_t head_dim, page_size;
  int32_t window;        // 0: none
  float scale, softcap;  // softcap 0: none
  int32_t dtype;
};

// out = x weight^T + bias, each element summed in float32 along K in an order of its own, and rounded once.
struct LinearArgs {
  void* out;           // [T, N], float32 or of x's type
  const void* x;       // [T, K] by x_stride
  const void* weight;  // [N, K]
  const void* bias;    // [N] or null
  int64_t rows, width_in, width_out, x_stride;
  int32_t dtype, out_dtype;
};

// out = grad weight
struct LinearGradInputArgs {
  void* out;           // [T, K], float32 or of grad's type
  const void* grad;    // [T, N]
  const void* weight;  // [N, K]
  int64_t rows, width_in, width_out;
  int32_t dtype, out_dtype;
};

// out += grad^T x
struct LinearGradWeightArgs {
  float* out;        // [N, K]
  const void* grad;  // [T, N]
  const void* x;     // [T, K]
  int64_t rows, width_in, width_out;
  int32_t dtype;
};

// The gradients of attention inside packed documents, scores as above, from those of out and lse. Every
// row belongs to one document. An entry of a list of tiles: first query row, queries, first key row, keys, offset, and
// which 64 of the queries, or of the keys.
struct AttentionVarlenGradArgs {
  void* grad_q;            // [T, N, H]
  void* grad_k;            // [S, K, H]
  void* grad_v;            // [S, K, H]
  float* delta;            // [T, N] workspace
  const void* grad_out;    // [T, N, H]
  const float* grad_lse;   // [T, N] or null
  const void* out;         // [T, N, H]
  const float* lse;        // [T, N]
  const void* q;           // [T, N, H]
  const void* k;           // [S, K, H]
  const void* v;           // [S, K, H]
  const int64_t* query_tiles;  // [num_query_tiles, 6]
  const int64_t* key_tiles;    // [num_key_tiles, 6]
  const int32_t* kv_heads;     // [N]: the kv head of every query head
  const int32_t* head_starts;  // [K + 1]: where in `heads` the query heads of a kv head start
  const int32_t* heads;        // [N]
  const float* slopes;         // [N], ALiBi's, or null
  int64_t rows, num_query_tiles, num_key_tiles, num_heads, num_kv_heads;
  int32_t head_dim;      // at most 256
  int32_t window;        // 0: none
  float scale, softcap;  // softcap 0: none
  int32_t dtype;
};

// Attention over the union of two disjoint sets of keys: out = sum p_i out_i with p_i = exp(lse_i - lse), lse = log(sum
// exp(lse_i)). A part that saw no key has lse -inf and no share; its values are finite.
struct AttentionMergeArgs {
  void* out;                // [pairs, H]
  float* lse;               // [pairs]
  const void* first;        // [pairs, H]
  const float* first_lse;   // [pairs]
  const void* second;       // [pairs, H]
  const float* second_lse;  // [pairs]
  int64_t pairs, head_dim;
  int32_t dtype;
};

// Its gradients, from those of out and lse.
struct AttentionMergeGradArgs {
  void* grad_first;         // [pairs, H]
  float* grad_first_lse;    // [pairs]
  void* grad_second;        // [pairs, H]
  float* grad_second_lse;   // [pairs]
  const void* grad_out;     // [pairs, H]
  const float* grad_lse;    // [pairs] or null
  const void* first;        // [pairs, H]
  const float* first_lse;   // [pairs]
  const void* second;       // [pairs, H]
  const float* second_lse;  // [pairs]
  int64_t pairs, head_dim;
  int32_t dtype;
};

// out = weight[ids]; NaN for an id that isn't 0 .. num_ids - 1.
struct EmbeddingArgs {
  void* out;           // [T, D]
  const void* weight;  // [num_ids, D]
  const int64_t* ids;  // [T]
  int64_t rows, width, num_ids;
  int32_t dtype;
};

// out[id] = sum of grad over the id's places, in float32 in their order, rounded once; rows of other ids aren't written.
struct EmbeddingGradArgs {
  void* out;              // [num_ids, D]
  const void* grad;       // [T, D]
  const int64_t* ids;     // [T], rising; those outside of 0 .. num_ids - 1 are left out
  const int64_t* places;  // [T]: the rows of grad of these ids
  int64_t rows, width, num_ids;
  int32_t dtype;
};

constexpr int MOST_ADAPTERS = 64;  // of a launch: where their factors lie are its arguments

// out += (x A^T) B^T in segments of rows, each with an adapter of its own; other rows stay as they are. What A gives is
// rounded to x's type.
struct LoraArgs {
  void* out;      // [T, N] by out_stride, float32 or of x's type
  void* hidden;   // [T, R] workspace
  const void* x;  // [T, K] by x_stride
  const void* a;  // [rank, K] of the first adapter
  const void* b;  // [N, rank]
  const int64_t* factors;  // [num_adapters, 3], the one member in host memory: where an adapter's a and b lie behind those
                           // above, and its rank
  const int64_t* items;    // [num_items, 3]: adapter, first row, 1 to 16 rows
  int64_t num_adapters;    // at most MOST_ADAPTERS
  int64_t num_items, width_in, width_out, rank, x_stride, out_stride;  // rank: R, the largest
  int32_t dtype, out_dtype;
};

// out = log(sum(exp(row)))
struct LogSumExpArgs {
  float* out;          // [T]
  const void* logits;  // [T, V] by stride
  int64_t rows, width, stride;
  int32_t dtype;
};

// out = exp(logits - lse) - onehot(target); float32 logits may be written as another type.
struct LossGradientArgs {
  void* out;              // [T, V], may be the logits themselves
  const void* logits;     // [T, V] by stride
  const float* lse;       // [T]
  const int64_t* target;  // [T], outside of 0 .. V-1 where it isn't among these columns
  int64_t rows, width, stride;
  int32_t dtype, out_dtype;
};

// One token per draw from a row, without a generator's state. Logits below largest + temperature ln(min_p) are out,
// then those below the k-th largest; a weight is round(2^42 exp((logit - largest) / temperature)). By falling logit, of
// equals by rising id, tokens are kept until their sum reaches top_p of the whole; drawn is the first at which it
// exceeds u times the kept sum. Temperature 0 takes the first of the largest; a row with NaN or without a finite
// largest gives -1.
struct DrawArgs {
  int64_t* ids;             // [C]
  const float* logits;      // [B, V]
  const int64_t* rows;      // [C]: which row
  const double* temperature;  // [C]
  const int64_t* top_k;     // [C], below 1: all
  const double* top_p;      // [C]
  const double* min_p;      // [C]
  const double* u;          // [C] in [0, 1)
  int64_t count, width;     // width at most 2^20
};

// The log-probability of an id, and the largest ones of its row by falling logit, of equals by rising id; those of
// probability 0 and what is missing up to `most` have id -1 and -inf. Weights as above at temperature 1; the rows'
// largest logits are finite.
struct LogprobsArgs {
  double* found;          // [C]
  int64_t* top_ids;       // [C, most]
  double* top_values;     // [C, most]
  int64_t* workspace;     // [C, most]
  const float* logits;    // [B, V]
  const int64_t* rows;    // [C]: which row
  const int64_t* ids;     // [C]: which of its tokens
  const int64_t* num_top;  // [C], at most `most`
  int64_t count, width, most;  // width at most 2^20
};

extern "C" {
int onemesh_cuda_rms_norm(const RmsNormArgs* args, void* stream);
int onemesh_cuda_gate(const GateArgs* args, void* stream);
int onemesh_cuda_rotary(const RotaryArgs* args, void* stream);
int onemesh_cuda_attention_paged(const AttentionPagedArgs* args, void* stream);
int onemesh_cuda_attention_varlen_grad(const AttentionVarlenGradArgs* args, void* stream);
int onemesh_cuda_attention_merge(const AttentionMergeArgs* args, void* stream);
int onemesh_cuda_attention_merge_grad(const AttentionMergeGradArgs* args, void* stream);
int onemesh_cuda_embedding(const EmbeddingArgs* args, void* stream);
int onemesh_cuda_embedding_grad(const EmbeddingGradArgs* args, void* stream);
int onemesh_cuda_linear(const LinearArgs* args, void* stream);
int onemesh_cuda_linear_grad_input(const LinearGradInputArgs* args, void* stream);
int onemesh_cuda_linear_grad_weight(const LinearGradWeightArgs* args, void* stream);
int onemesh_cuda_lora(const LoraArgs* args, void* stream);
int onemesh_cuda_log_sum_exp(const LogSumExpArgs* args, void* stream);
int onemesh_cuda_loss_gradient(const LossGradientArgs* args, void* stream);
int onemesh_cuda_draw(const DrawArgs* args, void* stream);
int onemesh_cuda_logprobs(const LogprobsArgs* args, void* stream);
}
