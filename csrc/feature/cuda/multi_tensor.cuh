// Many tensors in one launch: the walk of a block over its chunk of one tensor. Knows no op.
//
// A block takes one chunk (table.h); a thread takes vectors of 16 bytes of the
// parameter, several at a time so that enough bytes are in flight. Where an array does not begin on
// such an address, and in a tensor's last vector, the same vectors are read entry by entry. Blocks
// are as many as chunks: the hardware hands the next one to whichever multiprocessor is free, and
// the first loads of a block hide behind the others on its multiprocessor.
//
// Step counts live on the device. Every block reads its tensor's and then takes a ticket; the block
// with the last one counts all of the launch's up.
//
// An op is a class
//   kStates            arrays besides the parameter and the gradient
//   kUnroll<Layout>    vectors that a thread reads before it computes
//   kBlocks<Layout>    blocks that shall fit on a multiprocessor
//                      (both with the average's vectors, where Layout::has_average)
//   Options            numbers of the launch
//   Op(options, lr, grad_factor, step)   run by every thread of a block, once
//   update<WIDE>(p, g, states, rates)    arrays of neighbouring entries; `rates` without lr
// Without WIDE an update is rare, and shall be little code.
#pragma once

#include <cstdint>

#include "common/cuda/runtime.cuh"
#include "common/rounding.h"
#include "feature/cuda/launch.h"
#include "feature/cuda/rates.cuh"
#include "feature/cuda/storage.cuh"
#include "feature/master.h"

namespace alrao::cuda {

constexpr int kThreads = 256;

// The next of 0, 1, 2, ...; what this thread, and by a barrier its block, has read before is read.
__device__ inline unsigned take_ticket(unsigned* next) {
#ifdef __CUDA_ARCH__
  unsigned ticket;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(ticket)
               : "l"(__cvta_generic_to_global(next))
               : "memory");
  return ticket;
#else
  return __atomic_fetch_add(next, 1u, __ATOMIC_ACQ_REL);
#endif
}

template <typename T>
__device__ T read_scalar(const DeviceScalar& scalar, T otherwise) {
  if (scalar.data == nullptr) return otherwise;
  return scalar.is_double ? static_cast<T>(*global<double>(scalar.data))
                          : static_cast<T>(*global<float>(scalar.data));
}

// One vector of each of a tensor's arrays, and reading and writing them.
template <class L, int STATES>
struct Packet {
  static constexpr int N = L::kEntries;
  using Param = typename L::Param;
  using Acc = typename L::Acc;

  Vector<typename L::Value, N> value;  // of the master if there is one
  Vector<Param, N> beside;             // the parameter beside its master
  Vector<Param, N> grad;
  Vector<Acc, N> average;
  Vector<typename L::State, N> states[STATES > 0 ? STATES : 1];

  template <bool WIDE>
  __device__ void read(const TensorRow& row, const Param* grads, int64_t at, int n) {
    const Param* const param = global<Param>(row.param) + at;
    if constexpr (L::kMasters) {
      if (L::has_master(row)) {
        alrao::cuda::read<WIDE>(value, global<float>(row.master) + at, n);
        alrao::cuda::read<WIDE>(beside, param, n);
      } else {
        read_widened<WIDE>(value, param, n);
      }
    } else if constexpr (L::kMixed) {
      read_widened<WIDE>(value, param, n);
    } else {
      alrao::cuda::read<WIDE>(value, param, n);
    }
    alrao::cuda::read<WIDE>(grad, grads + at, n);
    if (L::has_average(row)) alrao::cuda::read<WIDE>(average, global<Acc>(row.average) + at, n);
#pragma unroll
    for (int k = 0; k < STATES; ++k) {
      if constexpr (L::kMixed) {
        if (row.float32_state >> k & 1) {
          read_widened<WIDE>(states[k], global<float>(row.states[k]) + at, n);
        } else {
          read_widened<WIDE>(states[k], global<Param>(row.states[k]) + at, n);
        }
      } else {
        alrao::cuda::read<WIDE>(states[k], global<typename L::State>(row.states[k]) + at, n);
      }
    }
  }

