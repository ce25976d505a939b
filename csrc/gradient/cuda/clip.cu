// Gradients clipped by the norms of their segments: one launch sums chunks of them, a second adds
// up the sums of a segment, in every block anew, and scales what is too long.
//
// Bound by memory: 4 bytes an entry in float32 for the norms and 8 more where it is scaled, half of
// them in bf16 and fp16. Chunks are about kChunks in all, so that the sums of a segment, which each
// of its blocks reads, stay below the gradients themselves. Sums are in order: the same bits each
// time. Nothing waits for the device.
#include <algorithm>

#include "common/cuda/block.cuh"
#include "common/cuda/runtime.cuh"
#include "feature/cuda/storage.cuh"
#include "gradient/cuda/clip.h"

namespace alrao::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

template <int CAPACITY>
struct ClipArguments {
  double* partials;
  double* norms;
  const double* given;
  double max_norm;
  int64_t chunk_entries;
  Norm norm;
  int32_t num_rows;
  ClipRow rows[CAPACITY];
};
static_assert(sizeof(ClipArguments<kFewClipRows>) <= 4096, "any launch takes them");
static_assert(sizeof(ClipArguments<kMaxClipRows>) <= 32764, "the most that a launch takes");

// The entries of a block.
struct ClipChunk {
  const ClipRow& row;
  int64_t segment;  // of the row's
  int64_t number;   // of the segment's
  int64_t begin, entries;

  __device__ int64_t first_partial() const {
    return row.first_partial + segment * row.segment_partials;
  }
};

template <int CAPACITY>
__device__ ClipChunk find_chunk(const ClipArguments<CAPACITY>& a) {
  const int chunk = blockIdx.x;
  // The last row that begins at or before the chunk.
  int low = 0, high = a.num_rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.rows[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const ClipRow& row = a.rows[low];
  const int own = chunk - row.first_chunk;
  const int64_t segment = own / row.segment_chunks, number = own % row.segment_chunks;
  const int64_t within = number * a.chunk_entries, rest = row.inner - within;
  return {row, segment, number, segment * row.inner + within,
          rest < a.chunk_entries ? rest : a.chunk_entries};
}

// Entries before the first address of 16 bytes, and vectors of N from there.
template <class T, int N>
struct Aligned {
  int64_t head, vectors;

  __device__ Aligned(const T* x, int64_t entries) {
    const auto over = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
    head = over == 0 ? 0 : N - over;
    head = head < entries ? head : entries;
    vectors = (entries - head) / N;
  }

  __device__ int64_t tail() const { return head + vectors * N; }
};

struct Join {
  NormKind kind;
  __device__ double operator()(double a, double b) const {
    return kind == NormKind::kLargest ? norm_join<NormKind::kLargest>(a, b)
                                      : norm_join<NormKind::kTwo>(a, b);
  }
};

template <NormKind KIND, class T, int N>
__device__ double sum_vector(const Vector<T, N>& vector, double order) {
  if constexpr (KIND == NormKind::kTwo && sizeof(T) < sizeof(double)) {
    // Squares in float32, since many GPUs have few units for float64, where it can hold them.
    float sum = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float x = widen(vector.entries[j]);
      sum += x * x;
    }
    if (sum > 1e-30f && sum < 1e38f) return sum;
  }
  double sum = 0;
#pragma unroll
  for (int j = 0; j < N; ++j)
    sum =
        norm_join<KIND>(sum, norm_term<KIND>(static_cast<double>(widen(vector.entries[j])), order));
  return sum;
}

// This thread's part of a chunk.
template <NormKind KIND, class T>
__device__ double sum_entries(const T* x, int64_t entries, double order) {
  constexpr int N = 16 / sizeof(T);
  double sum = 0;
  const auto add = [&](int64_t i) {
    sum = norm_join<KIND>(sum, norm_term<KIND>(static_cast<double>(widen(x[i])), order));
  };
  if constexpr (KIND == NormKind::kPower) {
    // Bound by pow, which many times over would not fit into registers.
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < entries; i += kThreads) add(i);
    return sum;
  }
  const Aligned<T, N> at(x, entries);
  for (int64_t v = threadIdx.x; v < at.vectors; v += kUnroll * kThreads) {
    // Zeros add nothing.
    Vector<T, N> vectors[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (v + u * kThreads < at.vectors)
        read<true>(vectors[u], x + at.head + (v + u * kThreads) * N, N);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      sum = norm_join<KIND>(sum, sum_vector<KIND>(vectors[u], order));
  }
  for (int64_t i = threadIdx.x; i < at.head; i += kThreads) add(i);
  for (int64_t i = at.tail() + threadIdx.x; i < entries; i += kThreads) add(i);
  return sum;
}

