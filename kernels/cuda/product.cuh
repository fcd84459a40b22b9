// Products of tiles in shared memory by a block of four warps: on tensor cores for 16-bit types, by FFMA in float32.
//
// Every element is a sum over the depth in steps of 16 from its start on, whatever the tile's height and width: so the
// few-row and the many-row kernel give the same bits. In float32 a step is summed by itself first: two short chains
// lose less than one long one.
#pragma once
#include "ptx.cuh"
#include "vector.cuh"

namespace {

constexpr int PRODUCT_THREADS = 128;

// Elements from line to line of a tile whose lines are WIDTH long: 16 bytes more, so that banks differ.
template <class T, int WIDTH>
constexpr int LINE = WIDTH + Vec<T>::N;

// A matrix in global memory. `whole`: sixteen bytes may be read at once.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;
  bool whole;

  __host__ __device__ Matrix(const void* data, int64_t rows, int64_t columns, int64_t stride)
      : data(static_cast<const T*>(data)), rows(rows), columns(columns), stride(stride),
        whole(reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % Vec<T>::N == 0) {}
};

// Starts to copy the tile at (first_row, first_column) to shared memory, by the whole block; what is outside becomes 0.
template <int LINES, int WIDTH, class T>
__device__ __forceinline__ void fetch(const Matrix<T>& m, int64_t first_row, int64_t first_column, T* to) {
  constexpr int N = Vec<T>::N, PER_LINE = WIDTH / N;
  static_assert(LINES * PER_LINE % PRODUCT_THREADS == 0 || LINES * PER_LINE < PRODUCT_THREADS, "even shares");
#pragma unroll
  for (int v = threadIdx.x; v < LINES * PER_LINE; v += PRODUCT_THREADS) {
    const int64_t row = first_row + v / PER_LINE, column = first_column + v % PER_LINE * N;
    const int64_t left = row < m.rows ? m.columns - column : 0;
    const int count = left <= 0 ? 0 : left < N ? int(left) : N;
    const T* from = count ? m.data + row * m.stride + column : m.data;
    T* at = to + v / PER_LINE * LINE<T, WIDTH> + v % PER_LINE * N;
    if (m.whole) {
      ptx::cp_async16(at, from, count * int(sizeof(T)));
    } else {
      Vec<T> x;
#pragma unroll
      for (int j = 0; j < N; ++j) x.x[j] = j < count ? from[j] : from_float<T>(0.f);
      *reinterpret_cast<Vec<T>*>(at) = x;
    }
  }
}

// A factor in shared memory, element (i, k) for depth k: depths lie side by side, or with DEPTH_FIRST in a line each.
template <bool DEPTH_FIRST, int WIDTH, class T>
struct Factor {
  const T* data;
  __device__ const T* at(int i, int k) const {
    return DEPTH_FIRST ? data + k * LINE<T, WIDTH> + i : data + i * LINE<T, WIDTH> + k;
  }
};

// A block's ROWS x COLUMNS sums, WARPS_DOWN of its warps one below the other; a thread has OWN_ROWS x OWN_COLUMNS.
// The threads of a row are LANES neighbours of a warp if the warps are all one below the other.
template <class T, int ROWS, int COLUMNS, int WARPS_DOWN>
struct Tile {
  static constexpr int DOWN = ROWS / WARPS_DOWN, ACROSS = COLUMNS * WARPS_DOWN / 4;  // of a warp
  static constexpr int M = DOWN / 16, N = ACROSS / 16;
  static constexpr int OWN_ROWS = 2 * M, OWN_COLUMNS = 4 * N, LANES = 4, NEIGHBOURS = 2;
  float sums[M][2 * N][4];

  __device__ __forceinline__ float& at(int r, int c) { return sums[r / 2][c / 2][r % 2 * 2 + c % 2]; }
  __device__ __forceinline__ static int row(int r) {
    return threadIdx.x / 32 % WARPS_DOWN * DOWN + r / 2 * 16 + r % 2 * 8 + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ static int column(int c) {
    return threadIdx.x / 32 / WARPS_DOWN * ACROSS + c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < OWN_ROWS; ++r)
#pragma unroll
      for (int c = 0; c < OWN_COLUMNS; ++c) at(r, c) = 0.f;
  }

  // sums += a b^T over DEPTH.
  template <int DEPTH, bool A_FIRST, int A_WIDTH, bool B_FIRST, int B_WIDTH>
  __device__ __forceinline__ void add(Factor<A_FIRST, A_WIDTH, T> a, Factor<B_FIRST, B_WIDTH, T> b) {
    const int warp = threadIdx.x / 32, matrix = threadIdx.x % 32 / 8, line = threadIdx.x % 8;
    const int i = warp % WARPS_DOWN * DOWN, j = warp / WARPS_DOWN * ACROSS;
    // Of the four 8x8 matrices of a load, a's second has the next rows and its third the next depths, b's the reverse.
    const int low = matrix % 2 * 8, high = matrix / 2 * 8;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      unsigned x[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if constexpr (A_FIRST) ptx::ldmatrix_x4_trans(x[m], a.at(i + m * 16 + low, k + high + line));
        else ptx::ldmatrix_x4(x[m], a.at(i + m * 16 + low + line, k + high));
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        unsigned y[4];
        if constexpr (B_FIRST) ptx::ldmatrix_x4_trans(y, b.at(j + n * 16 + high, k + low + line));
        else ptx::ldmatrix_x4(y, b.at(j + n * 16 + high + line, k + low));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          ptx::mma_m16n8k16(sums[m][2 * n], x[m], {y[0], y[1]}, sums[m][2 * n], T{});
          ptx::mma_m16n8k16(sums[m][2 * n + 1], x[m], {y[2], y[3]}, sums[m][2 * n + 1], T{});
        }
      }
    }
  }
};

