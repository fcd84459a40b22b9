// Rotary embedding, alone and with the write of keys and values into pages; compiled once per instruction set.
// `kernels.reference.rotary` and `rotary_write` are the spec.
#include "rows.h"

namespace {

// All heads of one token. sign = -1 turns back: the transposed rotation, which is the gradient.
template <class T>
inline void rotate(T* out, const T* x, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim,
                   float sign) {
  const int64_t half = head_dim / 2;
  for (int64_t head = 0; head < num_heads; ++head, x += head_dim, out += head_dim) {
    each_vector(half, [&](int64_t i, int n) INLINE {
      const vf low = read(x + i, n), high = read(x + half + i, n);
      write(out + i, low * read(cos + i, n) - high * (read(sin + i, n) * sign), n);
      write(out + half + i, high * read(cos + half + i, n) + low * (read(sin + half + i, n) * sign), n);
    });
  }
}

template <class T>
void rotary(const RotaryArgs& a, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t)
    rotate((T*)a.out + t * a.num_heads * a.head_dim, row_of<T>(a.x, t), a.cos + t * a.head_dim, a.sin + t * a.head_dim,
           a.num_heads, a.head_dim, a.sign);
}

template <class T>
void rotary_write(const RotaryArgs& q, const PagesArgs& a, int64_t first, int64_t last) {
  rotary<T>(q, first, last);
  const int64_t width = a.num_kv_heads * q.head_dim;
  for (int64_t t = first; t < last; ++t) {
    const int64_t at = a.slots[t] * width;
    rotate((T*)a.keys + at, row_of<T>(a.k, t), q.cos + t * q.head_dim, q.sin + t * q.head_dim, a.num_kv_heads,
           q.head_dim, 1.0f);
    memcpy((T*)a.values + at, row_of<T>(a.v, t), width * sizeof(T));
  }
}

}  // namespace

KERNEL(rotary)(const RotaryArgs& args, int64_t first, int64_t last, bool is_bf16) {
  is_bf16 ? rotary<bf16>(args, first, last) : rotary<float>(args, first, last);
}

KERNEL(rotary_write)(const RotaryArgs& q, const PagesArgs& args, int64_t first, int64_t last, bool is_bf16) {
  is_bf16 ? rotary_write<bf16>(q, args, first, last) : rotary_write<float>(q, args, first, last);
}
