#include <algorithm>

#include "common/cuda/runtime.cuh"
#include "feature/cuda/launch.h"

namespace alrao::cuda {
namespace {

constexpr int kThreads = 256;

template <int WORDS>
struct Words {
  uint32_t words[WORDS];
};

template <int WORDS>
__global__ void copy_words_kernel(const __grid_constant__ Words<WORDS> from, uint32_t* to,
                                  int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = from.words[i];
}

template <int WORDS>
cudaError_t copy_words(const uint32_t* from, uint32_t* to, std::size_t count, cudaStream_t stream) {
  for (std::size_t begin = 0; begin < count; begin += WORDS) {
    const int part = static_cast<int>(std::min<std::size_t>(WORDS, count - begin));
    Words<WORDS> words;
    std::copy(from + begin, from + begin + part, words.words);
    const cudaError_t status =
        launch(copy_words_kernel<WORDS>, 1, kThreads, 0, stream, words, to + begin, part);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

__global__ void make_chunks_kernel(const TensorRow* rows, int num_rows, Chunk* chunks,
                                   int num_chunks, int chunk_entries) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= num_chunks) return;
  // The last row that begins at or before the chunk.
  int low = 0, high = num_rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (rows[middle].first_chunk <= c) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  // Rows without entries stand last, and begin behind all chunks.
  chunks[c] = make_chunk(rows[low], low, c - rows[low].first_chunk, chunk_entries);
}

}  // namespace

cudaError_t upload_table(const MultiTensorTable& layout, void* table, cudaStream_t stream) {
  auto* const words = static_cast<uint32_t*>(table);
  const uint32_t* const image = layout.image.data();
  const std::size_t count = layout.image.size();
  cudaError_t status = count <= 1000 ? copy_words<1000>(image, words, count, stream)
                                     : copy_words<8000>(image, words, count, stream);
  for (const LaunchGroup& group : layout.groups) {
    if (status != cudaSuccess) return status;
    if (group.num_chunks == 0) continue;
    char* const base = static_cast<char*>(table);
    status = launch(make_chunks_kernel, (group.num_chunks + kThreads - 1) / kThreads, kThreads, 0,
                    stream, reinterpret_cast<const TensorRow*>(base + group.rows_offset),
                    group.num_rows, reinterpret_cast<Chunk*>(base + group.chunks_offset),
                    group.num_chunks, group.chunk_entries);
  }
  return status;
}

}  // namespace alrao::cuda
