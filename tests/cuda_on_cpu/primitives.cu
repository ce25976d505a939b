// Kernels that test the header itself: `primitives NAME` runs one and says what came out wrong.
// Those after "planted" have a mistake that must be caught.
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda/block.cuh"
#include "common/cuda/runtime.cuh"

namespace alrao::cuda {
namespace {

void expect(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared,
         Arguments&&... arguments) {
  const cudaError_t status =
      launch(kernel, grid, block, shared, nullptr, std::forward<Arguments>(arguments)...);
  expect(status == cudaSuccess, cudaGetErrorString(status));
}

__global__ void indices_kernel(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  atomicAdd(&out[block * threads + thread], block * threads + thread);
}

void indices() {
  std::vector<int> out(2 * 3 * 2 * 5 * 7 * 2);
  run(indices_kernel, dim3(2, 3, 2), dim3(5, 7, 2), 0, out.data());
  for (std::size_t i = 0; i < out.size(); ++i) expect(out[i] == static_cast<int>(i), "an index");
}

__global__ void shuffles_kernel(int* out) {
  const int lane = threadIdx.x;
  out[0 * 32 + lane] = __shfl_sync(~0u, lane, 5);
  out[1 * 32 + lane] = __shfl_sync(~0u, lane, 9, 8);
  out[2 * 32 + lane] = __shfl_up_sync(~0u, lane, 3);
  out[3 * 32 + lane] = __shfl_up_sync(~0u, lane, 3, 16);
  out[4 * 32 + lane] = __shfl_down_sync(~0u, lane, 4);
  out[5 * 32 + lane] = __shfl_down_sync(~0u, lane, 4, 8);
  out[6 * 32 + lane] = __shfl_xor_sync(~0u, lane, 17);
  out[7 * 32 + lane] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
  out[8 * 32 + lane] = __any_sync(~0u, lane == 7) * 2 + __all_sync(~0u, lane != 7);
  out[9 * 32 + lane] = __reduce_max_sync(~0u, lane * 5 % 32) + __reduce_add_sync(~0u, -lane);
  // Halves that go different ways.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  if (lane < 16) {
    out[10 * 32 + lane] = __shfl_xor_sync(half, lane, 1);
  } else {
    out[10 * 32 + lane] = __shfl_xor_sync(half, lane, 2);
  }
}

void shuffles() {
  std::vector<int> out(11 * 32);
  run(shuffles_kernel, 1, 32, 0, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int expected[] = {5,
                            lane / 8 * 8 + 1,
                            lane < 3 ? lane : lane - 3,
                            lane % 16 < 3 ? lane : lane - 3,
                            lane < 28 ? lane + 4 : lane,
                            lane % 8 < 4 ? lane + 4 : lane,
                            lane ^ 17,
                            0x49249249,
                            2,
                            31 - 31 * 16,
                            lane < 16 ? lane ^ 1 : lane ^ 2};
    for (int row = 0; row < 11; ++row) {
      expect(out[row * 32 + lane] == expected[row], ("row " + std::to_string(row)).c_str());
    }
  }
}

struct Pair {
  double sum;
  float max;
  int count;
};
struct Join {
  __device__ Pair operator()(Pair a, Pair b) const {
    return {a.sum + b.sum, fmaxf(a.max, b.max), a.count + b.count};
  }
};

template <typename T>
__global__ void reductions_kernel(const T* values, Pair* out) {
  __shared__ Pair scratch[8];
  __shared__ T numbers[8];
  const T value = values[threadIdx.x];
  for (int repeat = 0; repeat < 3; ++repeat) {
    Pair pair{static_cast<double>(value), static_cast<float>(value), 1};
    pair = block_reduce(pair, Join(), {0, -INFINITY, 0}, scratch);
    const T largest = block_reduce(value, Max(), -INFINITY, numbers);
    pair.sum += block_reduce(value, Sum(), 0, numbers) + largest;
    out[repeat * blockDim.x + threadIdx.x] = pair;
  }
}

template <typename T>
void reductions() {
  for (const int threads : {32, 96, 256}) {
    std::vector<T> values(threads);
    for (int i = 0; i < threads; ++i) values[i] = static_cast<T>(i * 37 % 101 - 50);
    double sum = 0;
    float max = -INFINITY;
    for (const T value : values) sum += value, max = std::fmax(max, static_cast<float>(value));
    std::vector<Pair> out(3 * threads);
    run(reductions_kernel<T>, 1, threads, 0, values.data(), out.data());
    for (const Pair& pair : out) {
      expect(pair.sum == 2 * sum + max && pair.max == max && pair.count == threads, "a reduction");
    }
  }
}

// Warps in different numbers of warp operations, votes, and a block whose last warp is not full.
__global__ void votes_kernel(int* out) {
  const int warp = threadIdx.x / 32;
  unsigned lanes = __ballot_sync(~0u, true);
  for (int i = 0; i < warp; ++i) lanes &= __ballot_sync(~0u, true);
  const int odd = __syncthreads_count(threadIdx.x % 2);
  const int any = __syncthreads_or(threadIdx.x == 40), all = __syncthreads_and(threadIdx.x != 40);
  if (threadIdx.x >= 64) return;  // those who ended are not waited for
  __syncthreads();
  out[threadIdx.x] = __popc(lanes) + 100 * odd + 10000 * any + 20000 * all;
}

void votes() {
  std::vector<int> out(64);
  run(votes_kernel, 1, 72, 0, out.data());
  for (const int value : out) expect(value == 32 + 3600 + 10000, "a vote");
}

// The block that comes last adds up what the others left.
__global__ void last_block_kernel(int* parts, unsigned* ticket, int* out) {
  __shared__ unsigned number;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<int>(blockIdx.x);
    __threadfence();
    number = atomicInc(ticket, gridDim.x - 1);
  }
  __syncthreads();
  if (number == gridDim.x - 1 && threadIdx.x == 0) {
    __threadfence();
    for (unsigned i = 0; i < gridDim.x; ++i) *out += parts[i];
  }
}

