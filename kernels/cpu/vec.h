// Vectors of the widest registers of the instruction set that a source is compiled for, and what is computed on them.
//
// Everything here is in an unnamed namespace: an inline function emitted with AVX-512 could otherwise be the copy that
// the linker keeps for all instruction sets. Build with -ffp-contract=off: a product and a sum are fused where `fma`
// says so and nowhere else, so that an element has the same bits in any position of any loop.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline))  // of a lambda: what the caller knows is then constant, or in registers

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));

inline vf splat(float x) { return x - vf{}; }
inline vu splat_bits(uint32_t x) { return x - vu{}; }
inline vf bits(vu x) { return (vf)x; }

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

inline vf load(const float* p) { return *(const vf*)p; }
inline void store(float* p, vf x) { *(vf*)p = x; }

// The 4 bytes at p in every lane, loaded here: GCC would keep loop invariants, and what it is about to need, in
// registers that sums take.
inline vf broadcast(const void* p) {
  vf x;
#if defined(__AVX2__)
  typedef float unit __attribute__((aligned(2), may_alias));
  asm volatile("vbroadcastss %1, %0" : "=v"(x) : "m"(*(const unit*)p));
#else
  float f;
  memcpy(&f, p, 4);
  x = splat(f);
#endif
  return x;
}

// bfloat16 is kept as uint16_t.
typedef uint16_t bf16;
inline vf widened(vh x) {  // GCC 12 would convert wide vectors by halves, and warns of the forms without a mask
#if defined(__AVX512F__)
  return bits((vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x) << 16);
#elif defined(__AVX2__)
  return bits((vu)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
  return bits(__builtin_convertvector(x, vu) << 16);
#endif
}
inline vf load(const bf16* p) { return widened(*(const vh*)p); }

inline vu round_bf16(vf x) {  // the upper half, ties to even; NaN stays NaN
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vi is_nan = (vi)((u & 0x7fffffffu) > 0x7f800000u);
  return (rounded & ~(vu)is_nan) | (0x7fc0u & (vu)is_nan);
}
inline vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
  if (!_mm512_fpclass_ps_mask((__m512)x, 0x20)) return (vh)_mm512_cvtneps_pbh((__m512)x);  // it would flush subnormals
#endif
#if defined(__AVX512F__)
  return (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)round_bf16(x));
#else
  return __builtin_convertvector(round_bf16(x), vh);
#endif
}
inline void store(bf16* p, vf x) { *(vh*)p = to_bf16(x); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t u = uint32_t(x) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// What x becomes when it is stored as T.
inline vf rounded(vf x, const float*) { return x; }
inline vf rounded(vf x, const bf16*) { return widened(to_bf16(x)); }

// The first n < W elements; the rest of the vector is zero, and isn't touched in memory.
template <class T>
inline vf load_some(const T* p, int n) {
  T part[W] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
inline void store_some(T* p, vf x, int n) {
  T part[W];
  store(part, x);
  memcpy(p, part, n * sizeof(T));
}

// v[i][j] becomes v[j][i].
__attribute__((always_inline)) inline void transpose(vf (&v)[W]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512 p = _mm512_unpacklo_ps(v[i], v[i + 1]), q = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const __m512 r = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), s = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    a[i] = (__m512)_mm512_unpacklo_pd((__m512d)p, (__m512d)r);
    a[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)p, (__m512d)r);
    a[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)q, (__m512d)s);
    a[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)q, (__m512d)s);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a[4 * g + i]: lane l has column 4 * l + i of the rows 4 * g ...
    b[i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_f32x4(b[i], b[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_f32x4(b[i], b[8 + i], 0xdd);
    v[4 + i] = _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0x88);
    v[12 + i] = _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0xdd);
  }
#else
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    vi low, high;
    for (int lane = 0; lane < W; ++lane) {
      low[lane] = lane & step ? W + lane - step : lane;
      high[lane] = lane & step ? W + lane : lane + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & step)) {
        const vf a = v[i], b = v[i + step];
        v[i] = __builtin_shuffle(a, b, low);
        v[i + step] = __builtin_shuffle(a, b, high);
      }
  }
#endif
}

// Sums and maxima over lanes, halves onto halves: one order for every caller. A maximum with NaN is NaN.
inline float sum(vf x) {
#if defined(__AVX512F__)  // GCC would go through memory
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
#else
  float v[W];
  store(v, x);
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) v[i] += v[i + n];
  return v[0];
#endif
}
inline float max(vf x) {
  float v[W];
  store(v, x);
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) v[i] = v[i] > v[i + n] || v[i] != v[i] ? v[i] : v[i + n];
  return v[0];
}
inline vf max(vf a, vf b) { return select((vi)(a > b) | (vi)(a != a), a, b); }

// e^x within 1 unit in the last place where the result is normal; 0 below, infinity above; exp(0) is 1.
// Cody and Waite's reduction to |r| <= ln(2)/2, then Cephes' polynomial.
inline vf exp(vf x) {
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * splat(1.44269504f) + shifter) - shifter;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y, r * r, r + 1.0f);
  const vi whole = __builtin_convertvector(select((vi)(n == n), n, vf{}), vi);
  const vi half = whole >> 1;  // 2^n in two factors: n may be 128
  y = y * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
  y = select(x < splat(-87.33f), vf{}, y);
  return select(x > splat(88.72f), splat(__builtin_inff()), y);
}

}  // namespace
