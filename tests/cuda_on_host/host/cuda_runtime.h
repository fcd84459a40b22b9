// What kernels use of CUDA's language and runtime, for g++ and the executor. `__shared__` is missing on purpose: shared
// memory comes from DYN_SHARED and SHARED (launch.cuh), so that every block's is its own allocation.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "executor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define EXECUTOR_NO_TSAN __attribute__((no_sanitize("thread")))

#define threadIdx (::executor::self->index)
#define blockIdx (::executor::block_index)
#define blockDim (::executor::block_dim)
#define gridDim (::executor::grid_dim)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaMemsetAsync(void* p, int byte, size_t bytes, cudaStream_t) {
  memset(p, byte, bytes);
  return cudaSuccess;
}

inline void __syncthreads(EXECUTOR_SITE) { executor::block_barrier(0, {"__syncthreads", file_, line_}); }
inline int __syncthreads_count(int p, EXECUTOR_SITE) {
  return executor::block_barrier(p != 0, {"__syncthreads_count", file_, line_});
}
inline int __syncthreads_or(int p, EXECUTOR_SITE) {
  return executor::block_barrier(p != 0, {"__syncthreads_or", file_, line_}) != 0;
}
inline int __syncthreads_and(int p, EXECUTOR_SITE) {
  return executor::block_barrier(p == 0, {"__syncthreads_and", file_, line_}) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, EXECUTOR_SITE) {
  executor::warp_collective(mask, nullptr, nullptr, nullptr, true, {"__syncwarp", file_, line_});
}
inline void __threadfence() {}

namespace executor {

template <class T>
struct Shuffle {
  T value;
  unsigned from;
};

// A lane outside of the mask gives garbage, as on a GPU: here NaN.
template <class T>
EXECUTOR_NO_TSAN void exchange_shuffle(Thread* warp, unsigned mask) {
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const unsigned from = static_cast<const Shuffle<T>*>(warp[i].in)->from;
    if (mask >> from & 1) {
      *static_cast<T*>(warp[i].out) = static_cast<const Shuffle<T>*>(warp[from].in)->value;
    } else {
      for (size_t b = 0; b < sizeof(T); ++b) static_cast<volatile unsigned char*>(warp[i].out)[b] = 0xFF;
    }
  }
}

template <class T>
T shuffle(unsigned mask, T value, unsigned from, Site site) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) <= 8, "shuffles move numbers");
  const Shuffle<T> in{value, from};
  T out;
  warp_collective(mask, &exchange_shuffle<T>, &in, &out, false, site);
  return out;
}

EXECUTOR_NO_TSAN inline void exchange_ballot(Thread* warp, unsigned mask) {
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i & 1) && *static_cast<const int*>(warp[i].in)) votes |= 1u << i;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) *static_cast<unsigned*>(warp[i].out) = votes;
}

inline unsigned ballot(unsigned mask, int p, Site site) {
  unsigned out;
  warp_collective(mask, &exchange_ballot, &p, &out, false, site);
  return out;
}

// Read-modify-write in relaxed order, as CUDA's atomics are.
template <class T, class F>
T atomic_update(T* p, F change) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  may_switch();
  Bits* bits = reinterpret_cast<Bits*>(p);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED), next;
  T value;
  do {
    memcpy(&value, &old, sizeof(T));
    const T changed = change(value);
    memcpy(&next, &changed, sizeof(T));
  } while (!__atomic_compare_exchange_n(bits, &old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return value;
}

}  // namespace executor

// Shuffles within groups of `width` lanes, a power of two.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, EXECUTOR_SITE) {
  const unsigned first = executor::self->lane & ~unsigned(width - 1);
  return executor::shuffle(mask, value, first | (from & (width - 1)), {"__shfl_sync", file_, line_});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EXECUTOR_SITE) {
  const unsigned lane = executor::self->lane, from = lane ^ unsigned(bits), end = (lane & ~unsigned(width - 1)) + width;
  return executor::shuffle(mask, value, from < end ? from : lane, {"__shfl_xor_sync", file_, line_});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EXECUTOR_SITE) {
  const unsigned lane = executor::self->lane, end = (lane & ~unsigned(width - 1)) + width;
  return executor::shuffle(mask, value, lane + by < end ? lane + by : lane, {"__shfl_down_sync", file_, line_});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EXECUTOR_SITE) {
  const unsigned lane = executor::self->lane, at = lane & (width - 1);
  return executor::shuffle(mask, value, at >= by ? lane - by : lane, {"__shfl_up_sync", file_, line_});
}
inline unsigned __ballot_sync(unsigned mask, int p, EXECUTOR_SITE) {
  return executor::ballot(mask, p, {"__ballot_sync", file_, line_});
}
inline int __any_sync(unsigned mask, int p, EXECUTOR_SITE) {
  return executor::ballot(mask, p, {"__any_sync", file_, line_}) != 0;
}
inline int __all_sync(unsigned mask, int p, EXECUTOR_SITE) {
  return executor::ballot(mask, p == 0, {"__all_sync", file_, line_}) == 0;
}

template <class T>
T atomicAdd(T* p, T value) {
  return executor::atomic_update(p, [=](T old) { return old + value; });
}
template <class T>
T atomicMax(T* p, T value) {
  return executor::atomic_update(p, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* p, T value) {
  return executor::atomic_update(p, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* p, T value) {
  return executor::atomic_update(p, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  return executor::atomic_update(p, [=](T old) { return old == expected ? value : old; });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
