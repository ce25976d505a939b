// The kernels of clipping on the CPU: `n` neighbouring entries of a gradient.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "gradient/math.h"

namespace alrao::cpu {

// The sum or maximum of their terms.
ALRAO_DECLARE_KERNEL(double, gradient_clip_sum,
                     (const void* grad, Dtype dtype, int64_t begin, int64_t n, Norm norm));

ALRAO_DECLARE_KERNEL(void, gradient_clip_scale,
                     (void* grad, Dtype dtype, int64_t begin, int64_t n, double factor));

}  // namespace alrao::cpu
