// Blocks per SM: major, minor, KB of shared memory per SM, threads, registers, static and dynamic bytes of shared memory.
#include <cstdio>
#include <cstdlib>

#include "cuda_occupancy.h"

int main(int, char** argv) {
  int v[7];
  for (int i = 0; i < 7; ++i) v[i] = atoi(argv[i + 1]);
  cudaOccDeviceProp device;
  device.computeMajor = v[0];
  device.computeMinor = v[1];
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerMultiprocessor = size_t(v[2]) * 1024;
  device.sharedMemPerBlock = 48 * 1024;
  device.sharedMemPerBlockOptin = size_t(v[2] - 1) * 1024;
  device.reservedSharedMemPerBlock = 1024;
  device.numSms = 1;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = v[3];
  kernel.numRegs = v[4];
  kernel.sharedSizeBytes = size_t(v[5]);
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = size_t(v[6]);
  kernel.numBlockBarriers = 1;
  const cudaOccDeviceState state{};
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, v[3], size_t(v[6]))) return 1;
  printf("%d\n", result.activeBlocksPerMultiprocessor);
}
