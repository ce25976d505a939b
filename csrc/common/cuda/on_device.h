// Where a binding runs its kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda/stream.h"

namespace alrao::cuda {

// The device of a tensor, current while this lives, and torch's stream there.
struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace alrao::cuda
