// Matrix products on raw pointers through torch's own BLAS.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>

namespace alrao::cpu {

template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, row_stride, col_stride;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

template <class T>
Matrix<T> row_major(T* data, int64_t rows, int64_t cols, int64_t row_stride) {
  return {data, rows, cols, row_stride, 1};
}

template <class T>
torch::stable::Tensor as_tensor(const Matrix<T>& m) {
  using Value = std::remove_const_t<T>;
  static_assert(std::is_same_v<Value, float> || std::is_same_v<Value, double>);
  const int64_t sizes[] = {m.rows, m.cols}, strides[] = {m.row_stride, m.col_stride};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<Value*>(m.data), 2, sizes, strides, 0,
      std::is_same_v<Value, float> ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// out = a b, or out += a b. The CPU kernels are called below the dispatcher: about 1 us a call, and
// neither autograd nor a dispatch mode of the calling thread matters in the threads of
// parallel_for. Within parallel_for a product runs on one thread, so its result depends on its
// shape alone.
template <class T>
void gemm(const Matrix<T>& out, const Matrix<const T>& a, const Matrix<const T>& b,
          bool accumulate) {
  const auto c = as_tensor(out), left = as_tensor(a), right = as_tensor(b);
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(c.get(), c.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(c.get(), left.get(), right.get()));
  }
}

}  // namespace alrao::cpu
