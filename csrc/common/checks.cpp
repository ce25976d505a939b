#include "common/checks.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace alrao {
namespace {

template <class Sizes>
std::string in_brackets(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

}  // namespace

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

std::string shape_of(const Tensor& tensor) { return in_brackets(tensor.sizes()); }

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t dim = 0;
  for (int64_t size : expected) {
    if (!same) break;
    same = tensor.size(dim++) == size;
  }
  ALRAO_CHECK(same, name, ": got shape ", shape_of(tensor), ", expected ", in_brackets(expected));
}

void check_dtype(const char* name, const Tensor& tensor,
                 std::initializer_list<ScalarType> expected) {
  const ScalarType got = tensor.scalar_type();
  std::string names;
  for (ScalarType dtype : expected) {
    if (got == dtype) return;
    names += (names.empty() ? "" : ", ") + std::string(torch::headeronly::toString(dtype));
  }
  ALRAO_CHECK(false, name, ": got dtype ", torch::headeronly::toString(got), ", expected ",
              expected.size() > 1 ? "one of " : "", names);
}

void check_contiguous(const char* name, const Tensor& tensor) {
  ALRAO_CHECK(tensor.is_contiguous(), name, ": got strides ", in_brackets(tensor.strides()),
              " for shape ", shape_of(tensor), ", expected a contiguous tensor");
}

void check_same_device(const char* name, const Tensor& tensor, const char* other_name,
                       const Tensor& other) {
  const auto got = tensor.device(), expected = other.device();
  ALRAO_CHECK(got.type() == expected.type() && got.index() == expected.index(), name,
              ": is not on the device of ", other_name, "; move both to the same device");
}

void check_same_dtype(const char* name, const Tensor& tensor, const char* other_name,
                      const Tensor& other) {
  ALRAO_CHECK(tensor.scalar_type() == other.scalar_type(), name, ": got dtype ",
              torch::headeronly::toString(tensor.scalar_type()), ", expected ",
              torch::headeronly::toString(other.scalar_type()), ", that of ", other_name);
}

}  // namespace alrao
