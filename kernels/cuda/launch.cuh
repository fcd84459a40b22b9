// How a kernel is launched and how it gets shared memory: the two things that have no plain C++ spelling.
//
// nvcc sees <<< >>> and __shared__; g++ sees calls into the host executor of the tests (tests/cuda_on_host/host).
#pragma once
#include <cuda_runtime.h>

#ifdef __CUDACC__

// The dynamic shared memory of the block, as an array of T.
#define DYN_SHARED(T, name)                                  \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  T* const name = reinterpret_cast<T*>(name##_raw)
// `count` elements of static shared memory; the same ones wherever control passes here.
#define SHARED(T, name, count)                                \
  __shared__ __align__(16) unsigned char name##_raw[sizeof(T) * (count)]; \
  T* const name = reinterpret_cast<T*>(name##_raw)

// Launches k(args...) on `stream`; the error of the launch itself, 0 if there is none.
template <class... Params, class... Args>
inline cudaError_t launch(void (*k)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, Args&&... args) {
  if (smem > 48 * 1024) {  // more than this has to be asked for
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(k),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
    if (error != cudaSuccess) return error;
  }
  k<<<grid, block, smem, stream>>>(static_cast<Params>(args)...);
  return cudaGetLastError();
}

#else

#define DYN_SHARED(T, name) T* const name = static_cast<T*>(::executor::dynamic_shared())
#define SHARED(T, name, count) T* const name = static_cast<T*>(::executor::shared_array(__COUNTER__, sizeof(T) * (count)))

template <class... Params, class... Args>
inline cudaError_t launch(void (*k)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t, Args&&... args) {
  ::executor::launch(grid, block, smem, [=] { k(static_cast<Params>(args)...); });
  return cudaSuccess;
}

#endif
