"""feature_adam_: Adam and AdamW with one learning rate per feature (reference/feature_adam.py).

An entry moves 28 bytes in float32, 14 in bfloat16 and float16; 36 and 18 with amsgrad. The bias corrections are two
float64 exponentials a program, once a chunk.
"""

import math

import triton
import triton.language as tl

from .frame import Update
from .multi_tensor import quotient, root


@triton.jit
def prepare(
    step, beta1, rest1, beta2, rest2, eps, weight_decay, log_beta1, log_beta2, ACC: tl.constexpr
):
    # In another order some kernels have two registers more.
    beta1 = tl.full([], beta1, ACC)
    rest1 = tl.full([], rest1, ACC)
    beta2 = tl.full([], beta2, ACC)
    rest2 = tl.full([], rest2, ACC)
    eps = tl.full([], eps, ACC)
    weight_decay = tl.full([], weight_decay, ACC)
    # 1 - beta^(step + 1) in float64: beta is close to 1.
    updates = (step + 1).to(tl.float64)
    correction1 = (1 - tl.exp(tl.full([], log_beta1, tl.float64) * updates)).to(ACC)
    correction2 = 1 - tl.exp(tl.full([], log_beta2, tl.float64) * updates)
    root_correction2 = tl.sqrt(correction2).to(ACC)
    return beta1, rest1, correction1, beta2, rest2, root_correction2, eps, weight_decay


@triton.jit
def update(
    p,
    g,
    m,
    v,
    v_max,
    rate,
    ready,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AUTHORS: tl.constexpr,
):
    beta1, rest1, correction1, beta2, rest2, root_correction2, eps, weight_decay = ready
    if DECOUPLED:
        p = p * tl.maximum(1 - rate * weight_decay, 0)
    else:
        # Left out where it is 0: 0 * inf would be NaN.
        g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    second = v
    if AMSGRAD:
        # Spelt out so that NaN in either operand stays.
        v_max = tl.where((v > v_max) | (v != v), v, v_max)
        second = v_max
    if AUTHORS:
        change = quotient(quotient(root_correction2, correction1) * m, root(second) + eps)
    else:
        change = quotient(quotient(m, correction1), quotient(root(second), root_correction2) + eps)
    return p - rate * change, m, v, v_max


def _numbers(o):
    beta1, beta2 = o["beta1"], o["beta2"]
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    return beta1, 1.0 - beta1, beta2, 1.0 - beta2, o["eps"], o["weight_decay"], *logs


UPDATE = Update(
    prepare,
    update,
    numbers=_numbers,
    flags=lambda o: (o["amsgrad"], o["decoupled"], o["authors_eps"]),
)
