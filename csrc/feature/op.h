// The ops of a feature optimizer on one backend: the list op, which brings all tensors, and the
// step of a plan.
#pragma once

#include <utility>

#include "feature/plan.h"

namespace alrao {

using Gradients = std::vector<AtenTensorHandle>;

// One update by a backend: options.grad_factor is without the loss scale, `scalars` are not
// checked.
template <class Options>
using FeatureStep = void (*)(MultiTensor& tensors, const Gradients& grads, const Options& options,
                             const ScalarTensors& scalars);

template <class Options, FeatureStep<Options> STEP>
void checked_step(MultiTensor& tensors, const Gradients& grads, const Options& options,
                  const ScalarTensors& scalars) {
  tensors.check_states(options.num_states(), options.why_states());
  STEP(tensors, grads, options, scalars);
}

template <class T>
T take(StableIValue*& stack) {
  return torch::stable::detail::to<T>(*stack++);
}

// The list op. Its schema (alrao_fast/ops/feature.py) follows from the tables of states and
// options, and so does the order in which its arguments are taken here.
template <class Options, FeatureStep<Options> STEP>
void list_op(const char* name, StableIValue* stack) {
  using Tensors = std::vector<Tensor>;
  using Integers = std::vector<int64_t>;
  using Scalar = std::optional<Tensor>;
  TensorLists lists;
  lists.params = take<Tensors>(stack);
  const auto grads = take<Tensors>(stack);
  for (size_t k = 0; k < Options::kStates.size(); ++k) lists.states.push_back(take<Tensors>(stack));
  while (lists.states.size() > Options::kFixedStates && lists.states.back().empty())
    lists.states.pop_back();
  lists.masters = take<Tensors>(stack);
  lists.averages = take<Tensors>(stack);
  lists.rates = take<Tensors>(stack);
  lists.inners = take<Integers>(stack);
  lists.seeds = take<Integers>(stack);
  lists.steps = take<Tensor>(stack);
  Options options{};
  ScalarTensors scalars;
  options.lr = take<double>(stack);
  scalars.lr = take<Scalar>(stack);
  options.grad_factor = take<bool>(stack) ? -1 : 1;  // maximize
  options.warmup_steps = take<double>(stack);
  options.averaging = take<double>(stack);
  for (const auto& option : Options::table())
    option.set(options, option.is_number() ? take<double>(stack) : take<bool>(stack));
  scalars.grad_scale = take<Scalar>(stack);
  scalars.found_inf = take<Scalar>(stack);

  MultiTensor tensors(op_names<Options>(name), std::move(lists));
  checked_step<Options, STEP>(tensors, borrow(grads), options, scalars);
}

// The same for a plan, whose options are lr, maximize, warmup_steps, averaging and the optimizer's
// own.
template <class Options, FeatureStep<Options> STEP>
void plan_step(MultiTensor& plan, const Gradients& grads, const ScalarTensors& scalars) {
  const auto table = Options::table();
  const std::vector<double>& given = plan.options;
  constexpr size_t kShared = 4;
  if (given.size() != table.size() + kShared)
    fail(plan.op(), "the plan has ", given.size(), " options, expected ", table.size() + kShared);
  Options options{};
  options.lr = given[0];
  options.grad_factor = given[1] != 0 ? -1 : 1;
  options.warmup_steps = given[2];
  options.averaging = given[3];
  for (size_t i = 0; i < table.size(); ++i) table[i].set(options, given[i + kShared]);
  checked_step<Options, STEP>(plan, grads, options, scalars);
}

// Within the namespace of a backend: its ops for every optimizer, as `register_feature_ops`. The
// backend has ALRAO_UPDATE(stem), what its step(tensors, grads, options, scalars, update) takes.
#define ALRAO_STEP(stem, Options)                                                        \
  void stem##_step(MultiTensor& tensors, const Gradients& grads, const Options& options, \
                   const ScalarTensors& scalars) {                                       \
    step(tensors, grads, options, scalars, ALRAO_UPDATE(stem));                          \
  }
#define ALRAO_LIST_OP(stem, Options)                      \
  void stem##_(StableIValue* stack, uint64_t, uint64_t) { \
    list_op<Options, stem##_step>(#stem "_", stack);      \
  }
#define ALRAO_PLAN_STEP(stem, Options) \
  if (plan.op() == #stem "_") return plan_step<Options, stem##_step>(plan, grads, scalars);
#define ALRAO_REGISTER_LIST_OP(stem, Options) m.impl(#stem "_", stem##_);

#define ALRAO_DEFINE_FEATURE_OPS                                                                  \
  ALRAO_OPTIMIZERS(ALRAO_STEP)                                                                    \
  ALRAO_OPTIMIZERS(ALRAO_LIST_OP)                                                                 \
  void feature_plan_step_(StableIValue* stack, uint64_t, uint64_t) {                              \
    run_plan(stack, [](MultiTensor& plan, const Gradients& grads, const ScalarTensors& scalars) { \
      ALRAO_OPTIMIZERS(ALRAO_PLAN_STEP)                                                           \
    });                                                                                           \
  }                                                                                               \
  template <class Library>                                                                        \
  void register_feature_ops(Library& m) {                                                         \
    ALRAO_OPTIMIZERS(ALRAO_REGISTER_LIST_OP)                                                      \
    m.impl("_feature_plan_step_", feature_plan_step_);                                            \
  }

}  // namespace alrao
