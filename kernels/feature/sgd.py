"""feature_sgd_: SGD with one learning rate per feature (reference/feature_sgd.py).

An entry moves 12 bytes in float32 without momentum, 20 with it; 6 and 10 in bfloat16 and float16.
"""

import triton
import triton.language as tl

from .frame import Update
from .multi_tensor import root


@triton.jit
def prepare(step, momentum, keep_gradient, weight_decay, n3, n4, n5, n6, n7, ACC: tl.constexpr):
    return (
        step == 0,
        tl.full([], momentum, ACC),
        tl.full([], keep_gradient, ACC),
        tl.full([], weight_decay, ACC),
    )


@triton.jit
def update(
    p,
    g,
    buf,
    unused2,
    unused3,
    rate,
    ready,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    AUTHORS: tl.constexpr,
):
    first, momentum, keep_gradient, weight_decay = ready
    # Left out where it is 0: 0 * inf would be NaN.
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    d = g
    if HAS_MOMENTUM:
        if AUTHORS:
            decay = 1 - momentum * tl.minimum(root(rate), 1 / momentum)
        else:
            decay = momentum
        buf = tl.where(first, g, decay * buf + keep_gradient * g)
        if NESTEROV:
            d = g + momentum * buf
        else:
            d = buf
    return p - rate * d, buf, unused2, unused3


UPDATE = Update(
    prepare,
    update,
    numbers=lambda o: (o["momentum"], 1.0 - o["dampening"], o["weight_decay"]),
    flags=lambda o: (o["momentum"] != 0, o["nesterov"], o["authors_momentum"]),
)
