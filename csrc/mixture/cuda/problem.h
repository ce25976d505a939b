// One call of a mixture op: checked, dense inputs and what both ways through the clones need.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "common/cuda/gemm.h"
#include "common/cuda/stream.h"
#include "mixture/arguments.h"
#include "mixture/cuda/kernels.h"

namespace alrao::cuda {

template <class T>
struct MixtureProblem {
  using Compute = compute_t<T>;

  MixtureProblem(const MixtureInputs& inputs, const MixtureSizes& sizes, int64_t budget,
                 cudaStream_t on_stream)
      : size(sizes),
        memory_budget(budget),
        stream(on_stream),
        gemm(inputs.x),
        x(dense(inputs.x)),
        weight(dense(inputs.weight)),
        log_posterior(dense(inputs.log_posterior)) {
    if (inputs.bias) bias = dense(*inputs.bias);
  }

  const T* x_data() const { return data_of<const T>(x); }
  const T* weight_data() const { return data_of<const T>(weight); }
  // A kernel's arguments as far as they are the same for every chunk of samples.
  template <class Arguments>
  Arguments chunk_arguments(const torch::stable::Tensor& z, bool joint) const {
    Arguments a{};
    a.size = size;
    a.ld = row_distance(joint);
    a.z = data_of<Compute>(z);
    a.bias = bias ? data_of<const T>(*bias) : nullptr;
    a.posterior = {log_posterior.const_data_ptr(),
                   log_posterior.scalar_type() == torch::headeronly::ScalarType::Double};
    return a;
  }

  // Few enough classes for all clones of a sample at once; else clone after clone.
  bool is_joint(bool with_options = false) const {
    constexpr int64_t kMostClasses = 2048;
    return size.classes <= kMostClasses && fits_joint<T>(size.clones, size.classes, with_options);
  }
  // Columns of the logits' matrix, and the distance of its rows.
  int64_t columns(bool joint) const { return joint ? size.clones * size.classes : size.classes; }
  int64_t row_distance(bool joint) const {
    return (columns(joint) + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  }
  // Samples whose logits are held at a time: chunks of a size, in tiles of the products where
  // there is room.
  int64_t chunk(int64_t bytes_per_sample) const {
    constexpr int64_t kTile = 128;
    const int64_t most =
        std::max<int64_t>(std::min(size.samples, memory_budget / bytes_per_sample), 1);
    const auto parts_of = [](int64_t all, int64_t part) { return (all + part - 1) / part; };
    const int64_t even = parts_of(size.samples, std::max<int64_t>(parts_of(size.samples, most), 1));
    return std::max<int64_t>(std::min(parts_of(even, kTile) * kTile, most), 1);
  }

  // Memory for a result, without elements unless it is needed.
  template <class R = Compute>
  torch::stable::Tensor result(bool needed, std::initializer_list<int64_t> sizes) const {
    return gemm.template empty<R>(needed ? sizes : std::initializer_list<int64_t>{0});
  }
  // With the weights' in the type W, and the bias's where it is needed.
  template <class W>
  MixtureGradients gradients(bool need_dx, bool need_dw, bool need_db) const {
    const auto& [samples, features, clones, classes] = size;
    return {result(need_dx, {samples, features}), result<W>(need_dw, {clones, classes, features}),
            result(need_db, {clones, classes})};
  }

  // Logits [rows, columns] of samples from `first` on, of clones from `clone` on.
  void logits(Compute* z, int64_t first, int64_t rows, int64_t clone, bool joint) const {
    const int64_t features = size.features;
    gemm.multiply(row_major(z, rows, columns(joint), row_distance(joint)),
                  row_major(x_data() + first * features, rows, features, features),
                  row_major(weight_data() + clone * size.classes * features, columns(joint),
                            features, features)
                      .transposed(),
                  false);
  }

  // A copy in the type To, with 0 for what is not finite.
  template <class To>
  torch::stable::Tensor finite_copy(const T* from, int64_t rows, int64_t columns) const {
    const auto copy = gemm.template empty<To>({rows, columns});
    check_launch(
        "finite_copy",
        launch_finite_copy(FiniteCopy<T, To>{from, data_of<To>(copy), rows * columns}, stream));
    return copy;
  }

  // dweight of the clones from `clone` on, g^T x, g being of the samples from `first` on: the
  // first of them begin the sum.
  template <class W, class G>
  void weight_gradient(W* dweight, int64_t clone, const Matrix<const G>& g, const G* x,
                       int64_t first) const {
    const int64_t features = size.features;
    gemm.multiply(row_major(dweight + clone * size.classes * features, g.cols, features, features),
                  g.transposed(), row_major(x + first * features, g.rows, features, features),
                  first > 0);
  }

  // g times the weights.
  template <class G>
  void features_gradient(Compute* out, const Matrix<const G>& g, const G* weights) const {
    const int64_t features = size.features;
    gemm.multiply(row_major(out, g.rows, features, features), g,
                  row_major(weights, g.cols, features, features), false);
  }

  MixtureSizes size;
  int64_t memory_budget;
  cudaStream_t stream;
  Gemm gemm;
  torch::stable::Tensor x, weight;
  std::optional<torch::stable::Tensor> bias;
  torch::stable::Tensor log_posterior;
};

// What a sum is divided by; `items` stays where it is.
inline MixtureDivisor divisor_of(double value, const std::optional<torch::stable::Tensor>& items) {
  using torch::headeronly::ScalarType;
  MixtureDivisor divisor{value, nullptr, MixtureDivisor::kInteger};
  if (!items) return divisor;
  divisor.items = items->const_data_ptr();
  const ScalarType type = items->scalar_type();
  if (type == ScalarType::Float) divisor.type = MixtureDivisor::kFloat;
  if (type == ScalarType::Double) divisor.type = MixtureDivisor::kDouble;
  return divisor;
}

// body(T()), T being the type of the inputs.
template <class Body>
auto in_type_of(const MixtureInputs& inputs, const Body& body) {
  using torch::headeronly::ScalarType;
  switch (inputs.x.scalar_type()) {
    case ScalarType::Double:
      return body(double());
    case ScalarType::Float:
      return body(float());
    case ScalarType::BFloat16:
      return body(BFloat16());
    default:
      return body(Float16());
  }
}

// Memory for MixtureState.
template <class Compute>
class StateMemory {
 public:
  StateMemory(const Gemm& gemm, int64_t samples)
      : tensor_(gemm.empty<Compute>({4, samples})), samples_(samples) {}
  MixtureState<Compute> get() const {
    Compute* p = data_of<Compute>(tensor_);
    return {p, p + samples_, p + 2 * samples_, p + 3 * samples_};
  }

