// Gates of feed-forward layers and their gradients; compiled once per instruction set.
// `kernels.reference.silu_gate` and `gelu_gate` are the spec.
//
// Both are up * gate * s with s = sigmoid(u): u = gate is SiLU; u = 2 sqrt(2 / pi) (gate + 0.044715 gate^3) is GELU by
// tanh, as 0.5 (1 + tanh(z)) = sigmoid(2 z). du is the derivative of u.
#include "rows.h"

namespace {

struct Silu {
  static vf u(vf gate) { return gate; }
  static vf du(vf) { return splat(1.0f); }
};

struct Gelu {
  static constexpr float FACTOR = 1.595769122f, CUBIC = 0.044715f;
  static vf u(vf gate) { return gate * FACTOR * fma(gate * CUBIC, gate, splat(1.0f)); }
  static vf du(vf gate) { return FACTOR * fma(gate * (3 * CUBIC), gate, splat(1.0f)); }
};

template <class Gate, class T>
void gate(const GateArgs& a, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const T *gate = row_of<T>(a.gate, t), *up = row_of<T>(a.up, t);
    T* out = (T*)a.out + t * a.out_stride;
    each_vector(a.width, [&](int64_t i, int n) INLINE {
      const vf g = read(gate + i, n);
      write(out + i, g / (exp(-Gate::u(g)) + 1.0f) * read(up + i, n), n);
    });
  }
}

template <class Gate, class T>
void gate_backward(const GateGradArgs& a, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const T *gate = row_of<T>(a.gate, t), *up = row_of<T>(a.up, t), *grad = row_of<T>(a.grad, t);
    T *grad_gate = (T*)a.grad_gate + t * a.width, *grad_up = (T*)a.grad_up + t * a.width;
    each_vector(a.width, [&](int64_t i, int n) INLINE {
      const vf g = read(gate + i, n), dy = read(grad + i, n);
      const vf s = 1.0f / (exp(-Gate::u(g)) + 1.0f);
      write(grad_up + i, dy * (g * s), n);
      // s first: it is 0 where du overflows
      write(grad_gate + i, dy * read(up + i, n) * fma(g * s * (1.0f - s), Gate::du(g), s), n);
    });
  }
}

}  // namespace

KERNEL(gate)(const GateArgs& args, int64_t first, int64_t last, bool is_bf16) {
  if (args.is_gelu) is_bf16 ? gate<Gelu, bf16>(args, first, last) : gate<Gelu, float>(args, first, last);
  else is_bf16 ? gate<Silu, bf16>(args, first, last) : gate<Silu, float>(args, first, last);
}

KERNEL(gate_backward)(const GateGradArgs& args, int64_t first, int64_t last, bool is_bf16) {
  if (args.is_gelu) is_bf16 ? gate_backward<Gelu, bf16>(args, first, last) : gate_backward<Gelu, float>(args, first, last);
  else is_bf16 ? gate_backward<Silu, bf16>(args, first, last) : gate_backward<Silu, float>(args, first, last);
}
