// The backward of the loss: its gradients times a factor on the device, in place.
#include "common/checks.h"
#include "mixture/cuda/problem.h"

namespace alrao::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class weight_t>
void run(const Tensor& dx, const Tensor& dweight, const Tensor& dbias, const Tensor& factor,
         cudaStream_t stream) {
  using Compute = compute_t<weight_t>;
  const ScaleArguments<weight_t> a{{data_of<Compute>(dx), dx.numel()},
                                   {data_of<weight_t>(dweight), dweight.numel()},
                                   {data_of<Compute>(dbias), dbias.numel()},
                                   data_of<const Compute>(factor)};
  check_launch("mixture_scale", launch_mixture_scale(a, stream));
}

}  // namespace

void mixture_scale(const Tensor& dx, const Tensor& dweight, const Tensor& dbias,
                   const Tensor& factor, cudaStream_t stream) {
  const ScalarType wide = dx.scalar_type();
  check_dtype("dx", dx, {ScalarType::Float, ScalarType::Double});
  for (const auto& [name, tensor] : {std::pair{"dbias", &dbias}, std::pair{"factor", &factor}}) {
    check_dtype(name, *tensor, {wide});
    check_same_device(name, *tensor, "dx", dx);
  }
  check_dtype("dweight", dweight, {wide, ScalarType::BFloat16});
  check_same_device("dweight", dweight, "dx", dx);
  check_shape("factor", factor, {});
  for (const auto& [name, tensor] :
       {std::pair{"dx", &dx}, std::pair{"dweight", &dweight}, std::pair{"dbias", &dbias}}) {
    check_contiguous(name, *tensor);
  }
  if (dweight.scalar_type() == ScalarType::BFloat16) {
    ALRAO_CHECK(wide == ScalarType::Float, "dx: got float64, expected float32 beside bfloat16");
    run<BFloat16>(dx, dweight, dbias, factor, stream);
  } else if (wide == ScalarType::Double) {
    run<double>(dx, dweight, dbias, factor, stream);
  } else {
    run<float>(dx, dweight, dbias, factor, stream);
  }
}

}  // namespace alrao::cuda
