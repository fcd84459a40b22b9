// The softmax over a row of logits, as the loss and its gradient need it, compiled once per instruction set.
#include "kernels.h"
#include "vec.h"

namespace {

// log(sum(exp(x))) of rows [first, last).
void log_sum_exp(float* out, const float* x, int64_t width, int64_t first, int64_t last) {
  const float none = -__builtin_inff();
  const int64_t whole = width / W * W;
  for (int64_t row = first; row < last; ++row) {
    const float* in = x + row * width;
    vf top = splat(none);
    for (int64_t i = 0; i < whole; i += W) top = max(load(in + i), top);
    float largest = max(top);
    for (int64_t i = whole; i < width; ++i) largest = in[i] > largest || in[i] != in[i] ? in[i] : largest;
    const float from = largest == none ? 0 : largest;
    vf sums[4] = {};  // of vectors 0, 4, 8 ...; 1, 5, 9 ...: exp would wait for one sum
    int64_t i = 0;
    for (; i + 4 * W <= whole; i += 4 * W)
      for (int v = 0; v < 4; ++v) sums[v] += exp(load(in + i + v * W) - from);
    for (; i < whole; i += W) sums[0] += exp(load(in + i) - from);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < width; ++i) total += exp(splat(in[i] - from))[0];
    out[row] = from + __builtin_logf(total);
  }
}

// exp(x - lse), less 1 at the row's target if it has one. out may begin where x does: a row's results are no wider than
// what they are made of, and come behind it.
template <class T>
void loss_gradient(T* out, const float* x, const float* lse, const int64_t* target, int64_t width, int64_t first,
                   int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* in = x + row * width;
    T* to = out + row * width;
    const float hit = target[row] >= 0 ? in[target[row]] : 0;
    int64_t i = 0;
    for (; i + W <= width; i += W) store(to + i, exp(load(in + i) - lse[row]));
    if (i < width) store_some(to + i, exp(load_some(in + i, width - i) - lse[row]), width - i);
    if (target[row] >= 0) store_some(to + target[row], exp(splat(hit - lse[row])) - 1.0f, 1);
  }
}

}  // namespace

KERNEL(log_sum_exp)(float* out, const float* x, int64_t width, int64_t first, int64_t last) {
  log_sum_exp(out, x, width, first, last);
}

KERNEL(loss_gradient)(void* out, const float* x, const float* lse, const int64_t* target, int64_t width, int64_t first,
                      int64_t last, bool is_bf16) {
  if (is_bf16)
    loss_gradient((bf16*)out, x, lse, target, width, first, last);
  else
    loss_gradient((float*)out, x, lse, target, width, first, last);
}
