// RMSNorm, alone and after a residual addition, and its gradients; compiled once per instruction set.
// `kernels.reference.rms_norm` and `add_rms_norm` are the spec. A row's bits depend on that row alone.
#include "rows.h"

namespace {

// 1 / rms of a row from its sum of squares.
inline float inverse_rms(vf squares, int64_t width, float eps) {
  return 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
}

template <class T>
void norm(const NormArgs& a, int64_t first, int64_t last) {
  const T* weight = (const T*)a.weight;
  for (int64_t t = first; t < last; ++t) {
    const T* x = row_of<T>(a.x, t);
    vf squares = {};
    if (a.sum) {
      const T* delta = row_of<T>(a.delta, t);
      T* sum = (T*)a.sum + t * a.width;
      each_vector(a.width, [&](int64_t i, int n) INLINE {
        const vf v = rounded(read(x + i, n) + read(delta + i, n), x);
        write(sum + i, v, n);
        squares = fma(v, v, squares);
      });
      x = sum;
    } else {
      each_vector(a.width, [&](int64_t i, int n) INLINE {
        const vf v = read(x + i, n);
        squares = fma(v, v, squares);
      });
    }
    const float scale = inverse_rms(squares, a.width, a.eps);
    T* out = (T*)a.out + t * a.width;
    each_vector(a.width, [&](int64_t i, int n) INLINE {
      write(out + i, read(weight + i, n) * rounded(read(x + i, n) * scale, x), n);
    });
  }
}

// With n = x / rms and g = grad * weight: grad_x = (g - n * mean(g * n)) / rms (+ grad_sum), and over the rows of each
// block grad_weight = sum of grad * n in float32, rows ascending.
template <class T>
void norm_backward(const NormGradArgs& a, int64_t first_block, int64_t last_block) {
  const T* weight = (const T*)a.weight;
  for (int64_t block = first_block; block < last_block; ++block) {
    float* parts = a.weight_parts ? a.weight_parts + block * a.width : nullptr;
    if (parts) memset(parts, 0, a.width * sizeof(float));
    const int64_t stop = (block + 1) * NORM_BLOCK < a.num_rows ? (block + 1) * NORM_BLOCK : a.num_rows;
    for (int64_t t = block * NORM_BLOCK; t < stop; ++t) {
      const T *x = row_of<T>(a.x, t), *grad = row_of<T>(a.grad, t);
      vf squares = {}, products = {};
      each_vector(a.width, [&](int64_t i, int n) INLINE {
        const vf v = read(x + i, n);
        squares = fma(v, v, squares);
        products = fma(read(grad + i, n) * read(weight + i, n), v, products);
      });
      const float scale = inverse_rms(squares, a.width, a.eps);
      const float mean = sum(products) * scale / a.width;
      const T* grad_sum = a.grad_sum.data ? row_of<T>(a.grad_sum, t) : nullptr;
      T* grad_x = (T*)a.grad_x + t * a.width;
      each_vector(a.width, [&](int64_t i, int n) INLINE {
        const vf g = read(grad + i, n), normed = read(x + i, n) * scale;
        vf y = (g * read(weight + i, n) - normed * mean) * scale;
        if (grad_sum) y += read(grad_sum + i, n);
        write(grad_x + i, y, n);
        if (parts) write(parts + i, fma(g, normed, read(parts + i, n)), n);
      });
    }
  }
}

template <class T>
void sum_rows(T* out, const float* x, int64_t num_rows, int64_t width) {
  each_vector(width, [&](int64_t i, int n) INLINE {
    vf total = {};
    for (int64_t t = 0; t < num_rows; ++t) total += read(x + t * width + i, n);
    write(out + i, total, n);
  });
}

}  // namespace

KERNEL(norm)(const NormArgs& args, int64_t first, int64_t last, bool is_bf16) {
  is_bf16 ? norm<bf16>(args, first, last) : norm<float>(args, first, last);
}

KERNEL(norm_backward)(const NormGradArgs& args, int64_t first_block, int64_t last_block, bool is_bf16) {
  is_bf16 ? norm_backward<bf16>(args, first_block, last_block) : norm_backward<float>(args, first_block, last_block);
}

KERNEL(sum_rows)(void* out, const float* x, int64_t num_rows, int64_t width, bool is_bf16) {
  is_bf16 ? sum_rows((bf16*)out, x, num_rows, width) : sum_rows((float*)out, x, num_rows, width);
}
