#include "feature_adam.h"

#include "multi_tensor.h"

namespace alrao {
namespace {

using torch::stable::detail::to;

struct Scalars {
  double lr;
  std::optional<Tensor> lr_tensor;
  double beta1, beta2, eps, weight_decay;
  bool amsgrad, decoupled, maximize, authors_eps;
  std::optional<Tensor> grad_scale, found_inf;
};

void step(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads, const Scalars& s) {
  const std::string& op = tensors.op();
  tensors.check_states(s.amsgrad ? 3 : 2, "max_exp_avg_sqs",
                       s.amsgrad ? "amsgrad is set" : "amsgrad is not set");
  const double lr = read_scalar(op, "lr", s.lr_tensor, s.lr);
  const double scale = read_scalar(op, "grad_scale", s.grad_scale, 1);
  const bool skip = read_scalar(op, "found_inf", s.found_inf, 0) != 0;
  tensors.bind(grads);
  if (skip) return;
  const double factor = (s.maximize ? -1 : 1) / scale;
  feature_adam_cpu(tensors, {lr, s.beta1, s.beta2, s.eps, s.weight_decay, factor, s.amsgrad,
                             s.decoupled, s.authors_eps});
  tensors.finish();
}

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
  step(tensors, borrow(grads),
       {lr, lr_tensor, beta1, beta2, eps, weight_decay, amsgrad, decoupled, maximize, authors_eps,
        grad_scale, found_inf});
}

// Unboxed by hand: a list of stable::Tensor would allocate for every gradient. The plan's options
// are lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled, maximize, authors_eps.
void feature_adam_planned_(StableIValue* stack, uint64_t, uint64_t) {
  const auto number = to<int64_t>(stack[0]);
  const HandleList grads(stack[1]);
  auto lr = to<std::optional<Tensor>>(stack[2]);
  auto grad_scale = to<std::optional<Tensor>>(stack[3]);
  auto found_inf = to<std::optional<Tensor>>(stack[4]);
  const auto plan = find_plan(number);
  const std::lock_guard<std::mutex> lock(plan->mutex);
  const std::vector<double>& o = plan->options;
  STD_TORCH_CHECK(o.size() == 9, "the plan has ", o.size(), " options, expected 9");
  const bool current = plan->unchanged();
  if (current) {
    step(*plan, grads.handles(),
         {o[0], std::move(lr), o[1], o[2], o[3], o[4], o[5] != 0, o[6] != 0, o[7] != 0, o[8] != 0,
          std::move(grad_scale), std::move(found_inf)});
  }
  stack[0] = torch::stable::detail::from(current);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("feature_adam_", TORCH_BOX(&feature_adam_));
  m.impl("_feature_adam_planned_", feature_adam_planned_);
}

// One sparse gradient sends the call here; the checks say which one it is.
STABLE_TORCH_LIBRARY_IMPL(alrao_fast, SparseCPU, m) {
  m.impl("feature_adam_", TORCH_BOX(&feature_adam_));
  m.impl("_feature_adam_planned_", feature_adam_planned_);
}

}  // namespace alrao
