// Gradients clipped on the GPU: what a launch over many tensors takes (clip.cu).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "gradient/math.h"

namespace alrao::cuda {

// One gradient. Chunk k of its n-th segment has the sum partials[first_partial + n *
// segment_partials + own_partial + k]; all those of a segment stand side by side.
struct ClipRow {
  void* data;
  int64_t inner;             // entries of a segment
  int64_t first_partial;     // of its first segment
  int32_t segment_partials;  // of each of its segments, from all gradients
  int32_t own_partial;       // where this gradient's begin among them
  int32_t segment_chunks;    // of a segment of this gradient
  int32_t first_chunk;       // of the launch's
  int32_t first_segment;
  Dtype dtype;
};

struct ClipCall {
  std::vector<ClipRow> rows;  // first_chunk as if one launch took all
  int64_t num_chunks;
  int64_t chunk_entries;
  double* partials;     // [num_chunks]
  double* norms;        // [segments], written; only of segments that have entries
  const double* given;  // [segments], or null: the norms to scale by
  Norm norm;
  double max_norm;
  cudaStream_t stream;
};

// The norms, unless they are given, and then the gradients: a launch each for every kMaxClipRows.
constexpr int kFewClipRows = 72, kMaxClipRows = 640;

cudaError_t launch_gradient_clip(const ClipCall& call);

}  // namespace alrao::cuda
