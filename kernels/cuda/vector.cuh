// Elements of three types as float32, sixteen bytes at a time, and sums over a warp and a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "kernels.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Sixteen bytes of T.
template <class T>
struct alignas(16) Vec {
  static constexpr int N = 16 / sizeof(T);
  T x[N];
};

// Elements p[0 .. count - 1], the rest 0; sixteen bytes a load when `WHOLE`: then p is on a 16-byte border, count at
// least N. N is a multiple of Vec::N.
template <bool WHOLE, class T, int N>
__device__ __forceinline__ void load(const T* p, int64_t count, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += Vec<T>::N) {
    Vec<T> v;
    if constexpr (WHOLE) {
      const uint4 bytes = *reinterpret_cast<const uint4*>(p + i);
      memcpy(&v, &bytes, sizeof v);
    }
#pragma unroll
    for (int j = 0; j < Vec<T>::N; ++j) {
      if constexpr (WHOLE) x[i + j] = to_float(v.x[j]);
      else x[i + j] = i + j < count ? to_float(p[i + j]) : 0.f;
    }
  }
}

template <bool WHOLE, class T>
__device__ __forceinline__ void store(T* p, int64_t count, const float (&x)[Vec<T>::N]) {
  Vec<T> v;
#pragma unroll
  for (int i = 0; i < Vec<T>::N; ++i) {
    if constexpr (WHOLE) v.x[i] = from_float<T>(x[i]);
    else if (i < count) p[i] = from_float<T>(x[i]);
  }
  if constexpr (WHOLE) {
    unsigned words[4];
    memcpy(words, &v, sizeof v);
    ptx::store16(p, words);
  }
}

// Whether rows that start at p and follow by `stride` elements are all on 16-byte borders.
template <class T>
bool on_borders(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % Vec<T>::N == 0;
}

// The same of several tables of one width, without gaps between rows.
template <class T>
bool all_on_borders(std::initializer_list<const void*> tables, int64_t width) {
  for (const void* p : tables)
    if (!on_borders(static_cast<const T*>(p), width)) return false;
  return true;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}

// The sum over the block's WARPS warps, in an order of its own; every thread gets it.
template <int WARPS>
__device__ __forceinline__ float block_sum(float x) {
  SHARED(float, sums, WARPS);
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float total = sums[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) total += sums[w];
  __syncthreads();  // the next call writes again
  return total;
}

// f with a value of the dtype's type; cudaErrorInvalidValue for another code.
template <class F>
int with_dtype(int32_t dtype, F f) {
  switch (dtype) {
    case FLOAT32: return f(float{});
    case FLOAT16: return f(__half{});
    case BFLOAT16: return f(__nv_bfloat16{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
