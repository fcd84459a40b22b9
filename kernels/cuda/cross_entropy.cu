// Cross-entropy over rows of logits, in two steps between which several ranks may merge theirs: a row's log-sum-exp, then
// the gradient of the logits.
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
__global__ void __launch_bounds__(THREADS) log_sum_exp(const LogSumExpArgs a) {
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
  if (threadIdx.x == 0) a.out[row] = top + logf(sum);
}

template <class T, class Out, bool WHOLE>
__global__ void __launch_bounds__(THREADS) loss_gradient(const LossGradientArgs a) {
  constexpr int N = Vec<Out>::N;
  const int64_t row = blockIdx.x, target = a.target[row];
  const float lse = a.lse[row];
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  Out* out = static_cast<Out*>(a.out) + row * a.width;
  for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) {
    float x[N];
    load<WHOLE>(logits + i, a.width - i, x);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = expf(x[j] - lse) - (i + j == target ? 1.f : 0.f);
    store<WHOLE>(out + i, a.width - i, x);
  }
}

template <class T>
int launch_lse(const LogSumExpArgs& a, cudaStream_t stream) {
  const bool whole = on_borders(static_cast<const T*>(a.logits), a.stride) && a.width % Vec<T>::N == 0;
  const auto kernel = whole ? &log_sum_exp<T, true> : &log_sum_exp<T, false>;
  return launch(kernel, dim3(unsigned(a.rows)), dim3(THREADS), 0, stream, a);
}

template <class T, class Out>
int launch_grad(const LossGradientArgs& a, cudaStream_t stream) {
  const bool whole = on_borders(static_cast<const T*>(a.logits), a.stride) &&
                     on_borders(static_cast<const Out*>(a.out), a.width);
  const auto kernel = whole ? &loss_gradient<T, Out, true> : &loss_gradient<T, Out, false>;
  return launch(kernel, dim3(unsigned(a.rows)), dim3(THREADS), 0, stream, a);
}

}  // namespace

extern "C" int onemesh_cuda_log_sum_exp(const LogSumExpArgs* args, void* stream) {
  if (!args->rows) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return launch_lse<decltype(x)>(*args, cudaStream_t(stream)); });
}

extern "C" int onemesh_cuda_loss_gradient(const LossGradientArgs* args, void* stream) {
  if (args->dtype != FLOAT32 && args->out_dtype != args->dtype) return cudaErrorInvalidValue;
  if (!args->rows || !args->width) return cudaSuccess;
  return with_dtype(args->out_dtype, [&](auto out) {
    using Out = decltype(out);
    if (args->dtype == FLOAT32) return launch_grad<float, Out>(*args, cudaStream_t(stream));
    return launch_grad<Out, Out>(*args, cudaStream_t(stream));
  });
}
