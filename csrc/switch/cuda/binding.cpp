#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/cuda/on_device.h"
#include "switch/checks.h"
#include "switch/cuda/observation.h"

namespace alrao::cuda {
namespace {

using torch::stable::Tensor;

void switch_update(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                   const Tensor& log_likelihood, double theta) {
  check_switch_update(logw, log_posterior, t, log_likelihood, theta);
  const OnDevice on(logw);
  const SwitchState state = state_of(logw, log_posterior, t, theta);
  const void* values = log_likelihood.const_data_ptr();
  const int64_t stride = log_likelihood.stride(0);
  const bool is_double = log_likelihood.scalar_type() == torch::headeronly::ScalarType::Double;
  check_launch(
      "switch_update",
      is_double
          ? launch_switch_update(state, static_cast<const double*>(values), stride, on.stream)
          : launch_switch_update(state, static_cast<const float*>(values), stride, on.stream));
}

void switch_observe(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                    const Tensor& running, const Tensor& stats, bool mean, double theta) {
  check_switch_observe(logw, log_posterior, t, running, stats, theta);
  const OnDevice on(logw);
  check_launch(
      "switch_observe",
      launch_switch_observe(observation_of(logw, log_posterior, t, running, mean, theta),
                            static_cast<const double*>(stats.const_data_ptr()), on.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) {
  m.impl("switch_update_", TORCH_BOX(&switch_update));
  m.impl("switch_observe_", TORCH_BOX(&switch_observe));
}

}  // namespace alrao::cuda
