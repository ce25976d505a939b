// The factors of the samples' losses on the GPU: outputs, and the kernels.
#include "mixture/cuda/problem.h"

namespace alrao::cuda {
namespace {

using torch::stable::Tensor;

template <class T>
const T* data_of_some(const std::optional<Tensor>& tensor) {
  return tensor ? data_of<const T>(*tensor) : nullptr;
}

template <class T>
Weights run(const WeightArguments& arguments, cudaStream_t stream) {
  const Gemm on(arguments.target);
  const bool soft = arguments.soft(), within = arguments.within();
  const int64_t samples = arguments.target.size(0);
  const int64_t classes = soft                     ? arguments.target.size(1)
                          : arguments.class_weight ? arguments.class_weight->size(0)
                                                   : 0;
  const auto target = soft ? on.empty<T>({samples, classes}) : on.empty<T>({0});
  const auto factors = on.empty<T>({samples});
  const auto scaled = on.empty<T>({within ? classes : 0});
  const auto likeliest = on.empty<int64_t>({soft ? samples : 0});

  WeightsArguments<T> a{};
  a.samples = samples;
  a.classes = classes;
  a.target = {soft ? nullptr : data_of<const int64_t>(arguments.target), {arguments.ignore_index}};
  a.given = soft ? data_of<const T>(arguments.target) : nullptr;
  a.sample_weight = data_of_some<T>(arguments.sample_weight);
  a.class_weight = data_of_some<T>(arguments.class_weight);
  a.smoothing = arguments.label_smoothing;
  a.mean = arguments.mean;
  a.divisor = divisor_of(arguments.mean ? 1.0 : arguments.divisor, arguments.num_items);
  a.out = data_of<T>(target);
  a.factors = data_of<T>(factors);
  a.scaled = within ? data_of<T>(scaled) : nullptr;
  a.likeliest = data_of<int64_t>(likeliest);
  const bool has_totals = weights_totals(a);
  const auto totals = on.empty<double>({has_totals ? 2 : 0});
  a.totals = has_totals ? data_of<double>(totals) : nullptr;
  check_launch("mixture_weights", launch_weights(a, stream));
  return {target, factors, scaled, likeliest};
}

}  // namespace

Weights mixture_weights(const WeightArguments& arguments, cudaStream_t stream) {
  return arguments.like().scalar_type() == torch::headeronly::ScalarType::Double
             ? run<double>(arguments, stream)
             : run<float>(arguments, stream);
}

}  // namespace alrao::cuda
