// Sums and maxima over the ranks' buffers, in rank order: ((x0 + x1) + x2) + ...
//
// bfloat16 and float16 are summed in float32 and rounded once, to nearest even. Integers wrap. NaN wins a maximum.
//
// Compiled once per instruction set (NAME is reduce_<set>); all of them give the same bits, entry by entry.
#include <cstring>
#include <type_traits>

#include "arena.h"

namespace {

constexpr size_t BLOCK = 1024;  // items whose partial sums stay in the first cache

float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class T>
T load(T x) {
  return x;
}

float load(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }

float load(Half x) {
  const uint32_t shifted = (x.bits & 0x7fffu) << 13;
  const uint32_t normal = shifted + (112u << 23);                        // another bias of the exponent
  const float subnormal = as_float(normal + (1u << 23)) - 0x1p-14f;      // exact: the hidden one taken away again
  const uint32_t special = normal + (112u << 23);                        // infinity and NaN
  const uint32_t exponent = x.bits & 0x7c00u;
  const uint32_t magnitude = exponent == 0 ? as_bits(subnormal) : exponent == 0x7c00u ? special : normal;
  return as_float(magnitude | (x.bits & 0x8000u) << 16);
}

template <class T, class A>
void store(T& to, A x) {
  to = x;
}

void store(BFloat16& to, float x) {
  const uint32_t bits = as_bits(x);
  to.bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

void store(Half& to, float x) {
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // the addition rounds to 2^-24
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t result = magnitude < 113u << 23 ? subnormal : magnitude >= 143u << 23 ? special : normal;
  to.bits = uint16_t(result | (bits >> 16 & 0x8000u));
}

struct Sum {
  template <class A>
  A operator()(A a, A b) const {
    if constexpr (std::is_integral_v<A>) {
      using U = std::make_unsigned_t<A>;
      return A(U(U(a) + U(b)));
    } else {
      return a + b;
    }
  }
};

struct Max {
  template <class A>
  A operator()(A a, A b) const {
    return (a > b) | (a != a) ? a : b;
  }
};

template <class T, class Combine>
void reduce_as(const uint8_t* const* sources, int n, uint8_t* out, uint8_t* copy, size_t bytes) {
  using A = decltype(load(T()));
  const Combine combine;
  A partial[BLOCK];
  const auto first = reinterpret_cast<const T*>(sources[0]), second = reinterpret_cast<const T*>(sources[1]);
  const auto to = reinterpret_cast<T*>(out);
  for (size_t at = 0; at < bytes / sizeof(T); at += BLOCK) {
    const size_t left = bytes / sizeof(T) - at, count = left < BLOCK ? left : BLOCK;
    // `to` may be one of the sources, never a part of one further on
    if (n == 2) {
#pragma GCC ivdep
      for (size_t i = at; i < at + count; i++) store(to[i], combine(load(first[i]), load(second[i])));
    } else {
      for (size_t i = 0; i < count; i++) partial[i] = combine(load(first[at + i]), load(second[at + i]));
      for (int r = 2; r < n; r++) {
        const auto next = reinterpret_cast<const T*>(sources[r]) + at;
        for (size_t i = 0; i < count; i++) partial[i] = combine(partial[i], load(next[i]));
      }
      for (size_t i = 0; i < count; i++) store(to[at + i], partial[i]);
    }
    if (copy != nullptr) std::memcpy(copy + at * sizeof(T), to + at, count * sizeof(T));
  }
}

using Reduce = void (*)(const uint8_t* const*, int, uint8_t*, uint8_t*, size_t);

struct Type {
  Reduce sum, max;
};

template <class T>
constexpr Type type() {
  return {reduce_as<T, Sum>, reduce_as<T, Max>};
}

// in the order of `DTYPES` in kernels/shared_memory.py
constexpr Type TYPES[] = {type<float>(),  type<double>(),  type<BFloat16>(), type<Half>(),   type<uint8_t>(),
                          type<int8_t>(), type<int16_t>(), type<int32_t>(),  type<int64_t>()};

}  // namespace

void NAME(int type, const uint8_t* const* sources, int n, uint8_t* out, uint8_t* copy, size_t bytes) {
  const Type& t = TYPES[type / 2];
  (type % 2 ? t.max : t.sum)(sources, n, out, copy, bytes);
}
