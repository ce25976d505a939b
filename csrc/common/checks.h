// Argument checks of the ops. Each names the argument, what it got and what it expects.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace alrao {

// Throws the message that the parts make.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  throw std::runtime_error(out.str());
}

// For errors that the user can mend: the same words as Python's checks, without the function, file
// and line that STD_TORCH_CHECK puts before them. The parts are evaluated where it fails.
#define ALRAO_CHECK(condition, ...)                 \
  do {                                              \
    if (!(condition)) ::alrao::refuse(__VA_ARGS__); \
  } while (false)

// Whether a tensor of these sizes and strides has neither gaps nor entries that share memory.
bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim);

std::string shape_of(const torch::stable::Tensor& tensor);

void check_shape(const char* name, const torch::stable::Tensor& tensor,
                 std::initializer_list<int64_t> expected);

void check_dtype(const char* name, const torch::stable::Tensor& tensor,
                 std::initializer_list<torch::headeronly::ScalarType> expected);

void check_contiguous(const char* name, const torch::stable::Tensor& tensor);

void check_same_device(const char* name, const torch::stable::Tensor& tensor,
                       const char* other_name, const torch::stable::Tensor& other);

void check_same_dtype(const char* name, const torch::stable::Tensor& tensor, const char* other_name,
                      const torch::stable::Tensor& other);

}  // namespace alrao
