// The switch's ops as the dispatcher calls them; `On` as in switch_mixture_ops.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda/stream.h"
#include "cuda/switch_update_cuda.h"
#include "switch_update.h"

namespace alrao::cuda {

template <class On>
struct SwitchOps {
  using Tensor = torch::stable::Tensor;

  static SwitchState state_of(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                              double theta) {
    return {static_cast<double*>(logw.mutable_data_ptr()),
            static_cast<double*>(log_posterior.mutable_data_ptr()),
            static_cast<int64_t*>(t.mutable_data_ptr()), logw.size(1), theta};
  }

  static SwitchObservation observation_of(const Tensor& logw, const Tensor& log_posterior,
                                          const Tensor& t, const Tensor& running, bool mean,
                                          double theta) {
    return {state_of(logw, log_posterior, t, theta),
            static_cast<double*>(running.mutable_data_ptr()), mean};
  }

  static void update(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                     const Tensor& log_likelihood, double theta) {
    check_switch_update(logw, log_posterior, t, log_likelihood, theta);
    const On on(logw);
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

  static void observe(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                      const Tensor& running, const Tensor& stats, bool mean, double theta) {
    check_switch_observe(logw, log_posterior, t, running, stats, theta);
    const On on(logw);
    const auto observation = observation_of(logw, log_posterior, t, running, mean, theta);
    check_launch("switch_observe",
                 launch_switch_observe(
                     observation, static_cast<const double*>(stats.const_data_ptr()), on.stream));
  }

  static void add_to(torch::stable::detail::StableLibrary& m) {
    m.impl("switch_update_", TORCH_BOX(&SwitchOps::update));
    m.impl("switch_observe_", TORCH_BOX(&SwitchOps::observe));
  }
};

}  // namespace alrao::cuda