 private:
  torch::stable::Tensor tensor_;
  int64_t samples_;
};

// Loss and gradients: the likelihood, and where results go.
template <class T>
struct NllProblem : MixtureProblem<T> {
  using Compute = compute_t<T>;
  using MixtureProblem<T>::MixtureProblem;

  // Whether the gradients to the logits carry the norm; among the subnormals of float16 they would
  // lose their digits.
  static constexpr bool kFoldsNorm = !std::is_same_v<T, Float16>;

  using WeightGradient = weight_gradient_t<T>;

  // Memory for a sum of weight_gradient over chunks, of `rows` of dweight, where those are too
  // narrow to be summed in.
  torch::stable::Tensor weight_sum(int64_t rows, int64_t chunk) const {
    const bool needed =
        options.need_dw && chunk < this->size.samples && !std::is_same_v<WeightGradient, Compute>;
    return this->result(needed, {rows, this->size.features});
  }

  // dweight by chunks of samples, of which the last leaves it complete.
  void add_weight_gradient(const torch::stable::Tensor& sum, int64_t clone,
                           const Matrix<const T>& g, const T* x, int64_t first) const {
    const int64_t features = this->size.features;
    if (sum.numel() == 0) {
      this->weight_gradient(dweight, clone, g, x, first);
      return;
    }
    Compute* const values = data_of<Compute>(sum);
    this->weight_gradient(values, 0, g, x, first);
    if (first + g.rows < this->size.samples) return;
    WeightGradient* const out = dweight + clone * this->size.classes * features;
    this->gemm.round(row_major(out, g.cols, features, features),
                     row_major(values, g.cols, features, features));
  }

  LossOptions options;
  MixtureTarget<T> target;
  double norm_value;              // what a sample weighs, if that does not depend on targets
  bool norm_counts;               // else: one over the number of counted samples
  const Compute* norm = nullptr;  // on the device, if a kernel wrote it there
  MixtureDivisor divisor{};       // where it is no mean
  MixtureOptions<Compute> extras{};
  Compute* dx;
  WeightGradient* dweight;
  Compute* dbias;  // or null

  MixtureNorm<T> folded_norm() const {
    if (!kFoldsNorm) return {nullptr, 1.0, false, {}};
    return {norm, norm_value, norm_counts && norm == nullptr, divisor};
  }
  const Compute* norm_left() const { return kFoldsNorm ? nullptr : norm; }
};

// What is left for the finishing kernel.
template <class T>
struct Unfinished {
  torch::stable::Tensor memory;  // of the parts
  MixtureParts parts;
  ColumnSums<T> columns{};
  torch::stable::Tensor columns_memory;
  bool scale_dx = false;
};

template <class T>
Unfinished<T> run_joint(const NllProblem<T>& p);

template <class T>
Unfinished<T> run_streamed(const NllProblem<T>& p);

// The ops: which products and kernels, in which order, in what memory. Nothing waits for the
// device. Bindings pass the stream, with the tensors' device current.
MixtureOutputs mixture_loss(const LossArguments& arguments, const SwitchObservation& observation,
                            cudaStream_t stream);

void mixture_scale(const torch::stable::Tensor& dx, const torch::stable::Tensor& dweight,
                   const torch::stable::Tensor& dbias, const torch::stable::Tensor& factor,
                   cudaStream_t stream);

LogProbOutputs mixture_log_prob(const MixtureInputs& inputs, int64_t memory_budget, double softcap,
                                cudaStream_t stream);

MixtureGradients mixture_log_prob_backward(const LogProbGradient& arguments, cudaStream_t stream);

Weights mixture_weights(const WeightArguments& arguments, cudaStream_t stream);

}  // namespace alrao::cuda
