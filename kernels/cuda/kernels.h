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

extern "C" {
int onemesh_cuda_rms_norm(const RmsNormArgs* args, void* stream);
int onemesh_cuda_gate(const GateArgs* args, void* stream);
int onemesh_cuda_rotary(const RotaryArgs* args, void* stream);
}
