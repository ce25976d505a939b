// How the arrays of many tensors are stored, and vectors of 16 bytes of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/cuda/runtime.cuh"
#include "common/element.h"
#include "feature/cuda/table.h"

namespace alrao::cuda {

// How the arrays of a launch are stored.
template <typename ParamType, Storage STORAGE, bool AVERAGE = false>
struct Layout {
  using Param = ParamType;
  // The type of the arithmetic.
  using Acc = compute_t<Param>;
  static constexpr Storage kStorage = STORAGE;
  static constexpr bool kAverage = AVERAGE;
  static constexpr bool kMixed = STORAGE == Storage::kMixed;
  static constexpr bool kLowPrecision = sizeof(Param) == 2;
  static constexpr bool kMasters = kLowPrecision && (STORAGE == Storage::kMaster || kMixed);
  static constexpr int kEntries = 16 / sizeof(Param);
  // What a vector is read as; if mixed, it is widened as it is read.
  using Value =
      std::conditional_t<STORAGE == Storage::kOwn || STORAGE == Storage::kFloat32, Param, Acc>;
  using State = std::conditional_t<STORAGE == Storage::kOwn, Param, Acc>;

  __device__ static bool has_master(const TensorRow& row) {
    return kMasters && (STORAGE == Storage::kMaster || row.master);
  }
  __device__ static bool has_average(const TensorRow& row) {
    return kAverage || (kMixed && row.average);
  }
};

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T entries[N];
};

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
  return global<T>(const_cast<void*>(pointer));
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
  for (int j = 0; j < N; ++j) round_to(from[j], stored.entries[j]);
  write<WIDE>(to, stored, n);
}

}  // namespace alrao::cuda
