// Runs CUDA kernels on the CPU, to test their logic without a GPU: indices, tails, barriers,
// reductions. csrc/common/cuda/runtime.cuh includes this header instead of cuda_runtime.h.
//
// Every thread of a block is a fiber with a stack of its own. It runs until it needs others: to a
// barrier, or to an operation of its warp. Blocks, warps and lanes run one after another, forwards
// or, with reverse_order, backwards: what a missing barrier leaves to chance comes out wrong in one
// of the orders. A deadlock, lanes in different operations and a read from an absent lane end the
// launch with an exception that names the line. Shared memory is all ones, a NaN, before each
// block. Under ThreadSanitizer a fiber is a thread, ordered with others by barriers alone.
// It watches the first and the last blocks of a launch (ALRAO_CUDA_ON_CPU_WATCHED=all: every one).
//
// What it cannot show: speed, registers, banks and coalescing; tensor cores, asynchronous copies
// and inline PTX; a warp split by divergence; the memory model, as one thread runs at a time;
// streams and the overlap of launches; waiting for another block, which never ends; and the last
// bits: the GPU contracts to fused multiply-adds and has its own exp and log.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time. The attribute puts them together (shared_memory.ld); a section's name
// would be lost in templates.
#define __shared__ static __attribute__((noinit))

#define CUDA_ON_CPU_VECTORS(scalar, name, align2, align4)              \
  struct alignas(align2) name##2 { scalar x, y; };                     \
  struct name##3 { scalar x, y, z; };                                  \
  struct alignas(align4) name##4 { scalar x, y, z, w; };               \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(unsigned char, uchar, 2, 4)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(long long, longlong, 16, 16)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong, 16, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)
#undef CUDA_ON_CPU_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// The host's side of the runtime.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t = nullptr) {
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

namespace cuda_on_cpu {

constexpr int kWarp = 32;
// What a block may have at most on every GPU that the kernels are compiled for.
constexpr std::size_t kMaxShared = 99 * 1024;

// Of all blocks of a multiprocessor.
constexpr std::size_t kSharedOfMultiprocessor = 100 * 1024;

// The multiprocessors that cudaDeviceGetAttribute tells of.
extern int multiprocessors;
// At the start what ALRAO_CUDA_ON_CPU_ORDER says: "reverse" or nothing.
extern bool reverse_order;

// Where a kernel called an operation of this header.
struct Place {
  const char* file;
  int line;
};

// Runs body(context) as every thread of the grid.
cudaError_t run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(const void*),
                     const void* context);
unsigned char* dynamic_shared();

// Ends the launch with an exception that says what happened to the running thread, and where.
[[noreturn]] void fail(const char* what, Place place);

// Waits for the block; returns how many threads came with `vote`.
int barrier(const char* name, bool vote, Place place);

// What the lanes of an operation brought.
struct Exchange {
  uint64_t values[kWarp];
  unsigned present;
};

// Waits for the lanes of `mask`. Until the caller's next operation the result is unchanged.
const Exchange& meet(const char* name, unsigned mask, uint64_t value, Place place);

// Between the lanes of `mask`, what was written before is seen afterwards.
void sync_warp(unsigned mask, Place place);
void fence();

inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp;
}

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, Place place) {
  const Exchange& exchange = meet(name, mask, pack(value), place);
  if (!(exchange.present >> source & 1)) fail("reads from an absent lane", place);
  return unpack<T>(exchange.values[source]);
}

template <typename T, typename Op>
T reduce(const char* name, unsigned mask, T value, Op op, Place place) {
  const Exchange& exchange = meet(name, mask, pack(value), place);
  T result = value;
  for (int i = 0; i < kWarp; ++i) {
    if (i != lane() && exchange.present >> i & 1)
      result = op(result, unpack<T>(exchange.values[i]));
  }
  return result;
}

inline unsigned ballot(const char* name, unsigned mask, bool vote, Place place) {
  const Exchange& exchange = meet(name, mask, vote, place);
  unsigned votes = 0;
  for (int i = 0; i < kWarp; ++i) {
    if (exchange.present >> i & 1) votes |= static_cast<unsigned>(exchange.values[i]) << i;
  }
  return votes;
}

// `next(old)` is what memory holds afterwards. TSan knows that it is atomic.
template <typename T, typename Next>
T update(T* address, Next next) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  Bits* bits = reinterpret_cast<Bits*>(address);
  const T old = unpack<T>(__atomic_load_n(bits, __ATOMIC_RELAXED));
  __atomic_store_n(bits, static_cast<Bits>(pack<T>(next(old))), __ATOMIC_RELAXED);
  return old;
}

// Copies to shared memory that a thread has asked for, of a block.
struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};
struct Copies {
  unsigned block = ~0u;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
inline Copies& copies_of_thread() {
  static std::vector<Copies> of_threads(1024);
  Copies& copies = of_threads[threadIdx.x];
  if (copies.block != blockIdx.x) copies = {blockIdx.x, {}, {}};
  return copies;
}

template <typename T>
struct Same {
  using type = T;
};
// Takes no part in deduction: atomicAdd(float*, int).
template <typename T>
using same_t = typename Same<T>::type;

}  // namespace cuda_on_cpu

