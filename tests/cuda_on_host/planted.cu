// Small kernels with one mistake each, made where `bug` isn't 0: the executor and the sanitizers must see every one.
#include "planted.h"

#include "launch.cuh"
#include "ptx.cuh"

namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int THREADS = 64;

__device__ float warp_sum(float v) {
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(ALL, v, i);
  return v;
}

// out[b] = sum of x[b, 64], two warps combined in shared memory
__global__ void combine(Planted a) {
  SHARED(float, sums, THREADS / 32);
  const float sum = warp_sum(a.x[blockIdx.x * THREADS + threadIdx.x]);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;  // combine: write
  if (!a.bug) __syncthreads();
  if (threadIdx.x == 0) a.out[blockIdx.x] = sums[0] + sums[1];  // combine: read
}

// out[t] = sum over 4 tiles of x[tile, 63 - t]; tiles come in by cp.async, two buffers in turn
__global__ void tiles(Planted a) {
  SHARED(float, buffer, 2 * THREADS);
  const int t = threadIdx.x;
  const auto fetch = [&](int tile) {
    if (tile < 4 && t < THREADS / 4) ptx::cp_async16(buffer + tile % 2 * THREADS + 4 * t, a.x + tile * THREADS + 4 * t, 16);
    ptx::cp_async_commit();
  };
  fetch(0);
  float sum = 0;
  for (int tile = 0; tile < 4; ++tile) {
    fetch(tile + 1);
    if (a.bug == 1) ptx::cp_async_wait<2>();
    else ptx::cp_async_wait<1>();
    __syncthreads();
    sum += buffer[tile % 2 * THREADS + THREADS - 1 - t];
    if (a.bug != 2) __syncthreads();
  }
  a.out[t] = sum;
}

// out[t] = sum over 4 rounds of what thread 63 - t wrote
__global__ void overwrite(Planted a) {
  SHARED(float, shared, THREADS);
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    shared[threadIdx.x] = a.x[i * THREADS + threadIdx.x];  // overwrite: write
    __syncthreads();
    sum += shared[THREADS - 1 - threadIdx.x];  // overwrite: read
    if (!a.bug) __syncthreads();
  }
  a.out[threadIdx.x] = sum;
}

// bug 1: a barrier that half the threads skip; 2: two barriers; 3: one that some have no chance to reach
__global__ void barriers(Planted a) {
  a.out[threadIdx.x] = 1;
  if (a.bug == 1) {
    if (threadIdx.x < 32) __syncthreads();  // barriers: condition
  } else if (a.bug == 2) {
    if (threadIdx.x < 32) __syncthreads();  // barriers: first
    else __syncthreads();                   // barriers: second
  } else if (a.bug == 3) {
    if (threadIdx.x < 32) __syncthreads();  // barriers: alone
    else __shfl_sync(ALL, 1, 0);
    __syncthreads();
  }
}

// bug 1: lanes have exited; 2: lanes are in another shuffle; 3: a lane names a mask without itself
__global__ void shuffles(Planted a) {
  const int lane = threadIdx.x % 32;
  if (a.bug == 1 && lane >= 16) return;
  float v = a.x[threadIdx.x];
  if (a.bug == 2 && lane < 16) v = __shfl_xor_sync(ALL, v, 2);  // shuffles: other
  else v = __shfl_xor_sync(a.bug == 3 ? 0xffffu : ALL, v, 1);   // shuffles: here
  a.out[threadIdx.x] = v;
}

// out[t] = x[t ^ 1] through shared memory. bug 1: no barrier; 2: a shuffle in its place, which orders no memory
__global__ void neighbours(Planted a) {
  SHARED(float, shared, THREADS);
  shared[threadIdx.x] = a.x[threadIdx.x];  // neighbours: write
  if (!a.bug) __syncwarp();
  if (a.bug == 2) __shfl_sync(ALL, 0, 0);
  a.out[threadIdx.x] = shared[threadIdx.x ^ 1];  // neighbours: read
}

// out[s] = sum of the first lengths[s] slots of the pages of sequence s, 4 slots a page.
// bug 1: a page too many where the last one is full; 2: pos <= length
__global__ void pages(Planted a) {
  const int s = blockIdx.x, slot = threadIdx.x % 4, first = threadIdx.x / 4;
  const int64_t length = a.lengths[s], count = a.bug == 1 ? length / 4 + 1 : (length + 3) / 4;
  float sum = 0;
  for (int64_t page = first; page < count; page += 8) {
    // volatile: read even where it isn't used
    const volatile float* where = a.x + a.table[s * a.width + page] * 4 + slot;  // pages: table
    const float value = *where;  // pages: read
    if (a.bug == 2 ? page * 4 + slot <= length : page * 4 + slot < length) sum += value;
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) a.out[s] = sum;
}

