#include "mixture/checks.h"

#include <cmath>
#include <utility>

#include "common/checks.h"

namespace alrao {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

MixtureSizes check_mixture(const MixtureInputs& inputs, int64_t memory_budget) {
  const auto& [x, weight, bias, log_posterior] = inputs;
  ALRAO_CHECK(weight.dim() == 3 && weight.size(0) > 0 && weight.size(1) > 0, "weight: got shape ",
              shape_of(weight), ", expected [N, C, D] with N >= 1 and C >= 1");
  check_dtype("weight", weight,
              {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
  const MixtureSizes sizes{x.dim() > 0 ? x.size(0) : 0, weight.size(2), weight.size(0),
                           weight.size(1)};
  ALRAO_CHECK(x.dim() == 2 && x.size(1) == sizes.features, "x: got shape ", shape_of(x),
              ", expected [B, ", sizes.features, "], D being that of weight ", shape_of(weight));
  check_same_dtype("x", x, "weight", weight);
  check_same_device("x", x, "weight", weight);
  if (bias) {
    check_shape("bias", *bias, {sizes.clones, sizes.classes});
    check_same_dtype("bias", *bias, "weight", weight);
    check_same_device("bias", *bias, "weight", weight);
  }
  check_shape("log_posterior", log_posterior, {sizes.clones});
  check_dtype("log_posterior", log_posterior, {ScalarType::Float, ScalarType::Double});
  check_same_device("log_posterior", log_posterior, "weight", weight);
  ALRAO_CHECK(memory_budget > 0, "memory_budget: got ", memory_budget,
              ", expected a positive number of bytes");
  return sizes;
}

namespace {

void check_num_items(const Tensor& items, ScalarType wide, const Tensor& other) {
  ALRAO_CHECK(items.numel() == 1, "num_items: got shape ", shape_of(items),
              ", expected one number");
  check_dtype("num_items", items, {wide, ScalarType::Long});
  check_same_device("num_items", items, "the others", other);
}

void check_extras(const LossArguments& arguments, const MixtureSizes& sizes, ScalarType wide) {
  const Tensor& x = arguments.inputs.x;
  const LossExtras& extras = arguments.extras;
  const auto check_vector = [&](const char* name, const std::optional<Tensor>& tensor,
                                int64_t size) {
    if (!tensor) return;
    check_shape(name, *tensor, {size});
    check_dtype(name, *tensor, {wide});
    check_same_device(name, *tensor, "x", x);
  };
  check_vector("class_weight", extras.class_weight, sizes.classes);
  check_vector("row_weight", extras.row_weight, sizes.samples);
  ALRAO_CHECK(extras.label_smoothing >= 0 && extras.label_smoothing <= 1, "label_smoothing: got ",
              extras.label_smoothing, ", expected a number from 0 to 1");
  ALRAO_CHECK(extras.z_loss >= 0 && std::isfinite(extras.z_loss), "z_loss: got ", extras.z_loss,
              ", expected a finite number >= 0");
  check_softcap(extras.softcap);
  const LossOptions& options = arguments.options;
  const bool weighed = extras.row_weight && !extras.make_factors;
  ALRAO_CHECK(!options.mean || !(weighed || extras.per_sample),
              "mean: got True, expected False with row_weight or per_sample");
  ALRAO_CHECK(extras.divisor > 0, "divisor: got ", extras.divisor, ", expected a number > 0");
  if (extras.num_items) check_num_items(*extras.num_items, wide, x);
  ALRAO_CHECK(!extras.divides() || !(options.mean || weighed || extras.per_sample),
              "divisor: got one, expected none with mean, row_weight or per_sample");
  const bool has_weights = extras.row_weight || extras.class_weight || is_soft(arguments.target);
  ALRAO_CHECK(!extras.make_factors || (has_weights && !extras.per_sample && !extras.likeliest),
              "make_factors: got True, expected False without weights or probabilities, with "
              "per_sample and with likeliest");
  if (extras.likeliest) {
    ALRAO_CHECK(is_soft(arguments.target) && !arguments.likelihood.gaussian,
                "likeliest: got classes, expected None without probabilities");
    check_shape("likeliest", *extras.likeliest, {sizes.samples});
    check_dtype("likeliest", *extras.likeliest, {ScalarType::Long});
    check_same_device("likeliest", *extras.likeliest, "x", x);
  }
}

}  // namespace

void check_softcap(double softcap) {
  ALRAO_CHECK(softcap >= 0 && std::isfinite(softcap), "softcap: got ", softcap,
              ", expected a finite number >= 0");
}

MixtureSizes check_loss(const LossArguments& arguments) {
  const MixtureSizes sizes = check_mixture(arguments.inputs, arguments.options.memory_budget);
  const Tensor &x = arguments.inputs.x, &target = arguments.target;
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (arguments.likelihood.gaussian) {
    check_shape("target", target, {sizes.samples, sizes.classes});
    check_same_dtype("target", target, "x", x);
  } else if (is_soft(target)) {
    check_shape("target", target, {sizes.samples, sizes.classes});
    check_dtype("target", target, {wide});
  } else {
    check_shape("target", target, {sizes.samples});
    check_dtype("target", target, {ScalarType::Long});
  }
  check_extras(arguments, sizes, wide);
  check_same_device("target", target, "x", x);
  if (arguments.likelihood.gaussian) {
    const double sigma2 = arguments.likelihood.values.sigma2;
    ALRAO_CHECK(sigma2 > 0 && std::isfinite(sigma2), "sigma2: got ", sigma2,
                ", expected a positive variance that is finite");
  }
  return sizes;
}

void check_weights(const WeightArguments& a) {
  const bool soft = a.target.scalar_type() != ScalarType::Long;
  ALRAO_CHECK(a.target.dim() == (soft ? 2 : 1), "target: got shape ", shape_of(a.target),
              ", expected classes [B], or distributions [B, C]");
  ALRAO_CHECK(soft || a.sample_weight || a.class_weight,
              "sample_weight: got None, expected weights of samples or of classes");
  const Tensor& like = a.like();
  check_dtype("weights", like, {ScalarType::Float, ScalarType::Double});
  if (a.sample_weight) {
    check_same_dtype("sample_weight", *a.sample_weight, "the others", like);
    check_shape("sample_weight", *a.sample_weight, {a.target.size(0)});
    check_same_device("sample_weight", *a.sample_weight, "target", a.target);
  }
  if (a.class_weight) {
    check_same_dtype("class_weight", *a.class_weight, "the others", like);
    ALRAO_CHECK(a.class_weight->dim() == 1 && a.class_weight->numel() > 0 &&
                    (!soft || a.class_weight->size(0) == a.target.size(1)),
                "class_weight: got shape ", shape_of(*a.class_weight), ", expected one per class");
    check_same_device("class_weight", *a.class_weight, "target", a.target);
  }
  if (a.num_items) check_num_items(*a.num_items, like.scalar_type(), a.target);
}

MixtureSizes check_log_prob_gradient(const LogProbGradient& arguments) {
  const MixtureSizes sizes = check_mixture(arguments.inputs, arguments.memory_budget);
  check_softcap(arguments.softcap);
  const Tensor& x = arguments.inputs.x;
  const bool is_double = x.scalar_type() == ScalarType::Double;
  check_shape("grad", arguments.grad, {sizes.samples, sizes.classes});
  check_shape("log_prob", arguments.log_prob, {sizes.samples, sizes.classes});
  check_shape("log_mass", arguments.log_mass, {sizes.samples});
  for (const auto& [name, tensor] :
       {std::pair{"grad", &arguments.grad}, std::pair{"log_prob", &arguments.log_prob},
        std::pair{"log_mass", &arguments.log_mass}}) {
    check_dtype(name, *tensor, {is_double ? ScalarType::Double : ScalarType::Float});
    check_same_device(name, *tensor, "x", x);
  }
  return sizes;
}

}  // namespace alrao