void last_block() {
  std::vector<int> parts(9);
  unsigned ticket = 0;
  int out = 0;
  for (int i = 1; i < 3; ++i) {
    run(last_block_kernel, 9, 64, 0, parts.data(), &ticket, &out);
    expect(out == 36 * i && ticket == 0, "the sum of all blocks");
  }
}

// The barriers of one launch are nothing to the next, which has more threads.
__global__ void neighbours_kernel(float* out) {
  __shared__ float values[128];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + blockDim.x / 2) % blockDim.x];
  __syncwarp();
  out[threadIdx.x] += values[threadIdx.x ^ 1];
}

void more_threads() {
  for (const unsigned threads : {32, 64, 128}) {
    std::vector<float> out(threads);
    run(neighbours_kernel, 1, threads, 0, out.data());
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned sum = (i + threads / 2) % threads + (i ^ 1);
      expect(out[i] == static_cast<float>(sum), "neighbours");
    }
  }
}

__global__ void poison_kernel(float* out) {
  ALRAO_DYNAMIC_SHARED(float, dynamic);
  __shared__ float fixed[4];
  out[2 * blockIdx.x] = dynamic[3];
  out[2 * blockIdx.x + 1] = fixed[3];
  dynamic[3] = fixed[3] = 1;
}

void poison() {
  std::vector<float> out(6);
  run(poison_kernel, 3, 1, 4 * sizeof(float), out.data());
  for (const float value : out) expect(std::isnan(value), "shared memory is no NaN");
}

void limits() {
  const auto status = [](dim3 grid, dim3 block, std::size_t shared) {
    return launch(indices_kernel, grid, block, shared, nullptr, nullptr);
  };
  expect(status(0, 32, 0) == cudaErrorInvalidConfiguration, "no blocks");
  expect(status(1, 1025, 0) == cudaErrorInvalidConfiguration, "too many threads");
  expect(status(dim3(1, 65536), 32, 0) == cudaErrorInvalidConfiguration, "too many blocks");
  expect(status(1, 32, 100 * 1024) == cudaErrorInvalidValue, "too much shared memory");
}

