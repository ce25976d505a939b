// Tensors by their handles, as the stable ABI gives them: an optimizer's step asks hundreds of them
// for little, and a Tensor object of each would cost more than the asking.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/dtype.h"

namespace alrao {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const std::string& op, const Parts&... parts) {
  refuse(op, ": ", parts...);
}

struct Shape {
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim;
};

Shape shape_of(AtenTensorHandle tensor);
int32_t dtype_of(AtenTensorHandle tensor);
void* data_of(AtenTensorHandle tensor);
int64_t numel_of(AtenTensorHandle tensor);
bool is_strided(AtenTensorHandle tensor);

bool same_sizes(const Shape& a, const Shape& b);
// The stride of a dimension of size 1 has no meaning.
bool same_layout(const Shape& a, const Shape& b);
std::string text(const Shape& shape);

struct DtypeName {
  int32_t code;
  Dtype dtype;
  const char* name;
};

// Null for a dtype that the kernels do not have.
const DtypeName* find_dtype(int32_t code);
std::string dtype_text(int32_t code);
bool is_low_precision(Dtype dtype);

// Owned handles of the tensors of a list argument.
class HandleList {
 public:
  explicit HandleList(StableIValue list);
  ~HandleList();
  HandleList(const HandleList&) = delete;
  HandleList& operator=(const HandleList&) = delete;

  const std::vector<AtenTensorHandle>& handles() const { return handles_; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

std::vector<AtenTensorHandle> borrow(const std::vector<Tensor>& tensors);

// Throws, naming it, unless `tensor` has one float32 or float64 element.
void check_scalar(const std::string& op, const char* name, const Tensor& tensor);

// The value of a one-element CPU tensor, or `otherwise` without one.
double read_scalar(const std::string& op, const char* name, const std::optional<Tensor>& tensor,
                   double otherwise);

}  // namespace alrao
