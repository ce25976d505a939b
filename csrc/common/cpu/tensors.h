// Tensors of one floating type on the CPU, made cheaply.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

namespace alrao::cpu {

template <class T>
constexpr torch::headeronly::ScalarType kScalarType = torch::headeronly::ScalarType::Float;
template <>
inline constexpr torch::headeronly::ScalarType kScalarType<double> =
    torch::headeronly::ScalarType::Double;

// Memory of many pages, fresh in every call, comes from the kernel in large ones, where that is
// allowed: one page fault for each 4 KiB takes as long as writing them.
inline void advise_large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kWorthIt = 4 << 20;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kWorthIt) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice
#else
  (void)data, (void)bytes;
#endif
}

// A third of the time of torch::stable::empty, which matters for small heads. With ALRAO_POISON
// what is read before it is written is NaN, or -1.
template <class T>
torch::stable::Tensor empty_tensor(std::initializer_list<int64_t> sizes) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> ||
                std::is_same_v<T, int64_t>);
  int64_t strides[3], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                               std::is_same_v<T, float>    ? aoti_torch_dtype_float32()
                               : std::is_same_v<T, double> ? aoti_torch_dtype_float64()
                                                           : aoti_torch_dtype_int64(),
                               aoti_torch_device_type_cpu(), 0, &handle));
  torch::stable::Tensor tensor(handle);
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(T));
  advise_large_pages(tensor.mutable_data_ptr(), bytes);
#ifdef ALRAO_POISON
  std::memset(tensor.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
#endif
  return tensor;
}

// Uninitialised memory, aligned.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : Buffer({size}) {}
  Buffer(std::initializer_list<int64_t> sizes)
      : tensor_(empty_tensor<T>(sizes)), data_(static_cast<T*>(tensor_.mutable_data_ptr())) {}
  T* data() const { return data_; }
  const torch::stable::Tensor& tensor() const { return tensor_; }
  int64_t size() const { return tensor_.numel(); }

 private:
  torch::stable::Tensor tensor_;
  T* data_;
};

}  // namespace alrao::cpu
