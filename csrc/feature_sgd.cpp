#include "feature_sgd.h"

#include "multi_tensor.h"

namespace alrao {
namespace {

using torch::stable::detail::to;

struct Scalars {
  double lr;
  std::optional<Tensor> lr_tensor;
  double momentum, dampening, weight_decay;
  bool nesterov, maximize, authors_momentum;
  std::optional<Tensor> grad_scale, found_inf;
};

void step(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads, const Scalars& s) {
  const std::string& op = tensors.op();
  tensors.check_states(s.momentum != 0 ? 1 : 0, "momentum_buffers",
                       s.momentum != 0 ? "momentum is not 0" : "momentum is 0");
  const double lr = read_scalar(op, "lr", s.lr_tensor, s.lr);
  const double scale = read_scalar(op, "grad_scale", s.grad_scale, 1);
  const bool skip = read_scalar(op, "found_inf", s.found_inf, 0) != 0;
  tensors.bind(grads);
  if (skip) return;
  const double factor = (s.maximize ? -1 : 1) / scale;
  feature_sgd_cpu(tensors, {lr, s.momentum, s.dampening, s.weight_decay, factor, s.nesterov,
                            s.authors_momentum});
  tensors.finish();
}

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
  step(tensors, borrow(grads),
       {lr, lr_tensor, momentum, dampening, weight_decay, nesterov, maximize, authors_momentum,
        grad_scale, found_inf});
}

// Unboxed by hand: a list of stable::Tensor would allocate for every gradient. The plan's options
// are lr, momentum, dampening, weight_decay, nesterov, maximize, authors_momentum.
void feature_sgd_planned_(StableIValue* stack, uint64_t, uint64_t) {
  const auto number = to<int64_t>(stack[0]);
  const HandleList grads(stack[1]);
  auto lr = to<std::optional<Tensor>>(stack[2]);
  auto grad_scale = to<std::optional<Tensor>>(stack[3]);
  auto found_inf = to<std::optional<Tensor>>(stack[4]);
  const auto plan = find_plan(number);
  const std::lock_guard<std::mutex> lock(plan->mutex);
  const std::vector<double>& o = plan->options;
  STD_TORCH_CHECK(o.size() == 7, "the plan has ", o.size(), " options, expected 7");
  const bool current = plan->unchanged();
  if (current) {
    step(*plan, grads.handles(),
         {o[0], std::move(lr), o[1], o[2], o[3], o[4] != 0, o[5] != 0, o[6] != 0,
          std::move(grad_scale), std::move(found_inf)});
  }
  stack[0] = torch::stable::detail::from(current);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("feature_sgd_", TORCH_BOX(&feature_sgd_));
  m.impl("_feature_sgd_planned_", feature_sgd_planned_);
}

// One sparse gradient sends the call here; the checks say which one it is.
STABLE_TORCH_LIBRARY_IMPL(alrao_fast, SparseCPU, m) {
  m.impl("feature_sgd_", TORCH_BOX(&feature_sgd_));
  m.impl("_feature_sgd_planned_", feature_sgd_planned_);
}

}  // namespace alrao
