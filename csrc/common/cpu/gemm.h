// Matrix products on raw pointers through torch's own BLAS.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/matrix.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace alrao::cpu {

template <class T>
torch::stable::Tensor as_tensor(const Matrix<T>& m) {
  using Value = std::remove_const_t<T>;
  static_assert(std::is_same_v<Value, float> || std::is_same_v<Value, double>);
  const int64_t sizes[] = {m.rows, m.cols}, strides[] = {m.row_stride, m.col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<Value*>(m.data), 2, sizes, strides, 0,
      std::is_same_v<Value, float> ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// While it lives, this thread takes denormal numbers for 0. A concentrated softmax is full of them,
// and each costs a hundred cycles: the head of a trained network took twice as long as a fresh one.
class FlushDenormals {
 public:
#ifdef __SSE2__
  FlushDenormals() : mode_(_mm_getcsr()) { _mm_setcsr(mode_ | 0x8040); }  // FTZ and DAZ
  ~FlushDenormals() { _mm_setcsr(mode_); }

 private:
  unsigned mode_;
#else
  FlushDenormals() = default;
#endif
  FlushDenormals(const FlushDenormals&) = delete;
};

// Runs body(0) ... body(count - 1) over the threads. At least two threads take part, so that every
// product of matrices in a task is one thread's.
template <class Body>
void run_tasks(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t i, int64_t end) {
    const FlushDenormals flush;
    for (; i < std::min(end, count); ++i) body(i);
  });
}

// Into how many tasks, at most `limit`, a product is cut.
inline int64_t task_count(double flops, int64_t limit) {
  // A task smaller than this costs more to hand out than it saves.
  constexpr double kTaskFlops = 4e6;
  return std::clamp<int64_t>(static_cast<int64_t>(flops / kTaskFlops), 1,
                             std::max<int64_t>(limit, 1));
}

// out = a b, or out += a b; to be called within run_tasks. The CPU kernels are called below the
// dispatcher: about 1 us a call, and neither autograd nor a dispatch mode of the calling thread
// matters in the other threads.
//
// On one thread the result depends on the shapes alone, but for one thing: MKL cuts a long inner
// dimension differently in a parallel region than outside (seen from 320 on). So it is cut here.
template <class T>
void gemm(const Matrix<T>& out, const Matrix<const T>& a, const Matrix<const T>& b,
          bool accumulate) {
  constexpr int64_t kMaxInner = 256;
  const int64_t inner = a.cols;
  const int64_t slices = std::max<int64_t>((inner + kMaxInner - 1) / kMaxInner, 1);
  const int64_t size = (inner + slices - 1) / slices;
  const auto c = as_tensor(out);
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t begin = slice * size, length = std::min(size, inner - begin);
    const auto left = as_tensor(
        Matrix<const T>{a.data + begin * a.col_stride, a.rows, length, a.row_stride, a.col_stride});
    const auto right = as_tensor(
        Matrix<const T>{b.data + begin * b.row_stride, length, b.cols, b.row_stride, b.col_stride});
    if (accumulate || slice > 0) {
      TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(c.get(), c.get(), left.get(), right.get(), 1.0, 1.0));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(c.get(), left.get(), right.get()));
    }
  }
}

}  // namespace alrao::cpu