  template <bool WIDE, class Op>
  __device__ void update(const Op& op, const ChunkRates<Acc, N>& rates, const TensorRow& row,
                         int64_t step, Acc average_weight, int64_t at, int i, int n) {
    Acc r[N], p[N], g[N], s[STATES > 0 ? STATES : 1][N];
    rates.read(r, i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      p[j] = widen(value.entries[j]);
      if constexpr (L::kMasters)
        if (L::has_master(row)) p[j] = master_value(p[j], beside.entries[j]);
      g[j] = widen(grad.entries[j]);
#pragma unroll
      for (int k = 0; k < STATES; ++k) s[k][j] = widen(states[k].entries[j]);
    }
    op.template update<WIDE>(p, g, s, r);
#pragma unroll
    for (int k = 0; k < STATES; ++k) write_state<WIDE>(row, k, at, s[k], n);
    write_value<WIDE>(row, step, at, p, n);
    if (L::has_average(row)) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        average.entries[j] = averaged(average.entries[j], p[j], average_weight);
      alrao::cuda::write<WIDE>(global<Acc>(row.average) + at, average, n);
    }
  }

 private:
  template <bool WIDE>
  __device__ void write_state(const TensorRow& row, int k, int64_t at, const Acc (&s)[N], int n) {
    if constexpr (L::kMixed) {
      if (row.float32_state >> k & 1) {
        write_narrowed<WIDE>(global<float>(row.states[k]) + at, s, n);
      } else {
        write_narrowed<WIDE>(global<Param>(row.states[k]) + at, s, n);
      }
    } else {
      write_narrowed<WIDE>(global<typename L::State>(row.states[k]) + at, s, n);
    }
  }

  template <bool WIDE>
  __device__ void write_value(const TensorRow& row, int64_t step, int64_t at, const Acc (&p)[N],
                              int n) {
    Param* const param = global<Param>(row.param) + at;
    if constexpr (L::kLowPrecision) {
      if constexpr (L::kMasters)
        if (L::has_master(row)) write_narrowed<WIDE>(global<float>(row.master) + at, p, n);
      if constexpr (L::kStorage != Storage::kMaster) {
        if (row.stochastic) {
          // N is 8: as many entries as one call serves.
          uint32_t words[4];
          philox(words, at / 8, step, row.seed);
          Vector<Param, N> rounded;
#pragma unroll
          for (int j = 0; j < N; ++j)
            round_stochastic(p[j], words[j / 2] >> (j % 2 * 16) & 0xffffu, rounded.entries[j]);
          alrao::cuda::write<WIDE>(param, rounded, n);
          return;
        }
      }
    }
    write_narrowed<WIDE>(param, p, n);
  }
};

template <class L, class Op>
struct KernelArguments {
  const TensorRow* rows;
  const Chunk* chunks;
  unsigned* ticket;
  int32_t num_rows;
  int32_t num_chunks;
  int32_t chunk_entries;
  DeviceScalars scalars;
  double warmup_steps;
  double averaging;
  typename Op::Options options;
  const void* grads[kMaxRows];
};

