// What follows the product that makes a clone's term of the features' gradient: the term is taken
// into the sum over clones, and the bias gets the column sums of the gradient to the logits.
#include "mixture/cuda/rows.cuh"

namespace alrao::cuda {
namespace {

constexpr int kCombineColumns = 2048;

template <class scalar_t>
__global__ void __launch_bounds__(kColumnThreads)
    mixture_combine_kernel(const __grid_constant__ CombineArguments<scalar_t> a, int64_t row_blocks,
                           int64_t blocks_per_row) {
  using compute_type = compute_t<scalar_t>;
  __shared__ compute_type scratch[kColumnThreads / kWarp * kTileColumns<scalar_t>];
  const int64_t block = blockIdx.x;
  if (block >= row_blocks) {
    const int64_t tile = block - row_blocks;
    const compute_type sum = sum_columns(a.columns, tile, scratch);
    const int64_t column = tile * kTileColumns<scalar_t> + threadIdx.x;
    if (threadIdx.x < kTileColumns<scalar_t> && column < a.columns.columns) {
      a.columns.out[column] = a.columns.add ? a.columns.out[column] + sum : sum;
    }
    return;
  }
  constexpr int kCount = 16 / sizeof(compute_type);
  const int64_t local = block / blocks_per_row, sample = a.first + local;
  const compute_type keep = a.is_first ? compute_type(0) : a.state.keep[sample];
  const compute_type take = a.state.take[sample];
  compute_type factor = 1;
  if (a.is_last) {
    const compute_type sum = a.state.sum[sample];
    factor = (a.norm == nullptr ? compute_type(1) : *a.norm) / (sum > 0 ? sum : compute_type(1));
  }
  const compute_type* term = a.term + local * a.features;
  compute_type* total = a.total + sample * a.features;
  const bool aligned =
      is_aligned<compute_type, kCount>(term) && is_aligned<compute_type, kCount>(total);
  const int64_t begin = (block % blocks_per_row) * kCombineColumns;
  const int64_t end = begin + kCombineColumns < a.features ? begin + kCombineColumns : a.features;
  for (int64_t i = begin + threadIdx.x * kCount; i < end; i += blockDim.x * kCount) {
    compute_type added[kCount] = {}, value[kCount] = {};
    // Left out, not multiplied by 0: the term of a dead clone may be NaN.
    if (take > 0) load_some<kCount>(term, i, end, aligned, added);
    if (!a.is_first) load_some<kCount>(total, i, end, aligned, value);
    Pack<compute_type, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      pack.values[j] = (keep * value[j] + take * added[j]) * factor;
    }
    store_some(total, i, end, aligned, pack);
  }
}

}  // namespace

template <class scalar_t>
cudaError_t launch_mixture_combine(const CombineArguments<scalar_t>& a, cudaStream_t stream) {
  const int64_t blocks_per_row = ceil_div(a.features, kCombineColumns);
  const int64_t row_blocks = a.term == nullptr ? 0 : a.chunk * blocks_per_row;
  const int64_t blocks = row_blocks + column_blocks(a.columns);
  if (blocks == 0) return cudaSuccess;
  return launch(mixture_combine_kernel<scalar_t>, grid_of(blocks), kColumnThreads, 0, stream, a,
                row_blocks, blocks_per_row);
}

#define ALRAO_INSTANTIATE(scalar_t)                                                        \
  template cudaError_t launch_mixture_combine<scalar_t>(const CombineArguments<scalar_t>&, \
                                                        cudaStream_t)

ALRAO_FOR_EVERY_TYPE(ALRAO_INSTANTIATE);

}  // namespace alrao::cuda
