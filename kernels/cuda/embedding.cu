// Rows of an embedding, and its gradient: rows of the output's gradient added up by id, in the order of the tokens. Whoever
// calls sorts the ids, so that no two blocks write one element and nothing is added atomically.
#include "vector.cuh"

namespace {

constexpr int THREADS = 128;

// A thread's vector of a row of `width`; -1 beyond the end.
template <class T>
__device__ __forceinline__ int64_t own_column(int64_t width) {
  const int64_t column = (int64_t(blockIdx.y) * THREADS + threadIdx.x) * Vec<T>::N;
  return column < width ? column : -1;
}

// An id that the table doesn't have gives NaN.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) embedding(const EmbeddingArgs a) {
  const int64_t column = own_column<T>(a.width), row = blockIdx.x, id = a.ids[row];
  if (column < 0) return;
  float x[Vec<T>::N];
  if (id >= 0 && id < a.num_ids) {
    load<WHOLE>(static_cast<const T*>(a.weight) + id * a.width + column, a.width - column, x);
  } else {
#pragma unroll
    for (float& one : x) one = NAN;
  }
  store<WHOLE>(static_cast<T*>(a.out) + row * a.width + column, a.width - column, x);
}

// The first of an id's places in the sorted list has its row; ids that the table doesn't have are left out.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) embedding_grad(const EmbeddingGradArgs a) {
  const int64_t column = own_column<T>(a.width), first = blockIdx.x, id = a.ids[first];
  if (column < 0 || id < 0 || id >= a.num_ids || (first && a.ids[first - 1] == id)) return;
  float sum[Vec<T>::N] = {};
  for (int64_t i = first; i < a.rows && a.ids[i] == id; ++i) {
    float x[Vec<T>::N];
    load<WHOLE>(static_cast<const T*>(a.grad) + a.places[i] * a.width + column, a.width - column, x);
#pragma unroll
    for (int j = 0; j < Vec<T>::N; ++j) sum[j] = __fadd_rn(sum[j], x[j]);
  }
  store<WHOLE>(static_cast<T*>(a.out) + id * a.width + column, a.width - column, sum);
}

template <class T>
dim3 grid(int64_t rows, int64_t width) {
  constexpr int64_t PER_BLOCK = THREADS * Vec<T>::N;
  return dim3(unsigned(rows), unsigned((width + PER_BLOCK - 1) / PER_BLOCK));
}

template <class T>
int launch_embedding(const EmbeddingArgs& a, cudaStream_t stream) {
  const bool whole = all_on_borders<T>({a.weight, a.out}, a.width);
  const auto kernel = whole ? &embedding<T, true> : &embedding<T, false>;
  return launch(kernel, grid<T>(a.rows, a.width), dim3(THREADS), 0, stream, a);
}

template <class T>
int launch_grad(const EmbeddingGradArgs& a, cudaStream_t stream) {
  const bool whole = all_on_borders<T>({a.grad, a.out}, a.width);
  const auto kernel = whole ? &embedding_grad<T, true> : &embedding_grad<T, false>;
  return launch(kernel, grid<T>(a.rows, a.width), dim3(THREADS), 0, stream, a);
}

}  // namespace

extern "C" int onemesh_cuda_embedding(const EmbeddingArgs* args, void* stream) {
  if (!args->rows || !args->width) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return launch_embedding<decltype(x)>(*args, cudaStream_t(stream)); });
}

extern "C" int onemesh_cuda_embedding_grad(const EmbeddingGradArgs* args, void* stream) {
  if (!args->rows || !args->width) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return launch_grad<decltype(x)>(*args, cudaStream_t(stream)); });
}
