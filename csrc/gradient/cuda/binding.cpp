#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "common/cuda/on_device.h"
#include "gradient/checks.h"
#include "gradient/cuda/clip.h"

namespace alrao::cuda {
namespace {

using torch::stable::Tensor;

// So many chunks in all, or as many as there are of the least size.
constexpr int64_t kChunks = 1024, kLeastChunk = 4096;

Tensor empty_doubles(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, torch::headeronly::ScalarType::Double);
}

// Where every row's chunks and their sums stand.
ClipCall lay_out(const std::vector<GradientRow>& rows, int64_t segments) {
  ClipCall call{};
  int64_t entries = 0;
  for (const GradientRow& row : rows) entries += row.inner * row.count;
  const int64_t share = ceil_div(entries, kChunks);
  call.chunk_entries = std::max<int64_t>(ceil_div(share, kLeastChunk), 1) * kLeastChunk;
  std::vector<int32_t> filled(segments, 0);
  for (const GradientRow& row : rows) {
    const auto chunks = static_cast<int32_t>(ceil_div(row.inner, call.chunk_entries));
    call.rows.push_back({row.data, row.inner, 0, 0, filled[row.first], chunks,
                         static_cast<int32_t>(call.num_chunks), static_cast<int32_t>(row.first),
                         row.dtype});
    call.num_chunks += row.count * chunks;
    for (int64_t n = 0; n < row.count; ++n) filled[row.first + n] += chunks;
  }
  std::vector<int64_t> begins(segments, 0);
  for (int64_t n = 1; n < segments; ++n) begins[n] = begins[n - 1] + filled[n - 1];
  for (ClipRow& row : call.rows) {
    row.first_partial = begins[row.first_segment];
    row.segment_partials = filled[row.first_segment];
  }
  return call;
}

Tensor gradient_clip(const std::vector<Tensor>& grads, const std::vector<int64_t>& firsts,
                     const std::vector<int64_t>& counts, int64_t segments, double norm_type,
                     double max_norm) {
  const auto rows = check_gradients(grads, firsts, counts, segments);
  const OnDevice on(grads[0]);
  ClipCall call = lay_out(rows, segments);
  Tensor norms = empty_doubles(grads[0], segments);
  // A segment without entries has no block that writes its norm.
  std::vector<bool> present(segments, false);
  for (const GradientRow& row : rows) std::fill_n(present.begin() + row.first, row.count, true);
  if (std::find(present.begin(), present.end(), false) != present.end())
    torch::stable::zero_(norms);
  const Tensor partials = empty_doubles(grads[0], call.num_chunks);
  call.partials = static_cast<double*>(partials.mutable_data_ptr());
  call.norms = static_cast<double*>(norms.mutable_data_ptr());
  call.norm = norm_of_order(norm_type);
  call.max_norm = max_norm;
  call.stream = on.stream;
  check_launch("gradient_clip", launch_gradient_clip(call));
  return norms;
}

void gradient_clip_by(const std::vector<Tensor>& grads, const std::vector<int64_t>& firsts,
                      const std::vector<int64_t>& counts, const Tensor& norms, double max_norm) {
  check_norms(norms, grads);
  const auto rows = check_gradients(grads, firsts, counts, norms.size(0));
  const OnDevice on(grads[0]);
  ClipCall call = lay_out(rows, norms.size(0));
  call.given = static_cast<const double*>(norms.const_data_ptr());
  call.max_norm = max_norm;
  call.stream = on.stream;
  check_launch("gradient_clip_by", launch_gradient_clip(call));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) {
  m.impl("gradient_clip_", TORCH_BOX(&gradient_clip));
  m.impl("gradient_clip_by_", TORCH_BOX(&gradient_clip_by));
}

}  // namespace alrao::cuda
