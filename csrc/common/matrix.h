// A matrix at a raw pointer, strides in elements.
#pragma once

#include <cstdint>

namespace alrao {

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

}  // namespace alrao
