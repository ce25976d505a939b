// Argument checks of the ops. Each names the argument, what it got and what it expects.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace alrao {

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
