#include "common/cuda/gemm.h"

#include <array>

namespace alrao::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;

int32_t shim_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      return aoti_torch_dtype_float16();
  }
}

}  // namespace

Gemm::Gemm(const Tensor& tensor) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type_));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index_));
}

Tensor Gemm::empty(std::initializer_list<int64_t> sizes, ScalarType type) const {
  std::array<int64_t, 3> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides.data(), shim_type(type), device_type_,
                                                  device_index_, &handle));
  return Tensor(handle);
}

Tensor Gemm::tensor(void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                    ScalarType type) const {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      data, 2, sizes, strides, 0, shim_type(type), device_type_, device_index_, &handle));
  return Tensor(handle);
}

void Gemm::multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (add) {
    // addmm takes numbers, which the stable ABI of torch 2.11 cannot pass: by way of an op of ours.
    std::array<StableIValue, 3> stack{from(out), from(a), from(b)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("alrao_fast::switch_mixture_add_product_", "",
                                                 stack.data(), TORCH_ABI_VERSION));
  } else if (a.scalar_type() == out.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

}  // namespace alrao::cuda