template <int ROWS, int COLUMNS, int WARPS_DOWN>
struct Tile<float, ROWS, COLUMNS, WARPS_DOWN> {
  static constexpr int OWN_ROWS = ROWS / 8, OWN_COLUMNS = COLUMNS / 16, LANES = 16, NEIGHBOURS = 1;
  float sums[OWN_ROWS][OWN_COLUMNS];

  __device__ __forceinline__ float& at(int r, int c) { return sums[r][c]; }
  __device__ __forceinline__ static int row(int r) { return r * 8 + threadIdx.x / 16; }
  __device__ __forceinline__ static int column(int c) { return c * 16 + threadIdx.x % 16; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < OWN_ROWS; ++r)
#pragma unroll
      for (int c = 0; c < OWN_COLUMNS; ++c) sums[r][c] = 0.f;
  }

  // Four depths at once, sixteen bytes where they lie side by side.
  template <bool DEPTH_FIRST, int WIDTH>
  __device__ __forceinline__ static void read(Factor<DEPTH_FIRST, WIDTH, float> from, int i, int k, float (&x)[4]) {
    if constexpr (DEPTH_FIRST) {
#pragma unroll
      for (int d = 0; d < 4; ++d) x[d] = *from.at(i, k + d);
    } else {
      const float4 v = *reinterpret_cast<const float4*>(from.at(i, k));
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
  }

  template <int DEPTH, bool A_FIRST, int A_WIDTH, bool B_FIRST, int B_WIDTH>
  __device__ __forceinline__ void add(Factor<A_FIRST, A_WIDTH, float> a, Factor<B_FIRST, B_WIDTH, float> b) {
#pragma unroll 1
    for (int first = 0; first < DEPTH; first += 16) {
      float part[OWN_ROWS][OWN_COLUMNS] = {};
#pragma unroll
      for (int k = first; k < first + 16; k += 4) {
        float y[OWN_COLUMNS][4];
#pragma unroll
        for (int c = 0; c < OWN_COLUMNS; ++c) read(b, column(c), k, y[c]);
#pragma unroll
        for (int r = 0; r < OWN_ROWS; ++r) {
          float x[4];
          read(a, row(r), k, x);
#pragma unroll
          for (int d = 0; d < 4; ++d)
#pragma unroll
            for (int c = 0; c < OWN_COLUMNS; ++c) part[r][c] = __fmaf_rn(x[d], y[c][d], part[r][c]);
        }
      }
#pragma unroll
      for (int r = 0; r < OWN_ROWS; ++r)
#pragma unroll
        for (int c = 0; c < OWN_COLUMNS; ++c) sums[r][c] = __fadd_rn(sums[r][c], part[r][c]);
    }
  }
};

// The tile at rows `row` and columns `column` of a b^T, with factors that come in by cp.async, three stages in turn.
// FIRST: the factor's matrix has a row per depth.
template <class T, bool A_FIRST, bool B_FIRST, int ROWS, int COLUMNS, int WARPS_DOWN>
struct Pipeline {
  static constexpr int STAGES = 3, DEPTH = 64 / sizeof(T);
  static constexpr int A_LINES = A_FIRST ? DEPTH : ROWS, A_WIDTH = A_FIRST ? ROWS : DEPTH;
  static constexpr int B_LINES = B_FIRST ? DEPTH : COLUMNS, B_WIDTH = B_FIRST ? COLUMNS : DEPTH;
  static constexpr int A_SIZE = A_LINES * LINE<T, A_WIDTH>, STAGE = A_SIZE + B_LINES * LINE<T, B_WIDTH>;
  static constexpr size_t BYTES = STAGES * STAGE * sizeof(T);

  __device__ static void fetch_stage(const Matrix<T>& a, const Matrix<T>& b, int64_t row, int64_t column, int64_t t,
                                     T* shared) {
    T* stage = shared + t % STAGES * STAGE;
    const int64_t k = t * DEPTH;
    fetch<A_LINES, A_WIDTH>(a, A_FIRST ? k : row, A_FIRST ? row : k, stage);
    fetch<B_LINES, B_WIDTH>(b, B_FIRST ? k : column, B_FIRST ? column : k, stage + A_SIZE);
  }

  __device__ static void run(const Matrix<T>& a, const Matrix<T>& b, int64_t depth, int64_t row, int64_t column,
                             T* shared, Tile<T, ROWS, COLUMNS, WARPS_DOWN>& tile) {
    const int64_t steps = (depth + DEPTH - 1) / DEPTH;
    tile.clear();
    for (int64_t t = 0; t < STAGES - 1; ++t) {
      if (t < steps) fetch_stage(a, b, row, column, t, shared);
      ptx::cp_async_commit();
    }
    for (int64_t t = 0; t < steps; ++t) {
      ptx::cp_async_wait<STAGES - 2>();
      __syncthreads();  // all have copied stage t, and are done with the one that is filled next
      if (t + STAGES - 1 < steps) fetch_stage(a, b, row, column, t + STAGES - 1, shared);
      ptx::cp_async_commit();
      const T* stage = shared + t % STAGES * STAGE;
      tile.template add<DEPTH>(Factor<A_FIRST, A_WIDTH, T>{stage}, Factor<B_FIRST, B_WIDTH, T>{stage + A_SIZE});
    }
  }
};

// f(row, column, value) for all of this thread's sums.
template <class Tile, class F>
__device__ __forceinline__ void each(Tile& tile, F f) {
#pragma unroll
  for (int r = 0; r < Tile::OWN_ROWS; ++r)
#pragma unroll
    for (int c = 0; c < Tile::OWN_COLUMNS; ++c) f(Tile::row(r), Tile::column(c), tile.at(r, c));
}

}  // namespace
