// The ops feature_sgd_ and _feature_sgd_planned_ on one backend: arguments and their checks.
#pragma once

#include "feature/plan.h"
#include "feature/sgd.h"

namespace alrao {

// Updates the tensors: options.grad_factor is without the loss scale, and `scalars` are not
// checked.
using SgdStep = void (*)(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads,
                         const SgdOptions& options, const ScalarTensors& scalars);

template <SgdStep STEP>
void checked_sgd_step(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads,
                      const SgdOptions& options, const ScalarTensors& scalars) {
  const bool momentum = options.momentum != 0;
  tensors.check_states(momentum ? 1 : 0, "momentum_buffers",
                       momentum ? "momentum is not 0" : "momentum is 0");
  STEP(tensors, grads, options, scalars);
}

template <SgdStep STEP>
void feature_sgd_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& momentum_buffers, const std::vector<Tensor>& masters,
                  const std::vector<Tensor>& rates, const std::vector<int64_t>& inners,
                  const std::vector<int64_t>& seeds, const Tensor& steps, double lr,
                  const std::optional<Tensor>& lr_tensor, double momentum, double dampening,
                  double weight_decay, bool nesterov, bool maximize, bool authors_momentum,
                  const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  TensorLists lists{params, {}, masters, rates, inners, seeds, steps};
  if (!momentum_buffers.empty()) lists.states.push_back(momentum_buffers);
  MultiTensor tensors("feature_sgd_", std::move(lists));
  const double sign = maximize ? -1 : 1;
  checked_sgd_step<STEP>(tensors, borrow(grads),
                         {lr, momentum, dampening, weight_decay, sign, nesterov, authors_momentum},
                         {lr_tensor, grad_scale, found_inf});
}

// The plan's options are lr, momentum, dampening, weight_decay, nesterov, maximize,
// authors_momentum.
template <SgdStep STEP>
void feature_sgd_planned_(StableIValue* stack, uint64_t, uint64_t) {
  planned_step(stack, 7,
               [](MultiTensor& plan, const std::vector<AtenTensorHandle>& grads,
                  const std::vector<double>& o, const ScalarTensors& scalars) {
                 const double sign = o[5] != 0 ? -1 : 1;
                 checked_sgd_step<STEP>(
                     plan, grads, {o[0], o[1], o[2], o[3], sign, o[4] != 0, o[6] != 0}, scalars);
               });
}

}  // namespace alrao
