// What starting a launch over many tensors takes.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "feature/cuda/table.h"
#include "feature/optimizers.h"

namespace alrao::cuda {

// A number that lives on the device: one float or double; null stands for none.
struct DeviceScalar {
  const void* data;
  bool is_double;
};

struct DeviceScalars {
  DeviceScalar lr;  // a factor of the options'
  DeviceScalar grad_scale;
  DeviceScalar found_inf;
};

struct MultiTensorCall {
  const MultiTensorTable& layout;
  void* table;                                // of layout.bytes bytes on the device, uploaded
  const std::vector<FeatureRecord>& records;  // their gradients are read
  DeviceScalars scalars;
  double warmup_steps;
  double averaging;
  cudaStream_t stream;
};

// launch_<stem>: the update of every tensor of a call. The loss scale divides options.grad_factor.
#define ALRAO_DECLARE_LAUNCH(stem, Options) \
  cudaError_t launch_##stem(const MultiTensorCall& call, const Options& options);
ALRAO_OPTIMIZERS(ALRAO_DECLARE_LAUNCH)
#undef ALRAO_DECLARE_LAUNCH

// Fills a table in stream order, out of kernel arguments: what is on the host may go at once, and a
// captured graph carries the contents itself.
cudaError_t upload_table(const MultiTensorTable& layout, void* table, cudaStream_t stream);

}  // namespace alrao::cuda
