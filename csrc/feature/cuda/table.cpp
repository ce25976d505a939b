#include "feature/cuda/table.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace alrao::cuda {
namespace {

// With fewer entries than this in a launch, small chunks give every multiprocessor its share.
constexpr int64_t kManyEntries = int64_t{1} << 25;
constexpr std::size_t kTicketBytes = 128;  // a cache line each

bool on_vector(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

Storage storage_of(const FeatureRecord& record, int num_states, bool mixed) {
  if (mixed) return Storage::kMixed;
  int float32 = 0, own = 0;
  for (int k = 0; k < num_states; ++k) {
    own += record.state_dtypes[k] == record.param_dtype;
    float32 += record.state_dtypes[k] == Dtype::kFloat32;
  }
  const bool low_precision =
      record.param_dtype == Dtype::kBFloat16 || record.param_dtype == Dtype::kFloat16;
  if (record.master) return float32 == num_states ? Storage::kMaster : Storage::kMixed;
  if (own == num_states) return Storage::kOwn;
  return low_precision && float32 == num_states ? Storage::kFloat32 : Storage::kMixed;
}

RateMode mode_of(const FeatureRecord& record) {
  const int entries = vector_entries(record.param_dtype);
  if (record.period == 1) return RateMode::kOne;
  if (record.inner % entries == 0) return RateMode::kRows;
  if (record.inner == 1 && record.period % entries == 0 && on_vector(record.rates))
    return RateMode::kColumns;
  return RateMode::kEach;
}

TensorRow make_row(const FeatureRecord& record, int num_states, int32_t chunk_entries) {
  TensorRow row{};
  row.param = record.param;
  row.master = record.master;
  row.average = record.average;
  row.rates = record.rates;
  row.seed = record.seed;
  row.numel = record.numel;
  row.period = record.period;
  // One rate: the layout means nothing, and must not overflow.
  row.inner = record.period == 1 ? std::max<int64_t>(record.numel, 1) : record.inner;
  row.mode = mode_of(record);
  row.aligned = on_vector(record.param) && on_vector(record.master) && on_vector(record.average);
  row.stochastic = record.stochastic;
  row.double_rates = record.rate_dtype == Dtype::kFloat64;
  for (int k = 0; k < num_states; ++k) {
    row.states[k] = record.states[k];
    row.aligned = row.aligned && on_vector(record.states[k]);
    if (record.state_dtypes[k] == Dtype::kFloat32) row.float32_state |= 1u << k;
  }
  // Read only where they are shorter than a chunk.
  const int64_t longest = chunk_entries;
  row.inner_magic = reciprocal(static_cast<uint32_t>(std::min(row.inner, longest)));
  row.period_magic = reciprocal(static_cast<uint32_t>(std::min(row.period, longest)));
  return row;
}

}  // namespace

MultiTensorTable make_table(const std::vector<FeatureRecord>& records, int num_states, bool mixed,
                            int64_t* steps) {
  MultiTensorTable table;
  // Largest first, so that the last blocks are not all of one large tensor.
  std::vector<int32_t> order(records.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return records[a].numel > records[b].numel; });
  for (const int32_t index : order) {
    const FeatureRecord& record = records[index];
    const Storage storage = storage_of(record, num_states, mixed);
    const auto takes = [&](const LaunchGroup& group) {
      // A tensor without entries only has its steps counted.
      const bool alike = group.dtype == record.param_dtype && group.storage == storage &&
                         group.averages == (record.average != nullptr);
      return (alike || record.numel == 0) && group.order.size() < kMaxRows;
    };
    auto group = std::find_if(table.groups.begin(), table.groups.end(), takes);
    if (group == table.groups.end()) {
      const bool averages = record.average != nullptr;
      table.groups.push_back({record.param_dtype, storage, averages, 0, 0, 0, 0, 0, 0, {}});
      group = table.groups.end() - 1;
    }
    group->order.push_back(index);
  }

  std::size_t offset = table.groups.size() * kTicketBytes;
  std::vector<TensorRow> rows;
  for (std::size_t g = 0; g < table.groups.size(); ++g) {
    LaunchGroup& group = table.groups[g];
    int64_t entries = 0;
    for (const int32_t index : group.order) entries += records[index].numel;
    group.chunk_entries = entries < kManyEntries ? kSmallChunk : kLargestChunk;
    group.num_rows = static_cast<int32_t>(group.order.size());
    group.ticket_offset = g * kTicketBytes;
    group.rows_offset = offset;
    offset += group.order.size() * sizeof(TensorRow);
    int64_t chunks = 0;
    for (const int32_t index : group.order) {
      TensorRow row = make_row(records[index], num_states, group.chunk_entries);
      row.step = steps + index;
      row.first_chunk = chunks;
      chunks += (row.numel + group.chunk_entries - 1) / group.chunk_entries;
      rows.push_back(row);
    }
    group.num_chunks = static_cast<int32_t>(chunks);
  }
  table.image.resize(offset / sizeof(uint32_t));
  std::memcpy(reinterpret_cast<char*>(table.image.data()) + table.groups.size() * kTicketBytes,
              rows.data(), rows.size() * sizeof(TensorRow));
  for (LaunchGroup& group : table.groups) {
    offset = (offset + sizeof(Chunk) - 1) / sizeof(Chunk) * sizeof(Chunk);
    group.chunks_offset = offset;
    offset += group.num_chunks * sizeof(Chunk);
  }
  table.bytes = offset;
  return table;
}

}  // namespace alrao::cuda