namespace alrao::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t, Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "more than a launch takes");
  // As on the GPU, a kernel gets copies made at the launch.
  using Values = std::tuple<Parameters...>;
  const std::pair<void (*)(Parameters...), Values> call{
      kernel, Values(static_cast<Parameters>(std::forward<Arguments>(arguments))...)};
  return cuda_on_cpu::run_grid(
      grid, block, shared_bytes,
      [](const void* context) {
        const auto& [function, values] = *static_cast<const decltype(call)*>(context);
        std::apply(function, values);
      },
      &call);
}

}  // namespace alrao::cuda

#define ALRAO_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::cuda_on_cpu::dynamic_shared())

// The device's side. The last argument of each is where it was called.
#define CUDA_ON_CPU_PLACE ::cuda_on_cpu::Place place = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::barrier("__syncthreads", false, place);
}
inline int __syncthreads_count(int vote, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::barrier("__syncthreads_count", vote, place);
}
inline int __syncthreads_or(int vote, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::barrier("__syncthreads_or", vote, place) > 0;
}
inline int __syncthreads_and(int vote, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::barrier("__syncthreads_and", !vote, place) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::sync_warp(mask, place);
}
// Nothing has arrived before it was waited for; for TSan, which would take what keeps account of
// that for the kernels' own, it has at once.
inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes) {
#ifdef CUDA_ON_CPU_TSAN
  std::memcpy(to, from, bytes);
#else
  cuda_on_cpu::copies_of_thread().open.push_back({to, from, bytes});
#endif
}
inline void __pipeline_commit() {
#ifndef CUDA_ON_CPU_TSAN
  auto& copies = cuda_on_cpu::copies_of_thread();
  copies.groups.push_back(std::exchange(copies.open, {}));
#endif
}
inline void __pipeline_wait_prior([[maybe_unused]] std::size_t left) {
#ifndef CUDA_ON_CPU_TSAN
  auto& groups = cuda_on_cpu::copies_of_thread().groups;
  for (; groups.size() > left; groups.pop_front()) {
    for (const auto& [to, from, bytes] : groups.front()) std::memcpy(to, from, bytes);
  }
#endif
}
inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() { cuda_on_cpu::fence(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_PLACE) {
  const int first = cuda_on_cpu::lane() & -width;
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_PLACE) {
  const int lane = cuda_on_cpu::lane(), source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & -width);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, inside ? source : lane, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_PLACE) {
  const int lane = cuda_on_cpu::lane(), source = lane + static_cast<int>(delta);
  const bool inside = source < (lane & -width) + width;
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, inside ? source : lane, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_PLACE) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ bits;
  const bool inside = source < (lane & -width) + width;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, place);
}
inline unsigned __ballot_sync(unsigned mask, int vote, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::ballot("__ballot_sync", mask, vote, place);
}
inline int __any_sync(unsigned mask, int vote, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::ballot("__any_sync", mask, vote, place) != 0;
}
inline int __all_sync(unsigned mask, int vote, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::ballot("__all_sync", mask, !vote, place) == 0;
}

#define CUDA_ON_CPU_REDUCE(name, T, expression)                               \
  inline T name(unsigned mask, T value, CUDA_ON_CPU_PLACE) {                  \
    return cuda_on_cpu::reduce(                                               \
        #name, mask, value, [](T a, T b) -> T { return expression; }, place); \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, unsigned, a + b)
CUDA_ON_CPU_REDUCE(__reduce_add_sync, int, static_cast<int>(0u + a + b))
CUDA_ON_CPU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, int, a < b ? b : a)
CUDA_ON_CPU_REDUCE(__reduce_and_sync, unsigned, a& b)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, unsigned, a | b)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef CUDA_ON_CPU_REDUCE

template <typename T>
T atomicAdd(T* address, cuda_on_cpu::same_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* address, cuda_on_cpu::same_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, cuda_on_cpu::same_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(T* address, cuda_on_cpu::same_t<T> value) {
  return cuda_on_cpu::update(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, cuda_on_cpu::same_t<T> expected, cuda_on_cpu::same_t<T> value) {
  return cuda_on_cpu::update(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return cuda_on_cpu::update(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, cuda_on_cpu::same_t<T> value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, cuda_on_cpu::same_t<T> value) {
  *address = value;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) { return cuda_on_cpu::unpack<int>(cuda_on_cpu::pack(x)); }
inline float __int_as_float(int x) { return cuda_on_cpu::unpack<float>(cuda_on_cpu::pack(x)); }
inline unsigned __float_as_uint(float x) {
  return cuda_on_cpu::unpack<unsigned>(cuda_on_cpu::pack(x));
}
inline float __uint_as_float(unsigned x) {
  return cuda_on_cpu::unpack<float>(cuda_on_cpu::pack(x));
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
