// ALRAO_HOST_DEVICE: the one-element mathematics of an op (*math.h) is compiled for the CPU
// and, under nvcc, for the GPU as well. Such functions are `static inline`: each translation unit
// keeps its own copy, so that one compiled for a newer instruction set never serves an older
// machine.
#pragma once

#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define ALRAO_HOST_DEVICE __host__ __device__
#else
#define ALRAO_HOST_DEVICE
#endif

namespace alrao {

ALRAO_HOST_DEVICE static inline float square_root(float x) { return ::sqrtf(x); }
ALRAO_HOST_DEVICE static inline double square_root(double x) { return ::sqrt(x); }

ALRAO_HOST_DEVICE static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace alrao
