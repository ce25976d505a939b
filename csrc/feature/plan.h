// Plans: tensors that stay from step to step, made from Python (alrao_fast/ops/_plan.py) and named
// by numbers.
#pragma once

#include "feature/multi_tensor.h"

namespace alrao {

// The op _feature_plan.
int64_t feature_plan(const std::vector<Tensor>& tensors, int64_t num_params, int64_t num_states,
                     std::vector<int64_t> inners, std::vector<int64_t> seeds, const Tensor& steps);

// The plan behind a number that _feature_plan returned; throws for any other.
std::shared_ptr<MultiTensor> find_plan(int64_t number);

// A step of a plan: step(plan, grads, options, lr, grad_scale, found_inf), unless a tensor is no
// longer what the plan saw. Unboxed by hand: a list of stable::Tensor would allocate for every
// gradient.
template <class Step>
void planned_step(StableIValue* stack, size_t num_options, const Step& step) {
  using torch::stable::detail::to;
  const auto number = to<int64_t>(stack[0]);
  const HandleList grads(stack[1]);
  auto lr = to<std::optional<Tensor>>(stack[2]);
  auto grad_scale = to<std::optional<Tensor>>(stack[3]);
  auto found_inf = to<std::optional<Tensor>>(stack[4]);
  const auto plan = find_plan(number);
  const std::lock_guard<std::mutex> lock(plan->mutex);
  STD_TORCH_CHECK(plan->options.size() == num_options, "the plan has ", plan->options.size(),
                  " options, expected ", num_options);
  const bool current = plan->unchanged();
  if (current)
    step(*plan, grads.handles(), plan->options,
         ScalarTensors{std::move(lr), std::move(grad_scale), std::move(found_inf)});
  stack[0] = torch::stable::detail::from(current);
}

}  // namespace alrao