// bug 1: past the end of static shared memory; 2: of dynamic
__global__ void bounds(Planted a) {
  SHARED(float, fixed, THREADS);
  DYN_SHARED(float, dynamic);
  fixed[threadIdx.x] = dynamic[threadIdx.x] = a.x[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = fixed[threadIdx.x + (a.bug == 1)] + dynamic[threadIdx.x + (a.bug == 2)];  // bounds: read
}

__global__ void unaligned(Planted a) {
  const float4 v = *reinterpret_cast<const float4*>(a.x + 4 * threadIdx.x + a.bug);  // unaligned: read
  a.out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

// bug 1: two threads of a block write one element; 2: two blocks do
__global__ void writers(Planted a) {
  const int at = a.bug == 1 ? threadIdx.x / 2 : a.bug == 2 ? threadIdx.x : blockIdx.x * THREADS + threadIdx.x;
  a.out[at] = a.x[blockIdx.x * THREADS + threadIdx.x];  // writers: write
}

// out[0] = sum of x by atomics. bug 1: one thread writes without
__global__ void atomics(Planted a) {
  if (a.bug == 1 && threadIdx.x == 7) a.out[0] += a.x[threadIdx.x];  // atomics: plain
  else atomicAdd(a.out, a.x[threadIdx.x]);
}

// out [16, 8] = A [16, 16] B [16, 8]^T of bfloat16: x is A, then B with its columns as rows. bug 1: registers swapped
__global__ void product(Planted a) {
  SHARED(__nv_bfloat16, shared, 16 * 16 + 16 * 8);
  for (int i = threadIdx.x; i < 16 * 24 / 8; i += 32)
    reinterpret_cast<uint4*>(shared)[i] = reinterpret_cast<const uint4*>(a.x)[i];
  __syncwarp();
  const int lane = threadIdx.x, group = lane / 4, t = lane % 4;
  unsigned left[4], right[4];
  ptx::ldmatrix_x4(left, shared + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix_x4(right, shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);  // matrices 2 and 3 aren't used
  if (a.bug) {
    const unsigned first = left[1];
    left[1] = left[2];
    left[2] = first;
  }
  const unsigned b[2] = {right[0], right[1]};
  float c[4] = {};
  ptx::mma_m16n8k16(c, left, b, c, __nv_bfloat16{});
  for (int i = 0; i < 4; ++i) a.out[(group + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

template <class K>
int run(K kernel, const Planted* a, int threads, void* stream, size_t smem = 0) {
  return launch(kernel, dim3(unsigned(a->blocks)), dim3(threads), smem, cudaStream_t(stream), *a);
}

}  // namespace

extern "C" {
int planted_combine(const Planted* a, void* stream) { return run(&combine, a, THREADS, stream); }
int planted_tiles(const Planted* a, void* stream) { return run(&tiles, a, THREADS, stream); }
int planted_overwrite(const Planted* a, void* stream) { return run(&overwrite, a, THREADS, stream); }
int planted_barriers(const Planted* a, void* stream) { return run(&barriers, a, THREADS, stream); }
int planted_shuffles(const Planted* a, void* stream) { return run(&shuffles, a, THREADS, stream); }
int planted_neighbours(const Planted* a, void* stream) { return run(&neighbours, a, THREADS, stream); }
int planted_pages(const Planted* a, void* stream) { return run(&pages, a, 32, stream); }
int planted_bounds(const Planted* a, void* stream) { return run(&bounds, a, THREADS, stream, THREADS * 4); }
int planted_unaligned(const Planted* a, void* stream) { return run(&unaligned, a, 32, stream); }
int planted_writers(const Planted* a, void* stream) { return run(&writers, a, THREADS, stream); }
int planted_atomics(const Planted* a, void* stream) { return run(&atomics, a, THREADS, stream); }
int planted_product(const Planted* a, void* stream) { return run(&product, a, 32, stream); }
int planted_partial(const Planted* a, void* stream) { return run(&writers, a, 48, stream); }
}
