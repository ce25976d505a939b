// The arguments of the mixture's ops by name, on every backend.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "mixture/likelihood.h"

namespace alrao {

inline torch::stable::Tensor dense(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<torch::stable::Tensor> dense(
    const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? std::optional(dense(*tensor)) : std::nullopt;
}

// x [B, D], weight [N, C, D], bias [N, C], log_posterior [N].
struct MixtureInputs {
  torch::stable::Tensor x, weight;
  std::optional<torch::stable::Tensor> bias;
  torch::stable::Tensor log_posterior;
};

// The rest of the switch's state beside the log-posterior, and how it is updated.
struct SwitchObserver {
  torch::stable::Tensor logw, t, running;
  bool mean;
  double theta;
};

// Options at the end of the schemas (alrao_fast/ops/mixture/likelihood.py). row_weight [B] and
// class_weight [C] are of the type that x is computed in; likeliest [B] are the classes of the
// largest probabilities. Without row_weight a sum is divided by the divisor and by num_items, a
// tensor of one. Values have no options of classes. make_factors: with_factors() has yet to make
// them of the samples' weights, the classes' and the targets that were given.
struct LossExtras {
  std::optional<torch::stable::Tensor> row_weight, class_weight;
  double label_smoothing = 0, z_loss = 0, softcap = 0;
  bool per_sample = false;
  double divisor = 1;
  std::optional<torch::stable::Tensor> num_items, likeliest;
  bool make_factors = false;

  bool divides() const { return divisor != 1 || num_items; }

  // Whether the losses of the samples are others than without.
  bool change_losses() const {
    return class_weight || label_smoothing != 0 || z_loss != 0 || softcap != 0;
  }

  // Whether the kernels with options are taken on a GPU.
  bool any() const { return change_losses() || row_weight || per_sample; }
};

// Whether a target has the probabilities of all classes, not one class.
inline bool is_soft(const torch::stable::Tensor& target) { return target.dim() == 2; }

struct LossArguments {
  MixtureInputs inputs;
  torch::stable::Tensor target;
  Likelihood likelihood;
  LossOptions options;
  LossExtras extras;
  std::optional<SwitchObserver> observer;
};

// Of switch_mixture_weights (alrao_fast/ops/mixture/weighting.py).
struct WeightArguments {
  torch::stable::Tensor target;
  std::optional<torch::stable::Tensor> sample_weight, class_weight;
  int64_t ignore_index;
  double label_smoothing;
  bool mean;
  double divisor;
  std::optional<torch::stable::Tensor> num_items;
  bool copy;

  bool soft() const { return is_soft(target); }
  // Whether the losses themselves have weights of classes.
  bool within() const { return class_weight && (soft() || label_smoothing != 0); }
  // One that has the type of the arithmetic.
  const torch::stable::Tensor& like() const {
    return soft() ? target : sample_weight ? *sample_weight : *class_weight;
  }
};

// Targets [B, C] that sum to 1 (none of classes, nor where those given do and no copy is asked
// for), factors [B], weights [C] of mean 1 where the losses themselves have them, and the likeliest
// classes [B] of distributions.
using Weights = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
                           torch::stable::Tensor>;

// The same loss with its factors, which `weigh` makes of WeightArguments.
template <class Weigh>
LossArguments with_factors(LossArguments arguments, const Weigh& weigh) {
  LossExtras& extras = arguments.extras;
  auto [target, factors, class_weight, likeliest] = weigh(
      WeightArguments{dense(arguments.target), dense(extras.row_weight), dense(extras.class_weight),
                      arguments.likelihood.classes.ignore_index, extras.label_smoothing,
                      arguments.options.mean, extras.divisor, extras.num_items, false});
  if (is_soft(arguments.target)) {
    // Without a copy the rows sum to 1 already.
    if (target.numel() > 0) arguments.target = std::move(target);
    extras.likeliest = std::move(likeliest);
  }
  extras.row_weight = std::move(factors);
  extras.class_weight.reset();
  if (class_weight.numel() > 0) extras.class_weight = std::move(class_weight);
  extras.divisor = 1;
  extras.num_items.reset();
  extras.make_factors = arguments.options.mean = false;
  return arguments;
}

// Log-probabilities [B, C], and log_mass [B]: the logarithm of what the posterior of the clones
// alive for the sample adds up to, by which it was normalised.
using LogProbOutputs = std::tuple<torch::stable::Tensor, torch::stable::Tensor>;

// Of log_prob's backward.
struct LogProbGradient {
  torch::stable::Tensor grad;
  MixtureInputs inputs;
  torch::stable::Tensor log_prob, log_mass;
  bool need_dx, need_dw;
  int64_t memory_budget;
  double softcap;
};

// dx, dweight and dbias: empty where they are not needed.
using MixtureGradients =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

// Loss, statistics and the gradients. On a CPU losses one by one keep for their backward, in the
// place of the gradients to weight and bias, those to the logits and marks of dead clones
// (alrao_fast/ops/mixture/per_sample.py).
using MixtureOutputs =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor>;

}  // namespace alrao
