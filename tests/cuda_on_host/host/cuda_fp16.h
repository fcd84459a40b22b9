// float16 as CUDA rounds it: to nearest, ties to even; every NaN becomes 0x7fff.
#pragma once
#include <cuda_runtime.h>

struct alignas(2) __half {
  uint16_t x;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  _Float16 value;
  memcpy(&value, &h, 2);
  return float(value);
}
inline __half __float2half_rn(float f) {
  if (f != f) return {0x7fff};
  const _Float16 value = static_cast<_Float16>(f);
  __half h;
  memcpy(&h, &value, 2);
  return h;
}
inline __half __float2half(float f) { return __float2half_rn(f); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
