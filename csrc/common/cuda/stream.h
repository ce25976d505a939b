// What every CUDA binding needs from torch and from the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace alrao::cuda {

// torch's current stream on a device. Raises where torch is a CPU build.
cudaStream_t current_stream(int32_t device_index);

// Whether a graph is captured on a stream.
bool is_capturing(cudaStream_t stream);

// Raises with the CUDA runtime's own words if launching `kernel` failed.
void check_launch(const char* kernel, cudaError_t status);

}  // namespace alrao::cuda
