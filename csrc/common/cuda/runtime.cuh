// What every .cu includes instead of cuda_runtime.h. The kernels are compiled by nvcc for the GPU
// and, with ALRAO_CUDA_ON_CPU defined, by the host compiler against the header of the tests that
// runs a block's threads on the CPU. So they launch through `launch`, and take dynamic shared
// memory by ALRAO_DYNAMIC_SHARED: <<<>>> and `extern __shared__` are no C++.
#pragma once

#ifdef ALRAO_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace alrao::cuda {

// What a block may have without asking, on every GPU: 48 KiB, of which what the kernel declares
// `__shared__` beside it may take 1.
constexpr std::size_t kDefaultDynamicShared = 47 * 1024;

// Starts `kernel` (of a template: kernel<float, true>) and returns what the launch says. A large
// parameter is declared `const __grid_constant__ T` in the kernel and given by reference here.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (shared_bytes > kDefaultDynamicShared) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  return cudaGetLastError();
}

}  // namespace alrao::cuda

// Declares `type* name`, the block's dynamic shared memory, aligned to 16 bytes.
#define ALRAO_DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(16) unsigned char alrao_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(alrao_shared_memory)
#endif
