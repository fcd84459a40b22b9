// Norm, gate, rotary embedding and the writing of pages: each element is read once, sixteen bytes at a time.
//
// A row's result doesn't depend on where rows lie: without 16-byte borders the same threads take the same elements, one
// by one.
#include "kernels.h"
#include "vector.cuh"

namespace {

constexpr int THREADS = 128;

unsigned blocks_for(int64_t items) { return unsigned((items + THREADS - 1) / THREADS); }

// One block per row. A thread takes vectors threadIdx.x, threadIdx.x + THREADS, ... of the row.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) rms_norm(const RmsNormArgs a) {
  constexpr int N = Vec<T>::N;
  const int64_t row = int64_t(blockIdx.x) * a.width;
  const T* source = static_cast<const T*>(a.x) + row;
  float squares = 0;
  for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) {
    float x[N];
    load<WHOLE>(source + i, a.width - i, x);
    if (a.residual) {
      float y[N];
      load<WHOLE>(static_cast<const T*>(a.residual) + row + i, a.width - i, y);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = to_float(from_float<T>(x[j] + y[j]));
      store<WHOLE>(static_cast<T*>(a.sum) + row + i, a.width - i, x);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares += x[j] * x[j];
  }
  const float scale = rsqrtf(block_sum<THREADS / 32>(squares) / float(a.width) + a.eps);
  if (a.residual) source = static_cast<const T*>(a.sum) + row;  // what this thread has written itself
  for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) {
    float x[N], w[N];
    load<WHOLE>(source + i, a.width - i, x);
    load<WHOLE>(static_cast<const T*>(a.weight) + i, a.width - i, w);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = w[j] * to_float(from_float<T>(x[j] * scale));
    store<WHOLE>(static_cast<T*>(a.out) + row + i, a.width - i, x);
  }
}

__device__ __forceinline__ float activate(float x, int32_t activation) {
  if (activation == SILU) return x / (1.f + expf(-x));
  const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);  // sqrt(2 / pi)
  return 0.5f * x * (1.f + tanhf(inner));
}

// One vector per thread.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) gate(const GateArgs a, unsigned per_row) {
  constexpr int N = Vec<T>::N;
  const int64_t item = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = item / per_row, i = item % per_row * N;
  if (row >= a.rows) return;
  float x[N], y[N];
  load<WHOLE>(static_cast<const T*>(a.gate) + row * a.gate_stride + i, a.width - i, x);
  load<WHOLE>(static_cast<const T*>(a.up) + row * a.up_stride + i, a.width - i, y);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = activate(x[j], a.activation) * y[j];
  store<WHOLE>(static_cast<T*>(a.out) + row * a.width + i, a.width - i, x);
}

// A thread takes one vector of the first half of a head and its partner of the second half; heads are those of q, then
// those of k, then those of v.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) rotary(const RotaryArgs a, unsigned per_head) {
  constexpr int N = Vec<T>::N;
  const int64_t item = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t half = a.head_dim / 2, heads = a.num_heads + 2 * a.num_kv_heads;
  const int64_t row = item / per_head / heads, i = item % per_head * N, count = half - i;
  if (row >= a.rows) return;
  int64_t head = item / per_head % heads;
  const T* from = static_cast<const T*>(a.q) + row * a.q_stride;
  T* to = static_cast<T*>(a.q_out) + row * a.num_heads * a.head_dim;
  bool turn = a.cos != nullptr;
  if (head >= a.num_heads) {
    head -= a.num_heads;
    const bool is_value = head >= a.num_kv_heads;
    if (is_value) head -= a.num_kv_heads;
    turn = turn && !is_value;
    from = is_value ? static_cast<const T*>(a.v) + row * a.v_stride : static_cast<const T*>(a.k) + row * a.k_stride;
    to = static_cast<T*>(is_value ? a.value_cache : a.key_cache) + a.slots[row] * a.num_kv_heads * a.head_dim;
  }
  from += head * a.head_dim + i;
  to += head * a.head_dim + i;
  float x[N], y[N];
  load<WHOLE>(from, count, x);
  load<WHOLE>(from + half, count, y);
  if (turn) {
    const float *cos = a.cos + row * a.head_dim + i, *sin = a.sin + row * a.head_dim + i;
    float c[N], s[N], c2[N], s2[N];  // of the two halves
    load<WHOLE>(cos, count, c);
    load<WHOLE>(sin, count, s);
    load<WHOLE>(cos + half, count, c2);
    load<WHOLE>(sin + half, count, s2);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float first = x[j], second = y[j];
      x[j] = first * c[j] - second * s[j];
      y[j] = second * c2[j] + first * s2[j];
    }
  }
  store<WHOLE>(to, count, x);
  store<WHOLE>(to + half, count, y);
}

