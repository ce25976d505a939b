// What the current device offers.
#pragma once

#include "common/cuda/runtime.cuh"

namespace alrao::cuda {

struct DeviceLimits {
  int multiprocessors = 1;
  // Bytes of shared memory that a block may ask for, and that all blocks of a multiprocessor have.
  int block_shared = 48 * 1024, shared = 48 * 1024;
};

inline cudaError_t device_limits(DeviceLimits& limits) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(limits.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(limits.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(limits.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return status;
}

}  // namespace alrao::cuda
