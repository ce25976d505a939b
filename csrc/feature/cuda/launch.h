// What starting a launch over many tensors takes.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "feature/cuda/table.h"

namespace alrao::cuda {

// A number that lives on the device: one float or double; null stands for none.
struct DeviceScalar {
  const void* data;
  bool is_double;
};

struct DeviceScalars {
  DeviceScalar lr;  // in place of the options'
  DeviceScalar grad_scale;
  DeviceScalar found_inf;
};

struct MultiTensorCall {
  const MultiTensorTable& layout;
  void* table;                                // of layout.bytes bytes on the device, uploaded
  const std::vector<FeatureRecord>& records;  // their gradients are read
  DeviceScalars scalars;
  cudaStream_t stream;
};

// Fills a table in stream order, out of kernel arguments: what is on the host may go at once, and a
// captured graph carries the contents itself.
cudaError_t upload_table(const MultiTensorTable& layout, void* table, cudaStream_t stream);

}  // namespace alrao::cuda
