// y = x W^T + bias and its gradients: one kernel, three ways in which the factors lie.
#include "product.cuh"

namespace {

constexpr int FEW_ROWS = 16, FEW_COLUMNS = 64, FEW_LIMIT = 32;  // up to this many rows the small tile is taken
template <class T>
constexpr int MANY = sizeof(T) == 2 ? 128 : 64;  // rows and columns of the large one

template <class T>
struct Product {
  Matrix<T> a, b;
  int64_t rows, columns, depth;
  const T* bias;    // or null
  void* out;        // [rows, columns] by out_stride
  int64_t out_stride;
  bool is_float;    // out is float32
  bool accumulates;  // what is there is added, in float32
};

template <class T, bool A_FIRST, bool B_FIRST, int ROWS, int COLUMNS>
__global__ void __launch_bounds__(PRODUCT_THREADS, sizeof(T) == 2 ? 2 : 3) multiply(const Product<T> p) {
  constexpr int WARPS_DOWN = ROWS >= 64 ? 2 : 1;
  DYN_SHARED(T, shared);
  Tile<T, ROWS, COLUMNS, WARPS_DOWN> tile;
  const int64_t first_row = int64_t(blockIdx.x) * ROWS, first_column = int64_t(blockIdx.y) * COLUMNS;
  using Run = Pipeline<T, A_FIRST, B_FIRST, ROWS, COLUMNS, WARPS_DOWN>;
  Run::run(p.a, p.b, p.depth, first_row, first_column, shared, tile);
  each(tile, [&](int r, int c, float value) {
    const int64_t row = first_row + r, column = first_column + c, at = row * p.out_stride + column;
    if (row >= p.rows || column >= p.columns) return;
    if (p.bias) value += to_float(p.bias[column]);
    if (p.is_float) {
      float* out = static_cast<float*>(p.out) + at;
      *out = p.accumulates ? *out + value : value;
    } else {
      static_cast<T*>(p.out)[at] = from_float<T>(value);
    }
  });
}

template <class T, bool A_FIRST, bool B_FIRST, int ROWS, int COLUMNS>
int launch_tiles(const Product<T>& p, cudaStream_t stream) {
  const int64_t down = (p.rows + ROWS - 1) / ROWS, across = (p.columns + COLUMNS - 1) / COLUMNS;
  if (across > 65535 || down > 2147483647) return cudaErrorInvalidValue;
  constexpr size_t bytes = Pipeline<T, A_FIRST, B_FIRST, ROWS, COLUMNS, ROWS >= 64 ? 2 : 1>::BYTES;
  const dim3 grid{unsigned(down), unsigned(across)};
  return launch(&multiply<T, A_FIRST, B_FIRST, ROWS, COLUMNS>, grid, dim3(PRODUCT_THREADS), bytes, stream, p);
}

template <class T>
int linear(const LinearArgs& a, cudaStream_t stream) {
  const Product<T> p{Matrix<T>(a.x, a.rows, a.width_in, a.x_stride),
                     Matrix<T>(a.weight, a.width_out, a.width_in, a.width_in),
                     a.rows, a.width_out, a.width_in, static_cast<const T*>(a.bias), a.out, a.width_out,
                     a.out_dtype == FLOAT32, false};
  if (a.rows <= FEW_LIMIT) return launch_tiles<T, false, false, FEW_ROWS, FEW_COLUMNS>(p, stream);
  return launch_tiles<T, false, false, MANY<T>, MANY<T>>(p, stream);
}

template <class T>
int grad_input(const LinearGradInputArgs& a, cudaStream_t stream) {
  const Product<T> p{Matrix<T>(a.grad, a.rows, a.width_out, a.width_out),
                     Matrix<T>(a.weight, a.width_out, a.width_in, a.width_in),
                     a.rows, a.width_in, a.width_out, nullptr, a.out, a.width_in, a.out_dtype == FLOAT32,
                     false};
  return launch_tiles<T, false, true, MANY<T>, MANY<T>>(p, stream);
}

template <class T>
int grad_weight(const LinearGradWeightArgs& a, cudaStream_t stream) {
  const Product<T> p{Matrix<T>(a.grad, a.rows, a.width_out, a.width_out),
                     Matrix<T>(a.x, a.rows, a.width_in, a.width_in),
                     a.width_out, a.width_in, a.rows, nullptr, a.out, a.width_in, true, true};
  return launch_tiles<T, true, true, MANY<T>, MANY<T>>(p, stream);
}

}  // namespace

extern "C" int onemesh_cuda_linear(const LinearArgs* args, void* stream) {
  if (args->out_dtype != FLOAT32 && args->out_dtype != args->dtype) return cudaErrorInvalidValue;
  if (!args->rows || !args->width_out) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return linear<decltype(x)>(*args, cudaStream_t(stream)); });
}

extern "C" int onemesh_cuda_linear_grad_input(const LinearGradInputArgs* args, void* stream) {
  if (args->out_dtype != FLOAT32 && args->out_dtype != args->dtype) return cudaErrorInvalidValue;
  if (!args->rows || !args->width_in) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return grad_input<decltype(x)>(*args, cudaStream_t(stream)); });
}

extern "C" int onemesh_cuda_linear_grad_weight(const LinearGradWeightArgs* args, void* stream) {
  if (!args->rows || !args->width_in || !args->width_out) return cudaSuccess;
  return with_dtype(args->dtype, [&](auto x) { return grad_weight<decltype(x)>(*args, cudaStream_t(stream)); });
}
