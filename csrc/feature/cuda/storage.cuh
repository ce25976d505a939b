// How the arrays of many tensors are stored, and vectors of 16 bytes of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/cuda/runtime.cuh"
#include "common/rounding.h"
#include "feature/cuda/table.h"

namespace alrao::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// How the arrays of a launch are stored.
template <typename ParamType, Storage STORAGE>
struct Layout {
  using Param = ParamType;
  // The type of the arithmetic.
  using Acc = std::conditional_t<std::is_same_v<Param, double>, double, float>;
  static constexpr Storage kStorage = STORAGE;
  static constexpr bool kMixed = STORAGE == Storage::kMixed;
  static constexpr bool kLowPrecision = sizeof(Param) == 2;
  static constexpr int kEntries = 16 / sizeof(Param);
  // What a vector is read as; if mixed, it is widened as it is read.
  using Value =
      std::conditional_t<STORAGE == Storage::kOwn || STORAGE == Storage::kFloat32, Param, Acc>;
  using State = std::conditional_t<STORAGE == Storage::kOwn, Param, Acc>;
};

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T entries[N];
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(BFloat16 x) { return bf16_to_float(x.bits); }
__device__ inline float widen(Float16 x) { return fp16_to_float(x.bits); }

__device__ inline void narrow(float& to, float x) { to = x; }
__device__ inline void narrow(float& to, double x) { to = static_cast<float>(x); }
__device__ inline void narrow(double& to, double x) { to = x; }
__device__ inline void narrow(BFloat16& to, float x) { to.bits = float_to_bf16(x); }
__device__ inline void narrow(Float16& to, float x) { to.bits = float_to_fp16(x); }

__device__ inline void narrow_stochastic(BFloat16& to, float x, uint32_t random16) {
  to.bits = float_to_bf16_stochastic(x, random16);
}
__device__ inline void narrow_stochastic(Float16& to, float x, uint32_t random16) {
  to.bits = float_to_fp16_stochastic(x, random16);
}

// Pointers that come from memory could point anywhere for the compiler, which then emits no 16-byte
// store.
template <typename T>
__device__ T* global(void* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pointer));
#endif
  return static_cast<T*>(pointer);
}
template <typename T>
__device__ const T* global(const void* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pointer));
#endif
  return static_cast<const T*>(pointer);
}

// n entries from `from`, all N of them from one aligned address if WIDE.
template <bool WIDE, typename T, int N>
__device__ void read(Vector<T, N>& to, const T* from, int n) {
  if constexpr (WIDE) {
    to = *reinterpret_cast<const Vector<T, N>*>(from);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < n) to.entries[j] = from[j];
  }
}

template <bool WIDE, typename T, int N>
__device__ void write(T* to, const Vector<T, N>& from, int n) {
  if constexpr (WIDE) {
    *reinterpret_cast<Vector<T, N>*>(to) = from;
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < n) to[j] = from.entries[j];
  }
}

template <bool WIDE, typename Stored, typename T, int N>
__device__ void read_widened(Vector<T, N>& to, const Stored* from, int n) {
  Vector<Stored, N> stored{};
  read<WIDE>(stored, from, n);
#pragma unroll
  for (int j = 0; j < N; ++j) to.entries[j] = widen(stored.entries[j]);
}

template <bool WIDE, typename Stored, typename T, int N>
__device__ void write_narrowed(Stored* to, const T (&from)[N], int n) {
  Vector<Stored, N> stored;
#pragma unroll
  for (int j = 0; j < N; ++j) narrow(stored.entries[j], from[j]);
  write<WIDE>(to, stored, n);
}

}  // namespace alrao::cuda
