#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda/stream.h"
#include "cuda/switch_update_cuda.h"
#include "switch_update.h"

namespace alrao::cuda {
namespace {

using torch::stable::Tensor;

template <typename scalar_t>
void launch(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
            const Tensor& log_likelihood, double theta) {
  const int32_t device = logw.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(
      "switch_update",
      launch_switch_update(static_cast<double*>(logw.mutable_data_ptr()),
                           static_cast<double*>(log_posterior.mutable_data_ptr()),
                           static_cast<int64_t*>(t.mutable_data_ptr()),
                           static_cast<const scalar_t*>(log_likelihood.const_data_ptr()),
                           logw.size(1), log_likelihood.stride(0), theta, current_stream(device)));
}

void switch_update_cuda(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                        const Tensor& log_likelihood, double theta) {
  check_switch_update(logw, log_posterior, t, log_likelihood, theta);
  if (log_likelihood.scalar_type() == torch::headeronly::ScalarType::Double) {
    launch<double>(logw, log_posterior, t, log_likelihood, theta);
  } else {
    launch<float>(logw, log_posterior, t, log_likelihood, theta);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) {
  m.impl("switch_update_", TORCH_BOX(&switch_update_cuda));
}

}  // namespace alrao::cuda
