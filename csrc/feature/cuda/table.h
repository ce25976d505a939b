// Which entries of which tensors each block of a launch over many tensors updates, and where a
// tensor's rates stand: plain data for the device, built on the host. No op, no torch, no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/host_device.h"
#include "feature/record.h"

namespace alrao::cuda {

// Entries of a vector access of 16 bytes.
constexpr int vector_entries(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 2 : dtype == Dtype::kFloat32 ? 4 : 8;
}

// How a vector of neighbouring entries finds its rates.
enum class RateMode : int32_t {
  kOne,      // one for the whole tensor
  kRows,     // one: a row ends only where a vector ends
  kColumns,  // neighbouring rates, themselves read 16 bytes at a time
  kEach,     // entry by entry
};

// How a launch's tensors are stored, besides the parameters' dtype.
enum class Storage : int32_t {
  kOwn,      // states in the parameter's dtype
  kFloat32,  // bf16 or fp16 with float32 states
  kMaster,   // the same, and float32 masters take the update
  kMixed,    // anything else that is allowed: each tensor says itself
};

// One tensor; rows lie on the device.
struct TensorRow {
  void* param;
  void* states[kMaxStates];
  float* master;
  void* average;
  const void* rates;
  int64_t* step;  // updates the parameter has had
  uint64_t seed;
  int64_t numel;
  int64_t inner;
  int64_t period;
  int64_t first_chunk;  // of the launch's
  uint32_t inner_magic;
  uint32_t period_magic;
  RateMode mode;
  bool aligned;           // but for the gradient, all its arrays begin on 16-byte addresses
  bool stochastic;        // round stochastically into the parameter
  bool double_rates;      // rates are float64, as the parameter is
  uint8_t float32_state;  // bit k: state k is float32, whatever the parameter is
};

// The entries that one block updates.
struct alignas(16) Chunk {
  int32_t row;
  // Entries of the first feature before the chunk, or, where rows are as long as a chunk, entries
  // of it within the chunk.
  int32_t within;
  int64_t feature;  // that of the first entry
};

// The tensors of one launch.
struct LaunchGroup {
  Dtype dtype;
  Storage storage;
  bool averages;  // its tensors have one
  int32_t num_rows;
  int32_t num_chunks;
  int32_t chunk_entries;
  std::size_t rows_offset;  // bytes from the start of the table
  std::size_t chunks_offset;
  std::size_t ticket_offset;
  std::vector<int32_t> order;  // row i is the record order[i]
};

// Everything that stays from step to step. `image` is the beginning of the device's table: tickets,
// then rows; the chunks behind it are made on the device.
struct MultiTensorTable {
  std::vector<LaunchGroup> groups;
  std::vector<uint32_t> image;
  std::size_t bytes = 0;  // of the whole table
};

// Gradients' pointers travel as a kernel argument: with the rest of it within 4 KiB, which any
// launch takes and the host soon has copied.
constexpr int kMaxRows = 480;

// Powers of two, and multiples of what a block reads at a time; at most kLargestChunk.
constexpr int32_t kSmallChunk = 4096, kLargestChunk = 16384;

// `steps` holds a count for each record. With `mixed`, launches must not assume one dtype for all
// states.
MultiTensorTable make_table(const std::vector<FeatureRecord>& records, int num_states, bool mixed,
                            int64_t* steps);

// magic with umulhi(n, magic) == n / divisor for n < 2^15 and 2 <= divisor <= 2^14; 0 stands for
// the divisor 1.
constexpr uint32_t reciprocal(uint32_t divisor) {
  return divisor == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) - 1) / divisor + 1);
}

// Chunk k of a row.
ALRAO_HOST_DEVICE static inline Chunk make_chunk(const TensorRow& row, int32_t number, int64_t k,
                                                 int32_t chunk_entries) {
  const int64_t begin = k * chunk_entries;
  const int64_t rows_before = begin / row.inner;
  const int64_t skipped = begin - rows_before * row.inner;
  int64_t within = skipped;
  if (row.inner >= chunk_entries) {
    const int64_t left = row.inner - skipped;
    within = left < chunk_entries ? left : chunk_entries;
  }
  return {number, static_cast<int32_t>(within), rows_before % row.period};
}

}  // namespace alrao::cuda
