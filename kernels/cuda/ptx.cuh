// Every line of PTX of the project. For g++ the same functions come from the tests' model of the PTX ISA.
//
// Fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": with
// g = lane / 4 and t = lane % 4, element i of a lane's
//   a (8 halves) is row g (+8 for i = 2, 3, 6, 7), column 2t + i % 2 (+8 for i >= 4) of A [16, 16];
//   b (4 halves) is row 2t + i % 2 (+8 for i >= 2), column g of B [16, 8];
//   c (4 floats) is row g (+8 for i >= 2), column 2t + i % 2 of C [16, 8].
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__
namespace ptx {

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// d = a b + c in float32; the type only says how the 16-bit halves are read. d and c may be the same array.
#define ONEMESH_MMA(TYPE, NAME)                                                                                   \
  __device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],     \
                                               const float (&c)[4], TYPE) {                                       \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                                   \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};\n"                          \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),        \
                   "f"(c[2]), "f"(c[3]));                                                                         \
  }
ONEMESH_MMA(__nv_bfloat16, "bf16")
ONEMESH_MMA(__half, "f16")
#undef ONEMESH_MMA

// Four 8x8 matrices of 16-bit elements: lane 8j + r gives the address of row r of matrix j, on a 16-byte border. Every
// lane gets elements 2 (lane % 4) and the next of row lane / 4; transposed: of column lane / 4.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Stores 16 bytes to global memory at once, on a 16-byte border: left to itself nvcc takes some vector stores apart.
__device__ __forceinline__ void store16(void* to, const unsigned (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Copies 16 bytes from global to shared memory while the thread goes on; of them the last 16 - `bytes` become zero.
// Both addresses on a 16-byte border. Nobody may read the destination before its group was waited for.
__device__ __forceinline__ void cp_async16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
// Copies issued since the last commit become one group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most N of this thread's newest groups are under way. Other threads see the data after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

}  // namespace ptx
#else
#include "ptx_host.h"
#endif
