// The gradient of an embedding; compiled once per instruction set.
#include "rows.h"

namespace {

// Rows [first, last) of the table: each is the float32 sum of its tokens' gradients, tokens ascending.
template <class T>
void embedding_backward(const EmbeddingGradArgs& a, int64_t first, int64_t last) {
  for (int64_t id = first; id < last; ++id) {
    const int64_t start = a.starts[id], stop = a.starts[id + 1];
    T* out = (T*)a.grad_weight + id * a.width;
    if (start == stop) {
      memset(out, 0, a.width * sizeof(T));
      continue;
    }
    each_vector(a.width, [&](int64_t i, int n) INLINE {
      vf total = {};
      for (int64_t j = start; j < stop; ++j) total += read(row_of<T>(a.grad, a.tokens[j]) + i, n);
      write(out + i, total, n);
    });
  }
}

}  // namespace

KERNEL(embedding_backward)(const EmbeddingGradArgs& args, int64_t first, int64_t last, bool is_bf16) {
  is_bf16 ? embedding_backward<bf16>(args, first, last) : embedding_backward<float>(args, first, last);
}
