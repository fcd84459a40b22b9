// Attention over the union of two disjoint sets of keys from (out, lse) of each, and the gradients of the four. A group of
// LANES threads has a pair (row, head) and takes its vectors in turn.
#include "vector.cuh"

namespace {

constexpr int THREADS = 128, LANES = 8;

// The weights of the two parts, exp(lse_i - lse); where neither saw a key 0.
struct Shares {
  float first, second, lse;

  __device__ Shares(float x, float y) {
    const float top = fmaxf(x, y);
    const bool none = top == -INFINITY;
    const float a = none ? 0.f : expf(x - top), b = none ? 0.f : expf(y - top), sum = a + b;
    first = none ? 0.f : a / sum, second = none ? 0.f : b / sum;
    lse = none ? -INFINITY : top + logf(sum);
  }
};

__device__ __forceinline__ int64_t own_pair() { return (int64_t(blockIdx.x) * THREADS + threadIdx.x) / LANES; }

template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) merge(const AttentionMergeArgs a) {
  constexpr int N = Vec<T>::N;
  const int64_t pair = own_pair(), at = pair * a.head_dim;
  if (pair >= a.pairs) return;
  const Shares shares(a.first_lse[pair], a.second_lse[pair]);
  for (int64_t i = threadIdx.x % LANES * N; i < a.head_dim; i += LANES * N) {
    float x[N], y[N];
    load<WHOLE>(static_cast<const T*>(a.first) + at + i, a.head_dim - i, x);
    load<WHOLE>(static_cast<const T*>(a.second) + at + i, a.head_dim - i, y);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = __fmaf_rn(shares.second, y[j], __fmul_rn(shares.first, x[j]));
    store<WHOLE>(static_cast<T*>(a.out) + at + i, a.head_dim - i, x);
  }
  if (threadIdx.x % LANES == 0) a.lse[pair] = shares.lse;
}

// dout_i = p_i dout,  dlse_i = p_i (dlse + dout . out_i - sum_j p_j dout . out_j)
template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) merge_grad(const AttentionMergeGradArgs a) {
  constexpr int N = Vec<T>::N;
  const bool is_used = own_pair() < a.pairs;
  const int64_t pair = is_used ? own_pair() : a.pairs - 1, at = pair * a.head_dim;  // all lanes meet below
  const Shares shares(a.first_lse[pair], a.second_lse[pair]);
  float with_first = 0.f, with_second = 0.f;
#pragma unroll 1  // unrolled, it spills
  for (int64_t i = threadIdx.x % LANES * N; i < a.head_dim; i += LANES * N) {
    float grad[N], x[N], y[N];
    load<WHOLE>(static_cast<const T*>(a.grad_out) + at + i, a.head_dim - i, grad);
    load<WHOLE>(static_cast<const T*>(a.first) + at + i, a.head_dim - i, x);
    load<WHOLE>(static_cast<const T*>(a.second) + at + i, a.head_dim - i, y);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      with_first = __fmaf_rn(grad[j], x[j], with_first);
      with_second = __fmaf_rn(grad[j], y[j], with_second);
      x[j] = shares.first * grad[j];
      y[j] = shares.second * grad[j];
    }
    if (!is_used) continue;
    store<WHOLE>(static_cast<T*>(a.grad_first) + at + i, a.head_dim - i, x);
    store<WHOLE>(static_cast<T*>(a.grad_second) + at + i, a.head_dim - i, y);
  }
#pragma unroll
  for (int distance = LANES / 2; distance; distance /= 2) {
    with_first += __shfl_xor_sync(ALL_LANES, with_first, distance);
    with_second += __shfl_xor_sync(ALL_LANES, with_second, distance);
  }
  if (!is_used || threadIdx.x % LANES) return;
  // The difference of the two products alone: what they have in common cancels.
  const float grad_lse = a.grad_lse ? a.grad_lse[pair] : 0.f, differing = with_first - with_second;
  a.grad_first_lse[pair] = shares.first * (grad_lse + shares.second * differing);
  a.grad_second_lse[pair] = shares.second * (grad_lse - shares.first * differing);
}

unsigned num_blocks(int64_t pairs) { return unsigned((pairs * LANES + THREADS - 1) / THREADS); }

template <class T>
int launch_merge(const AttentionMergeArgs& a, cudaStream_t stream) {
  const auto kernel = all_on_borders<T>({a.first, a.second, a.out}, a.head_dim) ? &merge<T, true> : &merge<T, false>;
  return launch(kernel, dim3(num_blocks(a.pairs)), dim3(THREADS), 0, stream, a);
}

template <class T>
int launch_grad(const AttentionMergeGradArgs& a, cudaStream_t stream) {
  const bool whole = all_on_borders<T>({a.first, a.second, a.grad_out, a.grad_first, a.grad_second}, a.head_dim);
  const auto kernel = whole ? &merge_grad<T, true> : &merge_grad<T, false>;
  return launch(kernel, dim3(num_blocks(a.pairs)), dim3(THREADS), 0, stream, a);
}

}  // namespace

extern "C" int onemesh_cuda_attention_merge(const AttentionMergeArgs* args, void* stream) {
  if (!args->pairs) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return launch_merge<decltype(x)>(*args, cudaStream_t(stream)); });
}

extern "C" int onemesh_cuda_attention_merge_grad(const AttentionMergeGradArgs* args, void* stream) {
  if (!args->pairs) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return launch_grad<decltype(x)>(*args, cudaStream_t(stream)); });
}
