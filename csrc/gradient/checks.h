// Gradients and their segments (alrao_fast/ops/gradient_clip.py), checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace alrao {

// A gradient in memory: `count` ranges of `inner` entries, those of the segments first, first + 1,
// ...
struct GradientRow {
  void* data;
  int64_t inner;
  int64_t first;
  int64_t count;
  Dtype dtype;
};

// Those of the gradients that have entries. Raises unless the arguments are those of the schema; to
// be called before anything is written.
std::vector<GradientRow> check_gradients(const std::vector<torch::stable::Tensor>& grads,
                                         const std::vector<int64_t>& firsts,
                                         const std::vector<int64_t>& counts, int64_t segments);

// Of a tensor [segments].
void check_norms(const torch::stable::Tensor& norms,
                 const std::vector<torch::stable::Tensor>& grads);

}  // namespace alrao
