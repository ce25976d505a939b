// What csrc/common/cuda/stream.cpp and torch's device guard are on a GPU, for CPU tensors.
#include <torch/headeronly/util/Exception.h>

#include "common/cuda/stream.h"

namespace alrao::cuda {

cudaStream_t current_stream(int32_t) { return nullptr; }

bool is_capturing(cudaStream_t) { return false; }

void check_launch(const char* kernel, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "alrao_fast: the CUDA kernel ", kernel,
                  " did not start: ", cudaGetErrorString(status));
}

}  // namespace alrao::cuda

// Linked in before torch's own, which want an accelerator.
extern "C" {
__attribute__((visibility("hidden"))) int32_t aoti_torch_create_device_guard(int32_t,
                                                                             void** guard) {
  *guard = nullptr;
  return 0;
}
__attribute__((visibility("hidden"))) int32_t aoti_torch_delete_device_guard(void*) { return 0; }
}