template <class T>
__device__ void scale_entries(T* x, int64_t entries, double factor) {
  constexpr int N = 16 / sizeof(T);
  const Aligned<T, N> at(x, entries);
  const auto own = static_cast<compute_t<T>>(factor);
  const auto scale = [&](T& entry) { round_to(widen(entry) * own, entry); };
  for (int64_t v = threadIdx.x; v < at.vectors; v += kThreads) {
    Vector<T, N> vector;
    read<true>(vector, x + at.head + v * N, N);
#pragma unroll
    for (int j = 0; j < N; ++j) scale(vector.entries[j]);
    write<true>(x + at.head + v * N, vector, N);
  }
  for (int64_t i = threadIdx.x; i < at.head; i += kThreads) scale(x[i]);
  for (int64_t i = at.tail() + threadIdx.x; i < entries; i += kThreads) scale(x[i]);
}

// Apart for the usual norm: the others call pow.
template <int CAPACITY, bool TWO>
__global__ void __launch_bounds__(kThreads)
    gradient_sums_kernel(const __grid_constant__ ClipArguments<CAPACITY> a) {
  __shared__ double scratch[kThreads / kWarp];
  const ClipChunk chunk = find_chunk(a);
  const double own = with_type(chunk.row.dtype, [&](auto zero) {
    const auto* const x = global<decltype(zero)>(chunk.row.data) + chunk.begin;
    const double order = a.norm.order;
    if constexpr (TWO) {
      return sum_entries<NormKind::kTwo>(x, chunk.entries, order);
    } else {
      if (a.norm.kind == NormKind::kOne)
        return sum_entries<NormKind::kOne>(x, chunk.entries, order);
      if (a.norm.kind == NormKind::kLargest)
        return sum_entries<NormKind::kLargest>(x, chunk.entries, order);
      return sum_entries<NormKind::kPower>(x, chunk.entries, order);
    }
  });
  const double sum = block_reduce(own, Join{a.norm.kind}, 0.0, scratch);
  if (threadIdx.x == 0)
    a.partials[chunk.first_partial() + chunk.row.own_partial + chunk.number] = sum;
}

template <int CAPACITY>
__global__ void __launch_bounds__(kThreads)
    gradient_scale_kernel(const __grid_constant__ ClipArguments<CAPACITY> a) {
  __shared__ double scratch[kThreads / kWarp];
  const ClipChunk chunk = find_chunk(a);
  const int64_t segment = chunk.row.first_segment + chunk.segment;
  double norm;
  if (a.given != nullptr) {
    norm = a.given[segment];
  } else {
    // One block writes the segment's norm; without clipping the others have nothing to do.
    const bool first = chunk.row.own_partial == 0 && chunk.number == 0;
    if (!first && a.max_norm == INFINITY) return;
    const Join join{a.norm.kind};
    const double* const partials = a.partials + chunk.first_partial();
    double sum = 0;
    for (int i = threadIdx.x; i < chunk.row.segment_partials; i += kThreads)
      sum = join(sum, partials[i]);
    norm = norm_of_sum(block_reduce(sum, join, 0.0, scratch), a.norm);
    if (first && threadIdx.x == 0) a.norms[segment] = norm;
  }
  const double factor = clip_factor(norm, a.max_norm);
  if (factor == 1) return;
  with_type(chunk.row.dtype, [&](auto zero) {
    scale_entries(global<decltype(zero)>(chunk.row.data) + chunk.begin, chunk.entries, factor);
  });
}

template <int CAPACITY>
cudaError_t launch_rows(const ClipCall& call, size_t begin, size_t end, bool scale) {
  ClipArguments<CAPACITY> a;
  a.partials = call.partials;
  a.norms = call.norms;
  a.given = call.given;
  a.max_norm = call.max_norm;
  a.chunk_entries = call.chunk_entries;
  a.norm = call.norm;
  a.num_rows = static_cast<int32_t>(end - begin);
  const int32_t before = call.rows[begin].first_chunk;
  for (size_t i = begin; i < end; ++i) {
    a.rows[i - begin] = call.rows[i];
    a.rows[i - begin].first_chunk -= before;
  }
  const int64_t after = end < call.rows.size() ? call.rows[end].first_chunk : call.num_chunks;
  const dim3 grid(static_cast<unsigned>(after - before));
  if (scale) return launch(gradient_scale_kernel<CAPACITY>, grid, kThreads, 0, call.stream, a);
  if (call.norm.kind == NormKind::kTwo)
    return launch(gradient_sums_kernel<CAPACITY, true>, grid, kThreads, 0, call.stream, a);
  return launch(gradient_sums_kernel<CAPACITY, false>, grid, kThreads, 0, call.stream, a);
}

cudaError_t launch_all(const ClipCall& call, bool scale) {
  for (size_t begin = 0; begin < call.rows.size(); begin += kMaxClipRows) {
    const size_t end = std::min(begin + kMaxClipRows, call.rows.size());
    const cudaError_t status = end - begin <= kFewClipRows
                                   ? launch_rows<kFewClipRows>(call, begin, end, scale)
                                   : launch_rows<kMaxClipRows>(call, begin, end, scale);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_gradient_clip(const ClipCall& call) {
  if (call.given == nullptr) {
    const cudaError_t status = launch_all(call, false);
    if (status != cudaSuccess) return status;
  }
  return launch_all(call, true);
}

}  // namespace alrao::cuda
