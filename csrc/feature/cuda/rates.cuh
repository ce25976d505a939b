// Which rates neighbouring entries of a tensor have, without a division.
#pragma once

#include <cstdint>

#include "common/cuda/runtime.cuh"
#include "feature/cuda/storage.cuh"
#include "feature/cuda/table.h"

namespace alrao::cuda {

__device__ inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// The rates of a chunk's entries.
template <typename Acc, int N>
class ChunkRates {
 public:
  __device__ ChunkRates(const TensorRow& row, const Chunk& chunk, int chunk_entries)
      : rates_(row.rates),
        feature_(chunk.feature),
        period_(row.period),
        within_(chunk.within),
        inner_(row.inner < chunk_entries ? static_cast<int>(row.inner) : kLong),
        inner_magic_(row.inner_magic),
        period_magic_(row.period < chunk_entries ? row.period_magic : 0),
        mode_(row.mode),
        is_double_(row.double_rates) {}

  // Those of entries i, ..., i + N - 1 of the chunk, i a multiple of N.
  __device__ void read(Acc (&to)[N], int i) const {
    if (mode_ == RateMode::kColumns) {
      read_columns(to, i);
    } else if (mode_ == RateMode::kEach) {
      read_each(to, i);
    } else {
      int left;
      const Acc rate = at(mode_ == RateMode::kOne ? 0 : locate(i, left));
#pragma unroll
      for (int j = 0; j < N; ++j) to[j] = rate;
    }
  }

 private:
  // Of rows at least as long as a chunk at most one ends within it.
  static constexpr int kLong = 1 << 30;

  __device__ Acc at(int64_t feature) const {
    if constexpr (sizeof(Acc) == 8)
      if (is_double_) return global<double>(rates_)[feature];
    return global<float>(rates_)[feature];
  }

  // The feature of entry i, and how many entries of its row begin there.
  __device__ int64_t locate(int i, int& left) const {
    int rows;
    if (inner_ == kLong) {
      rows = i < within_ ? 0 : 1;
      left = i < within_ ? within_ - i : kLong;
    } else {
      const int entry = within_ + i;
      rows = inner_magic_ ? static_cast<int>(multiply_high(entry, inner_magic_)) : entry;
      left = (rows + 1) * inner_ - entry;
    }
    if (period_magic_) {
      const int feature = static_cast<int>(feature_) + rows;
      return feature -
             static_cast<int>(multiply_high(feature, period_magic_)) * static_cast<int>(period_);
    }
    const int64_t feature = feature_ + rows;
    return feature < period_ ? feature : feature - period_;
  }

  __device__ void read_each(Acc (&to)[N], int i) const {
    int left;
    int64_t feature = locate(i, left);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      to[j] = at(feature);
      if (--left == 0) {
        left = inner_;
        if (++feature == period_) feature = 0;
      }
    }
  }

  __device__ void read_columns(Acc (&to)[N], int i) const {
    int left;
    const int64_t feature = locate(i, left);
    Vector<Acc, N> rates;
    if (is_double_) {
      if constexpr (sizeof(Acc) == 8)
        alrao::cuda::read<true>(rates, global<double>(rates_) + feature, N);
    } else {
      read_widened<true>(rates, global<float>(rates_) + feature, N);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = rates.entries[j];
  }

  const void* rates_;
  int64_t feature_, period_;
  int within_, inner_;
  uint32_t inner_magic_, period_magic_;
  RateMode mode_;
  bool is_double_;
};

}  // namespace alrao::cuda
