// Plans: tensors that stay from step to step, made from Python (alrao_fast/ops/plan.py) and named
// by numbers.
#pragma once

#include "feature/multi_tensor.h"

namespace alrao {

// The op _feature_plan: `tensors` are the parameters, the lists of `op`'s states, the masters and
// the averages if there are any, and the rates.
int64_t feature_plan(const std::string& op, const std::vector<Tensor>& tensors, int64_t num_params,
                     int64_t num_states, bool masters, bool averages, std::vector<int64_t> inners,
                     std::vector<int64_t> seeds, const Tensor& steps);

// The plan behind a number that _feature_plan returned; throws for any other.
std::shared_ptr<MultiTensor> find_plan(int64_t number);

// The op _feature_plan_step_: step(plan, grads, scalars), and whether it was done: not where a
// tensor is no longer what the plan saw. Unboxed by hand: a list of stable::Tensor would allocate
// for every gradient.
template <class Step>
void run_plan(StableIValue* stack, const Step& step) {
  using torch::stable::detail::to;
  const auto number = to<int64_t>(stack[0]);
  const HandleList grads(stack[1]);
  ScalarTensors scalars;
  scalars.lr = to<std::optional<Tensor>>(stack[2]);
  scalars.grad_scale = to<std::optional<Tensor>>(stack[3]);
  scalars.found_inf = to<std::optional<Tensor>>(stack[4]);
  const auto plan = find_plan(number);
  const std::lock_guard<std::mutex> lock(plan->mutex);
  const bool current = plan->unchanged();
  if (current) step(*plan, grads.handles(), scalars);
  stack[0] = torch::stable::detail::from(current);
}

}  // namespace alrao
