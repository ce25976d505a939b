// The switch's tensors, checked, as kernels take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "switch/cuda/update.h"

namespace alrao::cuda {

inline SwitchState state_of(const torch::stable::Tensor& logw,
                            const torch::stable::Tensor& log_posterior,
                            const torch::stable::Tensor& t, double theta) {
  return {static_cast<double*>(logw.mutable_data_ptr()),
          static_cast<double*>(log_posterior.mutable_data_ptr()),
          static_cast<int64_t*>(t.mutable_data_ptr()), logw.size(1), theta};
}

inline SwitchObservation observation_of(const torch::stable::Tensor& logw,
                                        const torch::stable::Tensor& log_posterior,
                                        const torch::stable::Tensor& t,
                                        const torch::stable::Tensor& running, bool mean,
                                        double theta) {
  return {state_of(logw, log_posterior, t, theta), static_cast<double*>(running.mutable_data_ptr()),
          mean};
}

}  // namespace alrao::cuda