// A launch that fails leaves the next one as it should be.
__global__ void deadlock_kernel() {
  if (threadIdx.x % 2) __syncwarp();
  __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void absent_lane_kernel() {
  if (threadIdx.x < 20) __shfl_sync(0xfffffu, 1, 25);
}
__global__ void outside_mask_kernel() { __shfl_sync(0xffffu, 1, 0); }

void fails(const char* with, void (*kernel)()) {
  std::string said = "nothing";
  try {
    launch(kernel, 2, 64, 0, nullptr);
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  expect(said.find(with) != std::string::npos && said.find("primitives.cu:") != std::string::npos,
         said.c_str());
  votes();
}

void mistakes() {
  fails("lanes in different operations", deadlock_kernel);
  fails("threads at different barriers", two_barriers_kernel);
  fails("reads from an absent lane", absent_lane_kernel);
  fails("not in its mask", outside_mask_kernel);
}

// Planted: caught by AddressSanitizer, in each kind of memory.
__global__ void overrun_kernel(float* out, int n) { out[threadIdx.x] = static_cast<float>(n); }
__global__ void fixed_overrun_kernel(float* out, int n) {
  __shared__ float fixed[32];
  fixed[threadIdx.x + n] = 1;
  out[threadIdx.x] = fixed[threadIdx.x];
}
template <typename T>
__global__ void dynamic_overrun_kernel(T* out, int n) {
  ALRAO_DYNAMIC_SHARED(T, dynamic);
  dynamic[threadIdx.x + n] = 1;
  out[threadIdx.x] = dynamic[threadIdx.x];
}
// Planted: caught by UBSan.
__global__ void misaligned_kernel(float* out, int n) {
  *reinterpret_cast<float4*>(out + n) = make_float4(1, 2, 3, 4);
}
// Planted: caught by ThreadSanitizer, and wrong numbers in one of the orders.
__global__ void no_barrier_kernel(float* out, int n) {
  __shared__ float values[64];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + n) % 64];
}
__global__ void no_syncwarp_kernel(float* out, int n) {
  __shared__ float values[32];
  values[threadIdx.x] = 1;
  __shfl_xor_sync(~0u, 0, 1);  // orders no memory
  out[threadIdx.x] = values[(threadIdx.x + n) % 32];
}
// The blocks from n on.
__global__ void blocks_race_kernel(float* out, int n) {
  const int block = blockIdx.x;
  if (threadIdx.x == 0) out[block < n ? block : n] += 1;
}

std::vector<float> planted(void (*kernel)(float*, int), int grid, int threads, int n,
                           std::size_t shared = 0, int size = 64) {
  std::vector<float> out(size);
  run(kernel, grid, threads, shared, out.data(), n);
  return out;
}

void no_barrier() {
  const std::vector<float> out = planted(no_barrier_kernel, 1, 64, 33);
  for (int i = 0; i < 64; ++i) {
    expect(out[i] == static_cast<float>((i + 33) % 64), "a thread read before another wrote");
  }
}

const std::map<std::string, std::function<void()>> kTests{
    {"indices", indices},
    {"shuffles", shuffles},
    {"reductions_float", reductions<float>},
    {"reductions_double", reductions<double>},
    {"votes", votes},
    {"last_block", last_block},
    {"more_threads", more_threads},
    {"poison", poison},
    {"limits", limits},
    {"mistakes", mistakes},
    {"planted_overrun", [] { planted(overrun_kernel, 1, 64, 1, 0, 63); }},
    {"planted_fixed_overrun", [] { planted(fixed_overrun_kernel, 1, 32, 1); }},
    {"planted_dynamic_overrun", [] { planted(dynamic_overrun_kernel<float>, 1, 32, 1, 128); }},
    {"planted_misaligned", [] { planted(misaligned_kernel, 1, 1, 1); }},
    {"planted_no_barrier", no_barrier},
    {"planted_no_syncwarp", [] { planted(no_syncwarp_kernel, 1, 32, 1); }},
    {"planted_blocks_race", [] { planted(blocks_race_kernel, 2, 32, 0); }},
    {"planted_last_blocks_race", [] { planted(blocks_race_kernel, 64, 32, 62); }},
};

}  // namespace
}  // namespace alrao::cuda

int main(int count, char** arguments) {
  if (count < 2) {
    for (const auto& [name, test] : alrao::cuda::kTests) std::puts(name.c_str());
    return 0;
  }
  try {
    for (int i = 1; i < count; ++i) alrao::cuda::kTests.at(arguments[i])();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wrong: %s\n", error.what());
    return 1;
  }
  return 0;
}
