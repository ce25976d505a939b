#include "gradient/checks.h"

#include <torch/headeronly/core/ScalarType.h>

#include "common/checks.h"

namespace alrao {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

std::string entry(size_t t) { return "grads[" + std::to_string(t) + "]"; }

Dtype dtype_of(const Tensor& grad, size_t t) {
  switch (grad.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      refuse(entry(t), ": got dtype ", torch::headeronly::toString(grad.scalar_type()),
             ", expected one of Float, Double, BFloat16, Half");
  }
}

void check_length(const char* name, size_t got, size_t expected) {
  ALRAO_CHECK(got == expected, name, ": got ", got, " entries, expected ", expected,
              ", one for each of grads");
}

}  // namespace

std::vector<GradientRow> check_gradients(const std::vector<Tensor>& grads,
                                         const std::vector<int64_t>& firsts,
                                         const std::vector<int64_t>& counts, int64_t segments) {
  check_length("firsts", firsts.size(), grads.size());
  check_length("counts", counts.size(), grads.size());
  std::vector<GradientRow> rows;
  rows.reserve(grads.size());
  // Of each segment the span that it is in, as first * segments + count.
  std::vector<int64_t> spans(segments, -1);
  for (size_t t = 0; t < grads.size(); ++t) {
    const Tensor& grad = grads[t];
    const int64_t first = firsts[t], count = counts[t], numel = grad.numel();
    const Dtype dtype = dtype_of(grad, t);
    if (t > 0) check_same_device(entry(t).c_str(), grad, "grads[0]", grads[0]);
    ALRAO_CHECK(grad.is_contiguous() || (count == 1 && is_dense(grad.sizes().data(),
                                                                grad.strides().data(), grad.dim())),
                entry(t), ": got gaps or an overlap, expected a dense tensor");
    ALRAO_CHECK(first >= 0 && count >= 1 && first + count <= segments, entry(t),
                ": got the segments ", first, " to ", first + count - 1, ", expected some of 0 to ",
                segments - 1);
    ALRAO_CHECK(count == 1 || (grad.dim() > 0 && grad.size(0) == count), entry(t), ": got shape ",
                shape_of(grad), " for ", count, " segments, expected one for each index of dim 0");
    for (int64_t segment = first; segment < first + count; ++segment) {
      const int64_t span = first * segments + count;
      ALRAO_CHECK(spans[segment] == -1 || spans[segment] == span, entry(t),
                  ": shares only some of its segments with another, expected all or none");
      spans[segment] = span;
    }
    if (numel > 0) rows.push_back({grad.mutable_data_ptr(), numel / count, first, count, dtype});
  }
  return rows;
}

void check_norms(const Tensor& norms, const std::vector<Tensor>& grads) {
  ALRAO_CHECK(norms.dim() == 1, "norms: got shape ", shape_of(norms), ", expected [segments]");
  check_dtype("norms", norms, {ScalarType::Double});
  check_contiguous("norms", norms);
  if (!grads.empty()) check_same_device("norms", norms, "grads[0]", grads[0]);
}

}  // namespace alrao
