// The mixture's ops under the CUDA key: device and stream, nothing else.
#include "common/cuda/on_device.h"
#include "mixture/boxed.h"
#include "mixture/cuda/problem.h"
#include "switch/checks.h"
#include "switch/cuda/observation.h"

namespace alrao::cuda {
namespace {

using torch::stable::Tensor;

MixtureOutputs loss(const LossArguments& arguments) {
  SwitchObservation observation{};
  if (arguments.observer) {
    const auto& [logw, t, running, mean, theta] = *arguments.observer;
    const Tensor& log_posterior = arguments.inputs.log_posterior;
    check_switch_observe(logw, log_posterior, t, running, running, theta);
    observation = observation_of(logw, log_posterior, t, running, mean, theta);
  }
  const OnDevice on(arguments.inputs.x);
  return mixture_loss(arguments, observation, on.stream);
}

void scale(StableIValue* values, uint64_t num_arguments, uint64_t) {
  Stack stack(values, num_arguments, 4);
  const auto dx = stack.take<Tensor>(), dweight = stack.take<Tensor>();
  const auto dbias = stack.take<Tensor>(), factor = stack.take<Tensor>();
  const OnDevice on(dx);
  mixture_scale(dx, dweight, dbias, factor, on.stream);
}

LogProbOutputs log_prob(const MixtureInputs& inputs, int64_t memory_budget, double softcap) {
  const OnDevice on(inputs.x);
  return mixture_log_prob(inputs, memory_budget, softcap, on.stream);
}

MixtureGradients log_prob_backward(const LogProbGradient& arguments) {
  const OnDevice on(arguments.inputs.x);
  return mixture_log_prob_backward(arguments, on.stream);
}

Weights weights(const WeightArguments& arguments) {
  const OnDevice on(arguments.target);
  return mixture_weights(arguments, on.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) {
  m.impl("switch_mixture_nll", &boxed_loss<ClassesOptions, false, &loss>);
  m.impl("switch_mixture_nll_observe_", &boxed_loss<ClassesOptions, true, &loss>);
  m.impl("switch_mixture_gaussian_nll", &boxed_loss<ValuesOptions, false, &loss>);
  m.impl("switch_mixture_gaussian_nll_observe_", &boxed_loss<ValuesOptions, true, &loss>);
  m.impl("switch_mixture_scale_", &scale);
  m.impl("switch_mixture_weights", &boxed_weights<&weights>);
  m.impl("switch_mixture_log_prob", &boxed_log_prob<&log_prob>);
  m.impl("switch_mixture_log_prob_backward", &boxed_log_prob_backward<&log_prob_backward>);
}

}  // namespace alrao::cuda
