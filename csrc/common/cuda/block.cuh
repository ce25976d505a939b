// Reductions over a warp and over a block, in a fixed order: the same values give the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/cuda/runtime.cuh"

namespace alrao::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Of a number and a NaN, the number.
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

struct Min {
  __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};

// The value of the lane whose number differs in the bits of `lane_mask`; T may be a struct, such as
// a maximum with its sum.
template <typename T>
__device__ T shuffle_xor(T value, int lane_mask) {
  if constexpr (std::is_arithmetic_v<T>) {
    return __shfl_xor_sync(kWholeWarp, value, lane_mask);
  } else {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(uint32_t) == 0);
    constexpr int kWords = sizeof(T) / sizeof(uint32_t);
    uint32_t words[kWords];
    std::memcpy(words, &value, sizeof value);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kWholeWarp, words[i], lane_mask);
    std::memcpy(&value, words, sizeof value);
    return value;
  }
}

// The reduction over a whole warp, handed to every lane. `op` commutes, so that all lanes get the
// same bits.
template <typename T, typename Op>
__device__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = op(value, shuffle_xor(value, offset));
  return value;
}

// The reduction over a one-dimensional block of whole warps, handed to every thread; a barrier,
// too. `scratch`, in shared memory, has a place for every warp and is free again afterwards.
template <typename T, typename Op>
__device__ T block_reduce(T value, Op op, std::common_type_t<T> identity,
                          std::common_type_t<T>* scratch) {
  value = warp_reduce(value, op);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) {
    __syncwarp();
    return value;
  }
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T result = identity;
  for (int warp = 0; warp < warps; ++warp) result = op(result, scratch[warp]);
  // The next reduction writes into scratch.
  __syncthreads();
  return result;
}

}  // namespace alrao::cuda
