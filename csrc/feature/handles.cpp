#include "feature/handles.h"

#include <algorithm>
#include <sstream>

namespace alrao {
namespace {

std::string text(const int64_t* values, int64_t n) {
  std::ostringstream out;
  out << '[';
  for (int64_t d = 0; d < n; ++d) out << (d ? ", " : "") << values[d];
  out << ']';
  return out.str();
}

}  // namespace

Shape shape_of(AtenTensorHandle tensor) {
  int64_t dim, *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  return {sizes, strides, dim};
}

int32_t dtype_of(AtenTensorHandle tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  return dtype;
}

void* data_of(AtenTensorHandle tensor) {
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
  return data;
}

int64_t numel_of(AtenTensorHandle tensor) {
  int64_t numel;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &numel));
  return numel;
}

bool is_strided(AtenTensorHandle tensor) {
  static const int32_t strided = aoti_torch_layout_strided();
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  return layout == strided;
}

bool same_sizes(const Shape& a, const Shape& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

bool same_layout(const Shape& a, const Shape& b) {
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.strides[d] != b.strides[d] && a.sizes[d] > 1) return false;
  return true;
}

std::string text(const Shape& shape) {
  return "shape " + text(shape.sizes, shape.dim) + " with strides " +
         text(shape.strides, shape.dim);
}

const DtypeName* find_dtype(int32_t code) {
  static const DtypeName known[] = {
      {aoti_torch_dtype_float32(), Dtype::kFloat32, "float32"},
      {aoti_torch_dtype_float64(), Dtype::kFloat64, "float64"},
      {aoti_torch_dtype_bfloat16(), Dtype::kBFloat16, "bfloat16"},
      {aoti_torch_dtype_float16(), Dtype::kFloat16, "float16"},
  };
  for (const DtypeName& entry : known)
    if (entry.code == code) return &entry;
  return nullptr;
}

std::string dtype_text(int32_t code) {
  const DtypeName* known = find_dtype(code);
  return known ? known->name : "another dtype";
}

bool is_low_precision(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16; }

HandleList::HandleList(StableIValue list) {
  const auto handle = torch::stable::detail::to<StableListHandle>(list);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(handle, &size));
  handles_.resize(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle, i, &item));
    handles_[i] = torch::stable::detail::to<AtenTensorHandle>(item);
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(handle));
}

HandleList::~HandleList() {
  for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
}

std::vector<AtenTensorHandle> borrow(const std::vector<Tensor>& tensors) {
  std::vector<AtenTensorHandle> handles;
  handles.reserve(tensors.size());
  for (const Tensor& tensor : tensors) handles.push_back(tensor.get());
  return handles;
}

void check_scalar(const std::string& op, const char* name, const Tensor& tensor) {
  const AtenTensorHandle handle = tensor.get();
  const DtypeName* dtype = find_dtype(dtype_of(handle));
  const bool readable =
      dtype && !is_low_precision(dtype->dtype) && is_strided(handle) && numel_of(handle) == 1;
  if (!readable)
    fail(op, name, " has dtype ", dtype_text(dtype_of(handle)), " and ", numel_of(handle),
         " elements, expected one float32 or float64 element on the parameters' device");
}

double read_scalar(const std::string& op, const char* name, const std::optional<Tensor>& tensor,
                   double otherwise) {
  if (!tensor) return otherwise;
  check_scalar(op, name, *tensor);
  if (!tensor->is_cpu())
    fail(op, name, " is on another device than params, expected the same device or the CPU");
  const void* data = data_of(tensor->get());
  return dtype_of(tensor->get()) == aoti_torch_dtype_float64() ? *static_cast<const double*>(data)
                                                               : *static_cast<const float*>(data);
}

}  // namespace alrao
