// Boxed kernels of the mixture's ops: the one place that knows the order of the schemas
// (alrao_fast/ops/mixture).
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "common/checks.h"
#include "mixture/checks.h"

namespace alrao {

// An op's arguments, to be taken one after the other; then the place of its results.
class Stack {
 public:
  Stack(StableIValue* values, uint64_t given, uint64_t expected) : values_(values), next_(values) {
    ALRAO_CHECK(given == expected, "the schema has ", given, " arguments, the kernel ", expected);
  }

  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

  MixtureInputs take_inputs() {
    using torch::stable::Tensor;
    return {take<Tensor>(), take<Tensor>(), take<std::optional<Tensor>>(), take<Tensor>()};
  }

  template <class... Results>
  void put(const std::tuple<Results...>& results) {
    next_ = values_;
    std::apply(
        [&](const auto&... result) { ((*next_++ = torch::stable::detail::from(result)), ...); },
        results);
  }

 private:
  StableIValue* values_;
  StableIValue* next_;
};

// The loss by the likelihood with these options; kObserved: of the op that observes. The first of
// the options follows the target, those added later stand at the end.
template <class Options, bool kObserved, MixtureOutputs (*kRun)(const LossArguments&)>
void boxed_loss(StableIValue* values, uint64_t num_arguments, uint64_t) {
  using torch::stable::Tensor;
  Options likelihood;
  const auto fields = likelihood.fields();
  static_assert(std::tuple_size_v<decltype(likelihood.fields())> == 1);
  constexpr bool kClasses = std::is_same_v<Options, ClassesOptions>;
  Stack stack(values, num_arguments, 10 + (kObserved ? 5 : 0) + (kClasses ? 10 : 4));
  const auto take_into = [&](auto& option) {
    option = stack.take<std::decay_t<decltype(option)>>();
  };

  MixtureInputs inputs = stack.take_inputs();
  Tensor target = stack.take<Tensor>();
  take_into(std::get<0>(fields));
  const LossOptions options{stack.take<bool>(), stack.take<bool>(), stack.take<bool>(),
                            stack.take<int64_t>()};
  std::optional<SwitchObserver> observer;
  if constexpr (kObserved) {
    observer = SwitchObserver{stack.take<Tensor>(), stack.take<Tensor>(), stack.take<Tensor>(),
                              stack.take<bool>(), stack.take<double>()};
  }
  LossExtras extras;
  take_into(extras.row_weight);
  if constexpr (kClasses) {
    take_into(extras.class_weight);
    take_into(extras.label_smoothing);
    take_into(extras.z_loss);
    take_into(extras.softcap);
  }
  take_into(extras.per_sample);
  take_into(extras.divisor);
  take_into(extras.num_items);
  if constexpr (kClasses) {
    take_into(extras.likeliest);
    take_into(extras.make_factors);
  }
  stack.put(kRun({std::move(inputs), std::move(target), likelihood, options, std::move(extras),
                  std::move(observer)}));
}

template <Weights (*kRun)(const WeightArguments&)>
void boxed_weights(StableIValue* values, uint64_t num_arguments, uint64_t) {
  using torch::stable::Tensor;
  Stack stack(values, num_arguments, 9);
  const WeightArguments arguments{dense(stack.take<Tensor>()),
                                  dense(stack.take<std::optional<Tensor>>()),
                                  dense(stack.take<std::optional<Tensor>>()),
                                  stack.take<int64_t>(),
                                  stack.take<double>(),
                                  stack.take<bool>(),
                                  stack.take<double>(),
                                  stack.take<std::optional<Tensor>>(),
                                  stack.take<bool>()};
  check_weights(arguments);
  stack.put(kRun(arguments));
}

template <MixtureGradients (*kRun)(const torch::stable::Tensor& dlogits,
                                   const torch::stable::Tensor& marks,
                                   const torch::stable::Tensor& dx, const torch::stable::Tensor& x,
                                   const torch::stable::Tensor& grad)>
void boxed_losses_backward(StableIValue* values, uint64_t num_arguments, uint64_t) {
  using torch::stable::Tensor;
  Stack stack(values, num_arguments, 5);
  const Tensor dlogits = stack.take<Tensor>(), marks = stack.take<Tensor>();
  const Tensor dx = stack.take<Tensor>(), x = stack.take<Tensor>();
  stack.put(kRun(dlogits, marks, dx, x, stack.take<Tensor>()));
}

template <LogProbOutputs (*kRun)(const MixtureInputs&, int64_t memory_budget, double softcap)>
void boxed_log_prob(StableIValue* values, uint64_t num_arguments, uint64_t) {
  Stack stack(values, num_arguments, 6);
  const MixtureInputs inputs = stack.take_inputs();
  const int64_t memory_budget = stack.take<int64_t>();
  stack.put(kRun(inputs, memory_budget, stack.take<double>()));
}

template <MixtureGradients (*kRun)(const LogProbGradient&)>
void boxed_log_prob_backward(StableIValue* values, uint64_t num_arguments, uint64_t) {
  using torch::stable::Tensor;
  Stack stack(values, num_arguments, 11);
  stack.put(
      kRun({stack.take<Tensor>(), stack.take_inputs(), stack.take<Tensor>(), stack.take<Tensor>(),
            stack.take<bool>(), stack.take<bool>(), stack.take<int64_t>(), stack.take<double>()}));
}

}  // namespace alrao
