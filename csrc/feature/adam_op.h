// The ops feature_adam_ and _feature_adam_planned_ on one backend: arguments and their checks.
#pragma once

#include "feature/adam.h"
#include "feature/plan.h"

namespace alrao {

// Updates the tensors: options.grad_factor is without the loss scale, and `scalars` are not
// checked.
using AdamStep = void (*)(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads,
                          const AdamOptions& options, const ScalarTensors& scalars);

template <AdamStep STEP>
void checked_adam_step(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads,
                       const AdamOptions& options, const ScalarTensors& scalars) {
  tensors.check_states(options.amsgrad ? 3 : 2, "max_exp_avg_sqs",
                       options.amsgrad ? "amsgrad is set" : "amsgrad is not set");
  STEP(tensors, grads, options, scalars);
}

template <AdamStep STEP>
void feature_adam_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                   const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                   const std::vector<Tensor>& max_exp_avg_sqs, const std::vector<Tensor>& masters,
                   const std::vector<Tensor>& rates, const std::vector<int64_t>& inners,
                   const std::vector<int64_t>& seeds, const Tensor& steps, double lr,
                   const std::optional<Tensor>& lr_tensor, double beta1, double beta2, double eps,
                   double weight_decay, bool amsgrad, bool decoupled, bool maximize,
                   bool authors_eps, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  TensorLists lists{params, {exp_avgs, exp_avg_sqs}, masters, rates, inners, seeds, steps};
  if (!max_exp_avg_sqs.empty()) lists.states.push_back(max_exp_avg_sqs);
  MultiTensor tensors("feature_adam_", std::move(lists));
  const double sign = maximize ? -1 : 1;
  checked_adam_step<STEP>(
      tensors, borrow(grads),
      {lr, beta1, beta2, eps, weight_decay, sign, amsgrad, decoupled, authors_eps},
      {lr_tensor, grad_scale, found_inf});
}

// The plan's options are lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled, maximize,
// authors_eps.
template <AdamStep STEP>
void feature_adam_planned_(StableIValue* stack, uint64_t, uint64_t) {
  planned_step(stack, 9,
               [](MultiTensor& plan, const std::vector<AtenTensorHandle>& grads,
                  const std::vector<double>& o, const ScalarTensors& scalars) {
                 const double sign = o[7] != 0 ? -1 : 1;
                 checked_adam_step<STEP>(
                     plan, grads,
                     {o[0], o[1], o[2], o[3], o[4], sign, o[5] != 0, o[6] != 0, o[8] != 0},
                     scalars);
               });
}

}  // namespace alrao