// Updates the block's chunk; returns its ticket to thread 0.
template <class L, class Op>
__device__ unsigned update_chunk(const KernelArguments<L, Op>& a) {
  using Acc = typename L::Acc;
  constexpr int N = L::kEntries;
  constexpr int kUnroll = Op::template kUnroll<L>;
  const Chunk chunk = a.chunks[blockIdx.x];
  const TensorRow& row = a.rows[chunk.row];
  const int64_t begin = (blockIdx.x - row.first_chunk) * a.chunk_entries;
  const int64_t rest = row.numel - begin;
  const int entries = rest < a.chunk_entries ? static_cast<int>(rest) : a.chunk_entries;
  const auto* grads = global<typename L::Param>(a.grads[chunk.row]);
  const bool wide = row.aligned && reinterpret_cast<uintptr_t>(grads) % 16 == 0;
  const int vectors = (entries + N - 1) / N;
  const int wide_vectors = wide ? entries / N : 0;
  const ChunkRates<Acc, N> rates(row, chunk, a.chunk_entries);

  Packet<L, Op::kStates> packets[kUnroll];
  const auto read_wide = [&](int first) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = first + u * kThreads;
      if (v < wide_vectors) packets[u].template read<true>(row, grads, begin + v * N, N);
    }
  };
  int first = threadIdx.x;
  read_wide(first);

  const int64_t step = *global<int64_t>(row.step);
  const Acc lr = a.options.scalars.lr * read_scalar<Acc>(a.scalars.lr, 1) *
                 warmup_factor(static_cast<Acc>(a.warmup_steps), step);
  const Acc weight = L::has_average(row) ? static_cast<Acc>(average_weight(a.averaging, step)) : 0;
  const Op op(a.options, lr,
              a.options.scalars.grad_factor / read_scalar<Acc>(a.scalars.grad_scale, 1), step);
  __syncthreads();
  unsigned ticket = 0;
  if (threadIdx.x == 0) ticket = take_ticket(a.ticket);

  while (first < wide_vectors) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = first + u * kThreads;
      if (v < wide_vectors)
        packets[u].template update<true>(op, rates, row, step, weight, begin + v * N, v * N, N);
    }
    first += kUnroll * kThreads;
    read_wide(first);
  }
  for (int v = wide_vectors + threadIdx.x; v < vectors; v += kThreads) {
    const int n = entries - v * N < N ? entries - v * N : N;
    Packet<L, Op::kStates> packet{};
    packet.template read<false>(row, grads, begin + v * N, n);
    packet.template update<false>(op, rates, row, step, weight, begin + v * N, v * N, n);
  }
  return ticket;
}

template <class L, class Op, int BLOCKS>
__global__ void __launch_bounds__(kThreads, BLOCKS)
    multi_tensor_kernel(const __grid_constant__ KernelArguments<L, Op> a) {
  if (read_scalar(a.scalars.found_inf, 0.0) != 0) return;
  // The only block of tensors without entries has the last ticket too.
  unsigned ticket = 0;
  if (a.num_chunks > 0) ticket = update_chunk<L, Op>(a);

  __shared__ bool is_last;
  if (threadIdx.x == 0) is_last = ticket == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < a.num_rows; i += kThreads) *global<int64_t>(a.rows[i].step) += 1;
  if (threadIdx.x == 0) *a.ticket = 0;
}

template <class L, class Op>
cudaError_t launch_group(const LaunchGroup& group, const MultiTensorCall& call,
                         const typename Op::Options& options) {
  const auto place = [&](std::size_t offset) { return static_cast<char*>(call.table) + offset; };
  KernelArguments<L, Op> a;
  a.rows = reinterpret_cast<const TensorRow*>(place(group.rows_offset));
  a.chunks = reinterpret_cast<const Chunk*>(place(group.chunks_offset));
  a.ticket = reinterpret_cast<unsigned*>(place(group.ticket_offset));
  a.num_rows = group.num_rows;
  a.num_chunks = group.num_chunks;
  a.chunk_entries = group.chunk_entries;
  a.scalars = call.scalars;
  a.warmup_steps = call.warmup_steps;
  a.averaging = call.averaging;
  a.options = options;
  for (int32_t i = 0; i < group.num_rows; ++i) a.grads[i] = call.records[group.order[i]].grad;
  const dim3 grid(group.num_chunks > 0 ? group.num_chunks : 1);
  return launch(multi_tensor_kernel<L, Op, Op::template kBlocks<L>>, grid, kThreads, 0, call.stream,
                a);
}

// One launch for each group of the table: launch_as(Param(), group), Param the parameters' type.
template <class Launch>
cudaError_t launch_groups(const MultiTensorCall& call, const Launch& launch_as) {
  const auto launch_one = [&](const LaunchGroup& group) {
    switch (group.dtype) {
      case Dtype::kFloat64:
        return launch_as(double(), group);
      case Dtype::kFloat32:
        return launch_as(float(), group);
      case Dtype::kBFloat16:
        return launch_as(BFloat16(), group);
      case Dtype::kFloat16:
        return launch_as(Float16(), group);
    }
    return cudaErrorInvalidValue;
  };
  for (const LaunchGroup& group : call.layout.groups) {
    const cudaError_t status = launch_one(group);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace alrao::cuda
