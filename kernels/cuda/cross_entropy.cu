// Cross-entropy over rows of logits, in two steps with what several ranks have to exchange in between: a row's maximum,
// sum of exponentials and target logit; then the gradient of the logits.
#include "vector.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

// The largest of the block's values; every thread gets it.
__device__ __forceinline__ float block_max(float x) {
  SHARED(float, tops, WARPS);
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = x;
  __syncthreads();
  float top = tops[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) top = fmaxf(top, tops[w]);
  return top;
}

// exp(x - top) where top may be -inf because nothing else was seen.
__device__ __forceinline__ float weight(float x, float top) { return top == -INFINITY ? 0.f : expf(x - top); }

// One block per row. A thread takes vectors threadIdx.x, threadIdx.x + THREADS, ... of the row.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) row_sums(const CrossEntropyArgs a) {
  constexpr int N = Vec<T>::N;
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  float max = -INFINITY, sum = 0;
  for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) {
    float x[N];
    load<WHOLE>(logits + i, a.width - i, x);
    float top = max;
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (i + j < a.width) top = fmaxf(top, x[j]);
    sum = __fmul_rn(sum, weight(max, top));
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (i + j < a.width) sum = x[j] != x[j] ? x[j] : __fadd_rn(sum, weight(x[j], top));
    max = top;
  }
  const float top = block_max(max);
  sum = block_sum<WARPS>(__fmul_rn(sum, weight(max, top)));
  if (threadIdx.x) return;
  const int64_t target = a.targets[row];
  a.max[row] = top;
  a.sum[row] = sum;
  a.picked[row] = target >= 0 && target < a.width ? to_float(logits[target]) : 0.f;
}

template <class T, class Out, bool WHOLE>
__global__ void __launch_bounds__(THREADS) grad_logits(const CrossEntropyGradArgs a) {
  constexpr int N = Vec<Out>::N;
  const int64_t row = blockIdx.x, target = a.targets[row];
  const float lse = a.lse[row], factor = *a.factor;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  Out* out = static_cast<Out*>(a.out) + row * a.width;
  for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) {
    float x[N];
    load<WHOLE>(logits + i, a.width - i, x);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = __fmul_rn(expf(x[j] - lse) - (i + j == target ? 1.f : 0.f), factor);
    store<WHOLE>(out + i, a.width - i, x);
  }
}

template <class T>
int launch_sums(const CrossEntropyArgs& a, cudaStream_t stream) {
  const bool whole = on_borders(static_cast<const T*>(a.logits), a.stride) && a.width % Vec<T>::N == 0;
  const auto kernel = whole ? &row_sums<T, true> : &row_sums<T, false>;
  return launch(kernel, dim3(unsigned(a.rows)), dim3(THREADS), 0, stream, a);
}

template <class T, class Out>
int launch_grad(const CrossEntropyGradArgs& a, cudaStream_t stream) {
  const bool whole = on_borders(static_cast<const T*>(a.logits), a.stride) &&
                     on_borders(static_cast<const Out*>(a.out), a.width);
  const auto kernel = whole ? &grad_logits<T, Out, true> : &grad_logits<T, Out, false>;
  return launch(kernel, dim3(unsigned(a.rows)), dim3(THREADS), 0, stream, a);
}

}  // namespace

extern "C" int onemesh_cuda_cross_entropy(const CrossEntropyArgs* args, void* stream) {
  if (!args->rows) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return launch_sums<decltype(x)>(*args, cudaStream_t(stream)); });
}

extern "C" int onemesh_cuda_cross_entropy_grad(const CrossEntropyGradArgs* args, void* stream) {
  if (args->dtype != FLOAT32 && args->out_dtype != args->dtype) return cudaErrorInvalidValue;
  if (!args->rows || !args->width) return cudaSuccess;
  return with_dtype(args->out_dtype, [&](auto out) {
    using Out = decltype(out);
    if (args->dtype == FLOAT32) return launch_grad<float, Out>(*args, cudaStream_t(stream));
    return launch_grad<Out, Out>(*args, cudaStream_t(stream));
  });
}
