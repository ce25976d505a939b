#include "common/cuda/stream.h"

#include <dlfcn.h>

#include "common/checks.h"

namespace alrao::cuda {
namespace {

using GetStream = int32_t (*)(int32_t device_index, void** stream);

// Looked up by name: linking it would make the extension unloadable under a CPU build of torch, and
// torch 2.11's stable headers have no stream handle.
GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

cudaStream_t current_stream(int32_t device_index) {
  static const GetStream get_stream = find_get_stream();
  ALRAO_CHECK(get_stream != nullptr,
              "alrao_fast: this torch has no CUDA; install a CUDA build of torch");
  void* stream = nullptr;
  ALRAO_CHECK(get_stream(device_index, &stream) == 0,
              "alrao_fast: torch gave no current stream for CUDA device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  ALRAO_CHECK(error == cudaSuccess, "alrao_fast: ", cudaGetErrorString(error));
  return status != cudaStreamCaptureStatusNone;
}

void check_launch(const char* kernel, cudaError_t status) {
  ALRAO_CHECK(status == cudaSuccess, "alrao_fast: the CUDA kernel ", kernel,
              " did not start: ", cudaGetErrorString(status));
}

}  // namespace alrao::cuda
