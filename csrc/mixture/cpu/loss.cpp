// The CPU kernels of switch_mixture_nll and switch_mixture_gaussian_nll: checks, one floating type,
// outputs, and the choice between the two ways through the clones.
#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "mixture/boxed.h"
#include "mixture/cpu/problem.h"

namespace alrao::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Beyond this many classes one clone gives every thread enough to do.
constexpr int64_t kStreamedClasses = 2048;
constexpr int64_t kStreamedRows = 16384;

// How many samples count.
template <class T>
int64_t count_samples(const MixtureProblem<T>& p) {
  int64_t counted = 0;
  for (int64_t b = 0; b < p.size.samples; ++b) {
    if (p.target && p.likelihood.classes.counts(p.target[b])) {
      ALRAO_CHECK(p.target[b] >= 0 && p.target[b] < p.size.classes, "target: got ", p.target[b],
                  " at position ", b, ", expected a class from 0 to ", p.size.classes - 1,
                  " or ignore_index ", p.likelihood.classes.ignore_index);
    }
    counted += p.counts(b);
  }
  return counted;
}

template <class T>
MixtureOutputs run(const LossArguments& a, const MixtureSizes& size) {
  const auto [samples, features, clones, classes] = size;
  const bool mean = a.options.mean;
  const bool gaussian = a.likelihood.gaussian, soft = !gaussian && is_soft(a.target);
  const Tensor target = gaussian ? in_type<T>(a.target) : dense(a.target);
  const auto optional_data = [](std::optional<Tensor>& tensor) {
    if (tensor) tensor = dense(*tensor);
    return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
  };
  LossExtras extras = a.extras;
  MixtureProblem<T> p;
  p.size = size;
  p.likelihood = a.likelihood;
  p.options = a.options;
  const void* targets = target.const_data_ptr();
  p.target = gaussian || soft ? nullptr : static_cast<const int64_t*>(targets);
  p.expected = gaussian ? static_cast<const T*>(targets) : nullptr;
  p.soft = soft ? static_cast<const T*>(targets) : nullptr;
  if (extras.likeliest) extras.likeliest = dense(*extras.likeliest);
  p.likeliest =
      extras.likeliest ? static_cast<const int64_t*>(extras.likeliest->const_data_ptr()) : nullptr;
  p.row_weight = optional_data(extras.row_weight);
  p.class_weight = optional_data(extras.class_weight);
  p.label_smoothing = extras.label_smoothing;
  p.z_loss = extras.z_loss;
  p.softcap = extras.softcap;
  // Of one class nothing is left of the gradients; the kernels with options say so to the bit.
  p.has_options = !gaussian && (soft || extras.change_losses() || classes == 1);
  if (extras.per_sample) {
    // The weights wait for the factors of the losses: switch_mixture_losses_backward.
    p.keeps_dlogits = std::exchange(p.options.need_dw, false);
  }
  const int64_t counted = count_samples(p);

  Tensor loss = extras.per_sample ? empty_tensor<T>({samples}) : empty_tensor<T>({});
  Tensor stats = empty_tensor<double>({3, clones});
  auto [dx, dweight, dbias] = empty_gradients<T>(size, p.options.need_dx, p.options.need_dw);

  MixtureResult<T> out;
  out.stats = static_cast<double*>(stats.mutable_data_ptr());
  std::fill_n(out.stats, 2 * clones, 0.0);
  std::fill_n(out.stats + 2 * clones, clones, static_cast<double>(counted));
  out.dx = static_cast<T*>(dx.mutable_data_ptr());
  out.dweight = static_cast<T*>(dweight.mutable_data_ptr());
  out.dbias = static_cast<T*>(dbias.mutable_data_ptr());

  if (extras.per_sample) {
    out.losses = static_cast<T*>(loss.mutable_data_ptr());
    std::fill_n(out.losses, samples, T(0));
  }
  std::optional<Buffer<T>> marks;
  if (extras.per_sample && p.needs_dlogits()) {
    marks.emplace({clones, samples});
    out.marks = marks->data();
    for (int64_t b = 0; b < samples; ++b) out.marks[b] = p.counts(b) ? 0 : kNotCountedMark;
    for (int64_t n = 1; n < clones; ++n) std::copy_n(out.marks, samples, out.marks + n * samples);
  }
  if (counted == 0) {
    std::fill_n(out.dx, dx.numel(), T(0));
    std::fill_n(out.dweight, dweight.numel(), T(0));
    std::fill_n(out.dbias, dbias.numel(), T(0));
    if (p.keeps_dlogits) {
      out.dlogits.emplace({int64_t{1}, clones * classes, samples});
      std::fill_n(out.dlogits->data(), out.dlogits->size(), T(0));
    }
  } else {
    p.log_posterior = as_doubles(a.inputs.log_posterior);
    const double divisor = extras.divisor * (extras.num_items ? number_in(*extras.num_items) : 1);
    p.norm = 1 / (mean ? static_cast<double>(counted) : divisor);
    Tensor x = in_type<T>(a.inputs.x);
    if (counted < samples && p.options.need_dw) {
      x = with_finite_rows<T>(x, [&](int64_t b) { return !p.counts(b); });
    }
    p.x = static_cast<const T*>(x.const_data_ptr());
    const Tensor weight = in_type<T>(a.inputs.weight);
    p.weight = static_cast<const T*>(weight.const_data_ptr());
    std::optional<Tensor> bias;
    if (a.inputs.bias) bias = in_type<T>(*a.inputs.bias);
    p.bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
    if (classes > kStreamedClasses || clones * classes > kStreamedRows) {
      mixture_streamed(p, out);
    } else {
      mixture_joint(p, out);
    }
  }
  if (!extras.per_sample) *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(out.loss);
  if (marks)
    return {loss, stats, dx, out.dlogits ? out.dlogits->tensor() : dweight, marks->tensor()};
  if (!a.inputs.bias) dbias = empty_tensor<T>({0});
  if (a.inputs.x.scalar_type() == ScalarType::BFloat16) {
    dweight = torch::stable::to(dweight, ScalarType::BFloat16);
  }
  return {loss, stats, dx, dweight, dbias};
}

MixtureOutputs loss(const LossArguments& given) {
  const MixtureSizes size = check_loss(given);
  const LossArguments arguments =
      given.extras.make_factors ? with_factors(given, &mixture_weights) : given;
  const bool is_double = arguments.inputs.x.scalar_type() == ScalarType::Double;
  return is_double ? run<double>(arguments, size) : run<float>(arguments, size);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("switch_mixture_nll", &boxed_loss<ClassesOptions, false, &loss>);
  m.impl("switch_mixture_gaussian_nll", &boxed_loss<ValuesOptions, false, &loss>);
}

}  // namespace alrao::cpu
