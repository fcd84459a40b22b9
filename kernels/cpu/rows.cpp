// Elementwise kernels and norms over rows, compiled once per instruction set. A row's bits depend on that row alone.
#include "kernels.h"
#include "vec.h"

namespace {

template <class T>
void silu_gate(T* out, const T* gate, const T* up, int64_t first, int64_t last) {
  const auto one = [](vf g, vf u) { return g / (exp(-g) + 1.0f) * u; };
  int64_t i = first;
  for (; i + W <= last; i += W) store(out + i, one(load(gate + i), load(up + i)));
  if (i < last) store_some(out + i, one(load_some(gate + i, last - i), load_some(up + i, last - i)), last - i);
}

template <class T>
void rms_norm(T* out, const T* x, const T* weight, float eps, int64_t width, int64_t first, int64_t last) {
  const int64_t whole = width / W * W;
  const int rest = width - whole;
  for (int64_t row = first; row < last; ++row) {
    const T* in = x + row * width;
    T* to = out + row * width;
    vf squares = {};
    for (int64_t i = 0; i < whole; i += W) squares = fma(load(in + i), load(in + i), squares);
    if (rest) squares = fma(load_some(in + whole, rest), load_some(in + whole, rest), squares);
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
    const auto one = [&](vf v, vf w) { return w * rounded(v * scale, in); };
    for (int64_t i = 0; i < whole; i += W) store(to + i, one(load(in + i), load(weight + i)));
    if (rest) store_some(to + whole, one(load_some(in + whole, rest), load_some(weight + whole, rest)), rest);
  }
}

template <class T>
void rotary(T* out, const T* x, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim, int64_t first,
            int64_t last) {
  const int64_t half = head_dim / 2;
  for (int64_t t = first; t < last; ++t) {
    const float *c = cos + t * head_dim, *s = sin + t * head_dim;
    for (int64_t head = 0; head < num_heads; ++head) {
      const T* in = x + (t * num_heads + head) * head_dim;
      T* to = out + (t * num_heads + head) * head_dim;
      for (int64_t i = 0; i < half; i += W) {
        const int n = half - i < W ? half - i : W;
        const auto at = [n](const auto* p) { return n == W ? load(p) : load_some(p, n); };
        const vf a = at(in + i), b = at(in + half + i);
        const vf low = a * at(c + i) - b * at(s + i), high = b * at(c + half + i) + a * at(s + half + i);
        if (n == W) {
          store(to + i, low);
          store(to + half + i, high);
        } else {
          store_some(to + i, low, n);
          store_some(to + half + i, high, n);
        }
      }
    }
  }
}

}  // namespace

KERNEL(silu_gate)(void* out, const void* gate, const void* up, int64_t first, int64_t last, bool is_bf16) {
  if (is_bf16)
    silu_gate((bf16*)out, (const bf16*)gate, (const bf16*)up, first, last);
  else
    silu_gate((float*)out, (const float*)gate, (const float*)up, first, last);
}

KERNEL(rms_norm)(void* out, const void* x, const void* weight, float eps, int64_t width, int64_t first, int64_t last,
                  bool is_bf16) {
  if (is_bf16)
    rms_norm((bf16*)out, (const bf16*)x, (const bf16*)weight, eps, width, first, last);
  else
    rms_norm((float*)out, (const float*)x, (const float*)weight, eps, width, first, last);
}

KERNEL(rotary)(void* out, const void* x, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim,
                int64_t first, int64_t last, bool is_bf16) {
  if (is_bf16)
    rotary((bf16*)out, (const bf16*)x, cos, sin, num_heads, head_dim, first, last);
  else
    rotary((float*)out, (const float*)x, cos, sin, num_heads, head_dim, first, last);
}
