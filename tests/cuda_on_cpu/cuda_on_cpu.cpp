// The scheduler behind cuda_on_cpu.h. Never instrumented itself: it tells AddressSanitizer
// (CUDA_ON_CPU_ASAN) and ThreadSanitizer (CUDA_ON_CPU_TSAN) what its fibers are.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "context.h"

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUDA_ON_CPU_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_java_init(unsigned long begin, unsigned long bytes);
void __tsan_java_alloc(unsigned long address, unsigned long bytes);
void __tsan_java_free(unsigned long address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The ends of the __shared__ variables (shared_memory.ld).
extern "C" unsigned char cuda_on_cpu_shared_begin[], cuda_on_cpu_shared_end[];

namespace cuda_on_cpu {

int multiprocessors = 4;
bool reverse_order = [] {
  const char* order = std::getenv("ALRAO_CUDA_ON_CPU_ORDER");
  return order != nullptr && std::strcmp(order, "reverse") == 0;
}();

namespace {

constexpr int kMaxThreads = 1024;

std::vector<std::unique_ptr<unsigned char[]>> dynamic_memory;  // the last is the running block's

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
  Context context;
  char* stack;
  uint3 index;
  State state;
  // What it waits at.
  const char* operation;
  Place place;
  unsigned mask;
  uint64_t value;
  // Whether it passed an even or an odd number: an edge serves every other one, so that who arrives
  // early at the next is not yet seen.
  bool barrier_side, warp_side;
  void* fake_stack;  // ASan's
  void* identity;    // TSan's thread
};

// Neighbouring blocks run on different fibers, so that TSan takes their threads for different ones.
std::vector<Fiber> sets[2];
std::vector<Fiber>* fibers;
Fiber* running;
Context scheduler;
void (*body)(const void*);
const void* body_context;
const char* failure;  // of the running thread
int num_threads;
Exchange exchanges[kMaxThreads / kWarp];
int votes;

// An edge is an address that stands for an order: who acquires it comes after all who released it.
struct Edges {
  char start, barrier[2], warp[kMaxThreads / kWarp][2];
};
std::unique_ptr<Edges> edges;
char end_edge, fence_edge;

#ifdef CUDA_ON_CPU_TSAN
// TSan watches so many blocks of a launch at its beginning and at its end; the numbers that all of
// them make are compared. Launches of more have hundreds of blocks that do the same on other
// columns, and each barrier takes TSan the square of the threads. ALRAO_CUDA_ON_CPU_WATCHED=all:
// every block.
const uint64_t watched_at_ends = [] {
  const char* watched = std::getenv("ALRAO_CUDA_ON_CPU_WATCHED");
  return watched != nullptr && std::strcmp(watched, "all") == 0 ? UINT64_MAX / 2 : 16;
}();
bool watched;  // the running block, whose threads are TSan's
void* scheduler_identity;
void release(char& edge) {
  if (watched) __tsan_release(&edge);
}
void acquire(char& edge) {
  if (watched) __tsan_acquire(&edge);
}
void take_identity(void* identity) {
  if (watched) __tsan_switch_to_fiber(identity, __tsan_switch_to_fiber_no_sync);
}
// While a block runs that is not watched, on the scheduler's identity.
struct Unwatched {
  Unwatched() {
    watched = false;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    watched = true;
  }
};
#else
void release(char&) {}
void acquire(char&) {}
#endif

#ifdef CUDA_ON_CPU_ASAN
void* scheduler_fake_stack;
const void* scheduler_stack;
std::size_t scheduler_stack_bytes;
#endif

void arrive_in_fiber() {
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(running->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void enter(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStack);
#endif
#ifdef CUDA_ON_CPU_TSAN
  take_identity(fiber.identity);
#endif
  switch_context(scheduler, fiber.context);
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void leave() {
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(&running->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
#ifdef CUDA_ON_CPU_TSAN
  take_identity(scheduler_identity);
#endif
  switch_context(running->context, scheduler);
  arrive_in_fiber();
}

// A fiber lives on: its frames are left as they should be, and its stack serves the next block.
void run_threads() {
  arrive_in_fiber();
  for (;;) {
    acquire(edges->start);
    body(body_context);
    release(end_edge);
    running->state = State::kDone;
    leave();
  }
}

void make_fibers(std::vector<Fiber>& set, std::size_t count) {
  while (set.size() < count) {
    Fiber fiber{};
    // The page below faults when a stack overflows.
    const std::size_t page = 4096;
    void* memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of a thread");
    mprotect(memory, page, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + page;
    start_context(fiber.context, fiber.stack, run_threads);
#ifdef CUDA_ON_CPU_TSAN
    fiber.identity = __tsan_create_fiber(0);
#endif
    set.push_back(fiber);
  }
}

// After a failure fibers stand in the middle of a kernel.
void drop_fibers() {
  for (auto& set : sets) {
    for (Fiber& fiber : set) {
      munmap(fiber.stack - 4096, kStack + 4096);
#ifdef CUDA_ON_CPU_TSAN
      __tsan_destroy_fiber(fiber.identity);
#endif
    }
    set.clear();
  }
}

std::string describe(Place place) {
  return std::string(place.file) + ":" + std::to_string(place.line);
}

std::string describe(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string describe(const Fiber& fiber) {
  return "thread " + describe(fiber.index) + " waits at " + fiber.operation + ", " +
         describe(fiber.place);
}

[[noreturn]] void fail_waiting(const char* what, const Fiber& one, const Fiber& other) {
  throw std::runtime_error(describe(one.place) + ": " + what + " in block " + describe(blockIdx) +
                           ": " + describe(one) + "; " + describe(other));
}

[[noreturn]] void fail_running() {
  throw std::runtime_error(describe(running->place) + ": thread " + describe(running->index) +
                           " of block " + describe(blockIdx) + " " +
                           std::exchange(failure, nullptr));
}

bool same_operation(const Fiber& one, const Fiber& other) {
  return one.state == other.state && one.operation == other.operation && one.mask == other.mask &&
         one.place.line == other.place.line && std::strcmp(one.place.file, other.place.file) == 0;
}

template <typename Visit>
void in_order(int begin, int end, Visit visit) {
  for (int i = begin; i < end; ++i) visit(reverse_order ? begin + end - 1 - i : i);
}

// Lets the lanes pass that wait for their warp; false if there are none.
bool release_warp(int begin, int end) {
  unsigned passed = 0;
  for (int i = begin; i < end; ++i) {
    Fiber& fiber = (*fibers)[i];
    if (fiber.state != State::kAtWarp || passed >> (i - begin) & 1) continue;
    unsigned present = 1u << (i - begin);
    if (!(fiber.mask & present)) {
      throw std::runtime_error(describe(fiber.place) + ": " + describe(fiber) +
                               ", not in its mask");
    }
    for (int other = begin; other < end; ++other) {
      if (!(fiber.mask >> (other - begin) & 1)) continue;
      const Fiber& peer = (*fibers)[other];
      if (peer.state == State::kDone) continue;
      if (!same_operation(fiber, peer)) fail_waiting("lanes in different operations", fiber, peer);
      present |= 1u << (other - begin);
    }
    Exchange& exchange = exchanges[begin / kWarp];
    exchange.present = present;
    for (int lane = 0; lane < end - begin; ++lane) {
      if (present >> lane & 1) exchange.values[lane] = (*fibers)[begin + lane].value;
    }
    passed |= present;
    // One group at a time: `exchange` holds what one of them brought.
    break;
  }
  for (int i = begin; i < end; ++i) {
    if (passed >> (i - begin) & 1) (*fibers)[i].state = State::kReady;
  }
  return passed != 0;
}

// Until every thread of the warp is at the block's barrier or has ended.
void run_warp(int begin, int end) {
  do {
    in_order(begin, end, [](int i) {
      if ((*fibers)[i].state != State::kReady) return;
      enter((*fibers)[i]);
      if (failure != nullptr) fail_running();
    });
  } while (release_warp(begin, end));
}

// Lets all pass the barrier; false if every thread has ended.
bool release_barrier() {
  const Fiber* first = nullptr;
  votes = 0;
  for (int i = 0; i < num_threads; ++i) {
    Fiber& fiber = (*fibers)[i];
    if (fiber.state == State::kDone) continue;
    if (first == nullptr) first = &fiber;
    if (!same_operation(*first, fiber))
      fail_waiting("threads at different barriers", *first, fiber);
    votes += fiber.value != 0;
  }
  for (int i = 0; i < num_threads; ++i) {
    if ((*fibers)[i].state == State::kAtBarrier) (*fibers)[i].state = State::kReady;
  }
  return first != nullptr;
}

void poison_shared(std::size_t dynamic_bytes) {
  // Allocated anew, so that sanitizers see where it ends. For TSan the threads of a block may still
  // be at theirs when the next begins.
#ifndef CUDA_ON_CPU_TSAN
  dynamic_memory.clear();
#endif
  dynamic_memory.push_back(std::make_unique<unsigned char[]>(dynamic_bytes));
  std::memset(dynamic_memory.back().get(), 0xff, dynamic_bytes);
  // Not memset: AddressSanitizer would object, as there are gaps between the variables.
  for (volatile unsigned char* byte = cuda_on_cpu_shared_begin; byte < cuda_on_cpu_shared_end;
       ++byte) {
    *byte = 0xff;
  }
}

void run_block(bool odd) {
  fibers = &sets[odd];
  make_fibers(*fibers, num_threads);
  for (int i = 0; i < num_threads; ++i) {
    Fiber& fiber = (*fibers)[i];
    const unsigned x = blockDim.x, y = blockDim.y, number = i;
    fiber.index = {number % x, number / x % y, number / (x * y)};
    fiber.state = State::kReady;
    // The block before may have passed another number of barriers, or had fewer threads.
    fiber.barrier_side = fiber.warp_side = false;
  }
  edges = std::make_unique<Edges>();
  release(edges->start);
  do {
    in_order(0, (num_threads + kWarp - 1) / kWarp,
             [](int warp) { run_warp(warp * kWarp, std::min((warp + 1) * kWarp, num_threads)); });
  } while (release_barrier());
}

void wait(State state, const char* operation, unsigned mask, uint64_t value, Place place) {
  running->state = state;
  running->operation = operation;
  running->mask = mask;
  running->value = value;
  running->place = place;
  leave();
}

}  // namespace

cudaError_t run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, void (*run)(const void*),
                     const void* context) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 0xffffu || grid.z > 0xffffu || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > kMaxShared) return cudaErrorInvalidValue;
  gridDim = grid;
  blockDim = block;
  body = run;
  body_context = context;
  num_threads = static_cast<int>(threads);
#ifdef CUDA_ON_CPU_TSAN
  // Memory that is allocated anew for every block is no race between blocks.
  const auto shared = reinterpret_cast<unsigned long>(cuda_on_cpu_shared_begin) & -8ul;
  const auto bytes = (reinterpret_cast<unsigned long>(cuda_on_cpu_shared_end) - shared + 7) & -8ul;
  static std::once_flag declared;
  std::call_once(declared, [&] { __tsan_java_init(shared, bytes); });
  scheduler_identity = __tsan_get_current_fiber();
  watched = true;
#endif
  try {
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = reverse_order ? blocks - 1 - i : i;
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / (uint64_t{grid.x} * grid.y))};
      poison_shared(shared_bytes);
#ifdef CUDA_ON_CPU_TSAN
      if (i < watched_at_ends || i + watched_at_ends >= blocks) {
        __tsan_java_alloc(shared, bytes);
        run_block(i % 2 == 1);
        __tsan_java_free(shared, bytes);
      } else {
        const Unwatched unwatched;
        run_block(i % 2 == 1);
      }
#else
      run_block(false);
#endif
    }
  } catch (...) {
    drop_fibers();
    throw;
  }
  acquire(end_edge);
  dynamic_memory.clear();
  return cudaSuccess;
}

unsigned char* dynamic_shared() { return dynamic_memory.back().get(); }

void fail(const char* what, Place place) {
  failure = what;
  running->place = place;
  for (;;) leave();
}

int barrier(const char* name, bool vote, Place place) {
  Fiber* self = running;
  char& edge = edges->barrier[self->barrier_side ^= 1];
  release(edge);
  wait(State::kAtBarrier, name, 0, vote, place);
  acquire(edge);
  return votes;
}

const Exchange& meet(const char* name, unsigned mask, uint64_t value, Place place) {
  wait(State::kAtWarp, name, mask, value, place);
  return exchanges[(running - fibers->data()) / kWarp];
}

void sync_warp(unsigned mask, Place place) {
  Fiber* self = running;
  char& edge = edges->warp[(self - fibers->data()) / kWarp][self->warp_side ^= 1];
  release(edge);
  wait(State::kAtWarp, "__syncwarp", mask, 0, place);
  acquire(edge);
}

void fence() {
  acquire(fence_edge);
  release(fence_edge);
}

}  // namespace cuda_on_cpu

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_on_cpu::multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = cuda_on_cpu::kSharedOfMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_on_cpu::kMaxShared;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
