// The mixture's ops under the CUDA key: device and stream, nothing else.
#include <torch/csrc/stable/library.h>

#include "common/cuda/on_device.h"
#include "mixture/cuda/host.h"
#include "switch/checks.h"
#include "switch/cuda/observation.h"

namespace alrao::cuda {
namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

MixtureOutputs nll(const Tensor& x, const Tensor& weight, const Optional& bias,
                   const Tensor& log_posterior, const Tensor& target, int64_t ignore_index,
                   bool mean, bool need_dx, bool need_dw, int64_t memory_budget) {
  const OnDevice on(x);
  return mixture_nll({x, weight, bias, log_posterior}, target, ignore_index,
                     {mean, need_dx, need_dw, memory_budget}, {}, on.stream);
}

MixtureOutputs gaussian_nll(const Tensor& x, const Tensor& weight, const Optional& bias,
                            const Tensor& log_posterior, const Tensor& target, double sigma2,
                            bool mean, bool need_dx, bool need_dw, int64_t memory_budget) {
  const OnDevice on(x);
  return mixture_gaussian_nll({x, weight, bias, log_posterior}, target, sigma2,
                              {mean, need_dx, need_dw, memory_budget}, {}, on.stream);
}

MixtureOutputs nll_observe(const Tensor& x, const Tensor& weight, const Optional& bias,
                           const Tensor& log_posterior, const Tensor& target, int64_t ignore_index,
                           bool mean, bool need_dx, bool need_dw, int64_t memory_budget,
                           const Tensor& logw, const Tensor& t, const Tensor& running,
                           bool mean_evidence, double theta) {
  check_switch_observe(logw, log_posterior, t, running, running, theta);
  const OnDevice on(x);
  return mixture_nll({x, weight, bias, log_posterior}, target, ignore_index,
                     {mean, need_dx, need_dw, memory_budget},
                     observation_of(logw, log_posterior, t, running, mean_evidence, theta),
                     on.stream);
}

MixtureOutputs gaussian_nll_observe(const Tensor& x, const Tensor& weight, const Optional& bias,
                                    const Tensor& log_posterior, const Tensor& target,
                                    double sigma2, bool mean, bool need_dx, bool need_dw,
                                    int64_t memory_budget, const Tensor& logw, const Tensor& t,
                                    const Tensor& running, bool mean_evidence, double theta) {
  check_switch_observe(logw, log_posterior, t, running, running, theta);
  const OnDevice on(x);
  return mixture_gaussian_nll(
      {x, weight, bias, log_posterior}, target, sigma2, {mean, need_dx, need_dw, memory_budget},
      observation_of(logw, log_posterior, t, running, mean_evidence, theta), on.stream);
}

Tensor log_prob(const Tensor& x, const Tensor& weight, const Optional& bias,
                const Tensor& log_posterior, int64_t memory_budget) {
  const OnDevice on(x);
  return mixture_log_prob({x, weight, bias, log_posterior}, memory_budget, on.stream);
}

std::tuple<Tensor, Tensor, Tensor> log_prob_backward(const Tensor& grad, const Tensor& x,
                                                     const Tensor& weight, const Optional& bias,
                                                     const Tensor& log_posterior,
                                                     const Tensor& log_prob, bool need_dx,
                                                     bool need_dw, int64_t memory_budget) {
  const OnDevice on(x);
  return mixture_log_prob_backward(grad, {x, weight, bias, log_posterior}, log_prob, need_dx,
                                   need_dw, memory_budget, on.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) {
  m.impl("switch_mixture_nll", TORCH_BOX(&nll));
  m.impl("switch_mixture_gaussian_nll", TORCH_BOX(&gaussian_nll));
  m.impl("switch_mixture_nll_observe_", TORCH_BOX(&nll_observe));
  m.impl("switch_mixture_gaussian_nll_observe_", TORCH_BOX(&gaussian_nll_observe));
  m.impl("switch_mixture_log_prob", TORCH_BOX(&log_prob));
  m.impl("switch_mixture_log_prob_backward", TORCH_BOX(&log_prob_backward));
}

}  // namespace alrao::cuda
