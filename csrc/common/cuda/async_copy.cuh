// 16 bytes from global to shared memory while the thread goes on; it alone reads them afterwards.
#pragma once

#include "common/cuda/runtime.cuh"

#ifndef ALRAO_CUDA_ON_CPU
#include <cuda_pipeline_primitives.h>
#endif

namespace alrao::cuda {

__device__ inline void copy_async(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, 16);
}

// What was asked for since the last call is a group.
__device__ inline void commit_copies() { __pipeline_commit(); }

// Until at most the kLeft latest groups are on their way.
template <int kLeft>
__device__ void wait_for_copies() {
  __pipeline_wait_prior(kLeft);
}

}  // namespace alrao::cuda
