// The factor that a backward brings, for the gradients that the loss left: one launch, which ends
// at once where it is 1.
//
// Floor: nothing for `loss.backward()`; else 2 times the gradients' bytes.
#include "mixture/cuda/rows.cuh"

namespace alrao::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ void scale(const ScaledArray<T>& array, compute_t<T> factor) {
  constexpr int kCount = 16 / sizeof(T);
  const bool aligned = is_aligned<T, kCount>(array.values);
  const int64_t step = int64_t(gridDim.x) * kThreads * kCount;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kCount; i < array.size;
       i += step) {
    compute_t<T> value[kCount];
    load_some<kCount>(array.values, i, array.size, aligned, value);
    Pack<T, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) round_to(value[j] * factor, pack.values[j]);
    store_some(array.values, i, array.size, aligned, pack);
  }
}

template <class weight_t>
__global__ void __launch_bounds__(kThreads) mixture_scale_kernel(ScaleArguments<weight_t> a) {
  const auto factor = *a.factor;
  if (factor == 1) return;
  scale(a.dx, factor);
  scale(a.dweight, factor);
  scale(a.dbias, factor);
}

}  // namespace

template <class weight_t>
cudaError_t launch_mixture_scale(const ScaleArguments<weight_t>& a, cudaStream_t stream) {
  // Eight accesses a thread, and enough blocks to fill a GPU.
  const int64_t bytes = a.dweight.size * sizeof(weight_t) + a.dx.size * sizeof(*a.factor);
  const int64_t blocks = ceil_div(bytes, int64_t(kThreads) * 16 * 8);
  return launch(mixture_scale_kernel<weight_t>,
                grid_of(blocks < 1      ? 1
                        : blocks < 4096 ? blocks
                                        : 4096),
                kThreads, 0, stream, a);
}

template cudaError_t launch_mixture_scale<float>(const ScaleArguments<float>&, cudaStream_t);
template cudaError_t launch_mixture_scale<double>(const ScaleArguments<double>&, cudaStream_t);
template cudaError_t launch_mixture_scale<BFloat16>(const ScaleArguments<BFloat16>&, cudaStream_t);

}  // namespace alrao::cuda
