// Matrix products through torch, and memory from its allocator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "common/element.h"
#include "common/matrix.h"

namespace alrao::cuda {

template <class T>
constexpr torch::headeronly::ScalarType scalar_type_of() {
  using torch::headeronly::ScalarType;
  using Value = std::remove_const_t<T>;
  return std::is_same_v<Value, double>     ? ScalarType::Double
         : std::is_same_v<Value, float>    ? ScalarType::Float
         : std::is_same_v<Value, int64_t>  ? ScalarType::Long
         : std::is_same_v<Value, BFloat16> ? ScalarType::BFloat16
                                           : ScalarType::Half;
}

template <class T>
T* data_of(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Of a fixed device: matrices at raw pointers, products of them, fresh memory.
class Gemm {
 public:
  // The device of `tensor`.
  explicit Gemm(const torch::stable::Tensor& tensor);

  template <class T>
  torch::stable::Tensor empty(std::initializer_list<int64_t> sizes) const {
    return empty(sizes, scalar_type_of<T>());
  }

  // out = a b, or out += a b; summed, and for narrower factors returned, in the type of `out`.
  template <class Out, class T>
  void multiply(const Matrix<Out>& out, const Matrix<const T>& a, const Matrix<const T>& b,
                bool add) const {
    if (out.rows == 0 || out.cols == 0) return;
    multiply(tensor(out), tensor(a), tensor(b), add);
  }

  // out = from, rounded to the type of `out`.
  template <class Out, class From>
  void round(const Matrix<Out>& out, const Matrix<From>& from) const {
    auto to = tensor(out);
    torch::stable::copy_(to, tensor(from));
  }

 private:
  torch::stable::Tensor empty(std::initializer_list<int64_t> sizes,
                              torch::headeronly::ScalarType type) const;
  static void multiply(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                       const torch::stable::Tensor& b, bool add);
  torch::stable::Tensor tensor(void* data, int64_t rows, int64_t cols, int64_t row_stride,
                               int64_t col_stride, torch::headeronly::ScalarType type) const;

  template <class T>
  torch::stable::Tensor tensor(const Matrix<T>& m) const {
    return tensor(const_cast<std::remove_const_t<T>*>(m.data), m.rows, m.cols, m.row_stride,
                  m.col_stride, scalar_type_of<T>());
  }

  int32_t device_type_, device_index_;
};

}  // namespace alrao::cuda
