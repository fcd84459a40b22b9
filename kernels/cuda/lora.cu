// LoRA of several adapters in one batch (grouped as in Punica's SGMV, arXiv:2310.18547): out += (x A^T) B^T, each segment
// of rows with its adapter's factors. Two launches, the inner product in between rounded to the factors' type.
//
// Factors stay where they were loaded. Where that is goes to the kernel by value, so nothing is copied before a launch.
#include "product.cuh"

namespace {

constexpr int ROWS = 16, COLUMNS = 64;

// The factors of every adapter of a launch.
template <class T>
struct Factors {
  const T *a[MOST_ADAPTERS], *b[MOST_ADAPTERS];
  int rank[MOST_ADAPTERS];
};

template <class T>
using Segment = Pipeline<T, false, false, ROWS, COLUMNS, 1>;

// A block has COLUMNS columns of the product of one item's rows. OUT: the outer product, else the inner one.
template <class T, bool OUT>
__global__ void __launch_bounds__(PRODUCT_THREADS) multiply_segments(const LoraArgs a, const Factors<T> factors) {
  DYN_SHARED(T, shared);
  const int64_t adapter = a.items[3 * blockIdx.x], first = a.items[3 * blockIdx.x + 1];
  const int64_t end = first + a.items[3 * blockIdx.x + 2], column = int64_t(blockIdx.y) * COLUMNS;
  const int64_t rank = factors.rank[adapter], width = OUT ? a.width_out : rank, depth = OUT ? rank : a.width_in;
  if (column >= width) return;  // a smaller rank than others have
  const T* own = OUT ? factors.b[adapter] : factors.a[adapter];
  const Matrix<T> x = OUT ? Matrix<T>(a.hidden, end, rank, a.rank) : Matrix<T>(a.x, end, a.width_in, a.x_stride);
  Tile<T, ROWS, COLUMNS, 1> tile;
  Segment<T>::run(x, Matrix<T>(own, width, depth, depth), depth, first, column, shared, tile);
  each(tile, [&](int r, int c, float value) {
    if (first + r >= end || column + c >= width) return;
    if constexpr (OUT) {
      const int64_t at = (first + r) * a.out_stride + column + c;
      if (a.out_dtype == FLOAT32) {
        static_cast<float*>(a.out)[at] += value;
      } else {
        T* out = static_cast<T*>(a.out) + at;
        *out = from_float<T>(to_float(*out) + value);
      }
    } else {
      static_cast<T*>(a.hidden)[(first + r) * a.rank + column + c] = from_float<T>(value);
    }
  });
}

template <class T>
int lora(const LoraArgs& a, cudaStream_t stream) {
  const auto across = [](int64_t width) { return unsigned((width + COLUMNS - 1) / COLUMNS); };
  Factors<T> factors{};
  for (int64_t i = 0; i < a.num_adapters; ++i) {
    factors.a[i] = static_cast<const T*>(a.a) + a.factors[3 * i];
    factors.b[i] = static_cast<const T*>(a.b) + a.factors[3 * i + 1];
    factors.rank[i] = int(a.factors[3 * i + 2]);
  }
  const unsigned items = unsigned(a.num_items);
  const dim3 inner(items, across(a.rank)), outer(items, across(a.width_out)), block(PRODUCT_THREADS);
  const int error = launch(&multiply_segments<T, false>, inner, block, Segment<T>::BYTES, stream, a, factors);
  return error ? error : launch(&multiply_segments<T, true>, outer, block, Segment<T>::BYTES, stream, a, factors);
}

}  // namespace

extern "C" int onemesh_cuda_lora(const LoraArgs* args, void* stream) {
  if (args->out_dtype != FLOAT32 && args->out_dtype != args->dtype) return cudaErrorInvalidValue;
  if (args->width_out > 65535 * int64_t(COLUMNS) || args->rank > 65535 * int64_t(COLUMNS)) return cudaErrorInvalidValue;
  if (args->num_adapters > MOST_ADAPTERS) return cudaErrorInvalidValue;
  if (!args->num_items || !args->rank || !args->width_out) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return lora<decltype(x)>(*args, cudaStream_t(stream)); });
}