template <class T>
int launch_rms_norm(const RmsNormArgs& a, cudaStream_t stream) {
  bool whole = all_on_borders<T>({a.x, a.out, a.weight}, a.width);
  if (a.residual) whole = whole && all_on_borders<T>({a.residual, a.sum}, a.width);
  const auto kernel = whole ? &rms_norm<T, true> : &rms_norm<T, false>;
  return launch(kernel, dim3(unsigned(a.rows)), dim3(THREADS), 0, stream, a);
}

template <class T>
int launch_gate(const GateArgs& a, cudaStream_t stream) {
  const bool whole = on_borders(static_cast<const T*>(a.out), a.width) &&
                     on_borders(static_cast<const T*>(a.gate), a.gate_stride) &&
                     on_borders(static_cast<const T*>(a.up), a.up_stride);
  const unsigned per_row = unsigned((a.width + Vec<T>::N - 1) / Vec<T>::N);
  const auto kernel = whole ? &gate<T, true> : &gate<T, false>;
  return launch(kernel, dim3(blocks_for(a.rows * per_row)), dim3(THREADS), 0, stream, a, per_row);
}

template <class T>
int launch_rotary(const RotaryArgs& a, cudaStream_t stream) {
  const int64_t half = a.head_dim / 2;
  bool whole = half % Vec<T>::N == 0 && on_borders(a.cos, 0) && on_borders(a.sin, 0);
  if (a.num_heads)
    whole = whole && on_borders(static_cast<const T*>(a.q), a.q_stride) && on_borders(static_cast<const T*>(a.q_out), 0);
  if (a.num_kv_heads)
    whole = whole && on_borders(static_cast<const T*>(a.k), a.k_stride) &&
            on_borders(static_cast<const T*>(a.v), a.v_stride) && on_borders(static_cast<const T*>(a.key_cache), 0) &&
            on_borders(static_cast<const T*>(a.value_cache), 0);
  const unsigned per_head = unsigned((half + Vec<T>::N - 1) / Vec<T>::N);
  const int64_t items = a.rows * (a.num_heads + 2 * a.num_kv_heads) * per_head;
  if (!items) return cudaSuccess;
  const auto kernel = whole ? &rotary<T, true> : &rotary<T, false>;
  return launch(kernel, dim3(blocks_for(items)), dim3(THREADS), 0, stream, a, per_head);
}

}  // namespace

extern "C" int onemesh_cuda_rms_norm(const RmsNormArgs* args, void* stream) {
  if (!args->rows || !args->width) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return launch_rms_norm<decltype(x)>(*args, cudaStream_t(stream)); });
}

extern "C" int onemesh_cuda_gate(const GateArgs* args, void* stream) {
  if (!args->rows || !args->width) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return launch_gate<decltype(x)>(*args, cudaStream_t(stream)); });
}

extern "C" int onemesh_cuda_rotary(const RotaryArgs* args, void* stream) {
  if (args->head_dim % 2) return cudaErrorInvalidValue;
  return with_dtype(args->dtype, [&](auto x) { return launch_rotary<decltype(x)>(*args, cudaStream_t(stream)); });
}
