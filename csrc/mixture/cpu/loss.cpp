// The CPU kernels of switch_mixture_nll and switch_mixture_gaussian_nll: checks, one floating type,
// outputs, and the choice between the two ways through the clones.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "mixture/cpu/problem.h"

namespace alrao::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Beyond this many classes one clone gives every thread enough to do.
constexpr int64_t kStreamedClasses = 2048;
constexpr int64_t kStreamedRows = 16384;

// What the two likelihoods do not share.
struct Likelihood {
  const Tensor* target;
  int64_t ignore_index;
  double sigma2;
  bool gaussian;
};

int64_t count_targets(const Tensor& target, int64_t ignore_index, int64_t classes) {
  const int64_t* y = static_cast<const int64_t*>(target.const_data_ptr());
  int64_t counted = 0;
  for (int64_t b = 0; b < target.size(0); ++b) {
    if (y[b] == ignore_index) continue;
    STD_TORCH_CHECK(y[b] >= 0 && y[b] < classes, "target: got ", y[b], " at position ", b,
                    ", expected a class from 0 to ", classes - 1, " or ignore_index ",
                    ignore_index);
    ++counted;
  }
  return counted;
}

template <class T>
Outputs run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& log_posterior, const Likelihood& likelihood, bool mean, bool need_dx,
            bool need_dw, int64_t memory_budget, const MixtureSizes& size) {
  const auto [samples, features, clones, classes] = size;
  const Tensor target =
      likelihood.gaussian ? in_type<T>(*likelihood.target) : contents(*likelihood.target);
  const int64_t counted =
      likelihood.gaussian ? samples : count_targets(target, likelihood.ignore_index, classes);

  Tensor loss = empty_tensor<T>({}), stats = empty_tensor<double>({3, clones});
  Tensor dx = need_dx ? empty_tensor<T>({samples, features}) : empty_tensor<T>({0});
  Tensor dweight = need_dw ? empty_tensor<T>({clones, classes, features}) : empty_tensor<T>({0});
  Tensor dbias = need_dw ? empty_tensor<T>({clones, classes}) : empty_tensor<T>({0});

  MixtureResult<T> out;
  out.stats = static_cast<double*>(stats.mutable_data_ptr());
  std::fill_n(out.stats, 2 * clones, 0.0);
  std::fill_n(out.stats + 2 * clones, clones, static_cast<double>(counted));
  out.dx = static_cast<T*>(dx.mutable_data_ptr());
  out.dweight = static_cast<T*>(dweight.mutable_data_ptr());
  out.dbias = static_cast<T*>(dbias.mutable_data_ptr());

  if (counted == 0) {
    std::fill_n(out.dx, dx.numel(), T(0));
    std::fill_n(out.dweight, dweight.numel(), T(0));
    std::fill_n(out.dbias, dbias.numel(), T(0));
  } else {
    Tensor inputs = in_type<T>(x);
    if (counted < samples && need_dw) {
      const int64_t* y = static_cast<const int64_t*>(target.const_data_ptr());
      inputs =
          with_finite_rows<T>(inputs, [&](int64_t b) { return y[b] == likelihood.ignore_index; });
    }
    const Tensor weights = in_type<T>(weight);
    std::optional<Tensor> offsets;
    if (bias) offsets = in_type<T>(*bias);

    MixtureProblem<T> p;
    p.size = size;
    p.x = static_cast<const T*>(inputs.const_data_ptr());
    p.weight = static_cast<const T*>(weights.const_data_ptr());
    p.bias = offsets ? static_cast<const T*>(offsets->const_data_ptr()) : nullptr;
    p.log_posterior = as_doubles(log_posterior);
    p.target = likelihood.gaussian ? nullptr : static_cast<const int64_t*>(target.const_data_ptr());
    p.ignore_index = likelihood.ignore_index;
    p.expected = likelihood.gaussian ? static_cast<const T*>(target.const_data_ptr()) : nullptr;
    p.sigma2 = likelihood.sigma2;
    p.norm = mean ? 1.0 / static_cast<double>(counted) : 1.0;
    p.need_dx = need_dx;
    p.need_dw = need_dw;
    p.memory_budget = memory_budget;
    if (classes > kStreamedClasses || clones * classes > kStreamedRows) {
      mixture_streamed(p, out);
    } else {
      mixture_joint(p, out);
    }
  }
  *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(out.loss);
  return {loss, stats, dx, dweight, dbias};
}

Outputs switch_mixture_nll(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Tensor& log_posterior, const Tensor& target, int64_t ignore_index,
                           bool mean, bool need_dx, bool need_dw, int64_t memory_budget) {
  const MixtureSizes size = check_mixture(x, weight, bias, log_posterior, memory_budget);
  check_class_target(target, x);
  const Likelihood likelihood{&target, ignore_index, 1.0, false};
  const auto function = x.scalar_type() == ScalarType::Double ? &run<double> : &run<float>;
  return function(x, weight, bias, log_posterior, likelihood, mean, need_dx, need_dw, memory_budget,
                  size);
}

Outputs switch_mixture_gaussian_nll(const Tensor& x, const Tensor& weight,
                                    const std::optional<Tensor>& bias, const Tensor& log_posterior,
                                    const Tensor& target, double sigma2, bool mean, bool need_dx,
                                    bool need_dw, int64_t memory_budget) {
  const MixtureSizes size = check_mixture(x, weight, bias, log_posterior, memory_budget);
  check_gaussian_target(target, x, size.classes, sigma2);
  const Likelihood likelihood{&target, 0, sigma2, true};
  const auto function = x.scalar_type() == ScalarType::Double ? &run<double> : &run<float>;
  return function(x, weight, bias, log_posterior, likelihood, mean, need_dx, need_dw, memory_budget,
                  size);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("switch_mixture_nll", TORCH_BOX(&switch_mixture_nll));
  m.impl("switch_mixture_gaussian_nll", TORCH_BOX(&switch_mixture_gaussian_nll));
}

}  // namespace alrao::cpu
