"""Kernels of the mixture's log-probabilities streamed over the clones (C large), and of their gradient."""

import triton
import triton.language as tl

from .options import cap_derivative
from .stream import load_block, row_statistics
from .tile import share_of


@triton.jit
def log_add(a, b):
    """log(e^a + e^b), -inf where both are."""
    high = tl.maximum(a, b)
    shift = tl.where(high > -float("inf"), high, 0.0)
    return shift + tl.log(tl.exp(a - shift) + tl.exp(b - shift))


@triton.jit(do_not_specialize=["clone", "first_sample", "num_clones"])
def log_prob_row_kernel(
    z_ptr,
    bias_ptr,
    log_posterior_ptr,
    out_ptr,
    mass_ptr,
    clone,
    first_sample,
    num_clones,
    num_classes,
    softcap: tl.float64,
    FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = log(exp(out) + exp(a_n + logp_n)) for one sample, mass = log(exp(mass) + exp(a_n)) if the clone is alive
    for it; the last clone's out is normalised by the mass. out holds the chunk, mass the batch."""
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    infinity = float("inf")
    sample = tl.program_id(0).to(tl.int64)
    z_ptr += sample * num_classes
    out_ptr += sample * num_classes
    mass_ptr += first_sample + sample
    bias_ptr += clone.to(tl.int64) * num_classes
    largest, _best, total, alive = row_statistics(
        z_ptr, bias_ptr, num_classes, softcap, HAS_BIAS, CAPPED, LOWEST, ACC, BLOCK
    )
    a = tl.where(alive, tl.load(log_posterior_ptr + clone).to(ACC), -infinity)
    mass = a
    if not FIRST:
        mass = log_add(tl.load(mass_ptr), a)
    tl.store(mass_ptr, mass)
    # Without any mass every class is at -inf already.
    norm = tl.where((clone == num_clones - 1) & (mass > -infinity), mass, 0.0)
    a -= tl.log(total)
    for base in range(0, num_classes, BLOCK):
        z, _, offs, mask = load_block(
            z_ptr, bias_ptr, base, num_classes, softcap, HAS_BIAS, CAPPED, ACC, BLOCK
        )
        # The largest is taken off before anything small is added: logits may be huge.
        value = a + (z - largest)
        if not FIRST:
            value = log_add(tl.load(out_ptr + offs, mask=mask, other=0.0), value)
        tl.store(out_ptr + offs, value - norm, mask=mask)


@triton.jit(do_not_specialize=["clone", "first_sample", "num_samples"])
def log_prob_backward_row_kernel(
    z_ptr,
    bias_ptr,
    log_posterior_ptr,
    out_ptr,
    mass_ptr,
    grad_ptr,
    state_ptr,
    clone,
    first_sample,
    num_samples,
    num_classes,
    softcap: tl.float64,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrites the logits of one sample of one clone by the gradient to them; state as `combine_kernel` reads it."""
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    infinity = float("inf")
    local = tl.program_id(0).to(tl.int64)
    sample = first_sample + local
    z_ptr += local * num_classes
    out_ptr += sample * num_classes
    grad_ptr += sample * num_classes
    bias_ptr += clone.to(tl.int64) * num_classes
    largest, _best, total, alive = row_statistics(
        z_ptr, bias_ptr, num_classes, softcap, HAS_BIAS, CAPPED, LOWEST, ACC, BLOCK
    )
    a = tl.load(log_posterior_ptr + clone).to(ACC) - tl.load(mass_ptr + sample) - tl.log(total)
    weighted_sum = tl.zeros([BLOCK], ACC)
    for base in range(0, num_classes, BLOCK):
        z, _, offs, mask = load_block(
            z_ptr, bias_ptr, base, num_classes, softcap, HAS_BIAS, CAPPED, ACC, BLOCK
        )
        out = tl.load(out_ptr + offs, mask=mask, other=-infinity)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0)
        share = share_of(a + (z - largest), tl.where(out > -infinity, out, 0.0))
        weighted_sum += tl.where(out > -infinity, share * grad, 0.0)
    row_sum = tl.sum(weighted_sum, 0)
    for base in range(0, num_classes, BLOCK):
        z, _, offs, mask = load_block(
            z_ptr, bias_ptr, base, num_classes, softcap, HAS_BIAS, CAPPED, ACC, BLOCK
        )
        out = tl.load(out_ptr + offs, mask=mask, other=-infinity)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0)
        # Where a class has no probability the gradient is cut, as is the way to a dead clone.
        share = share_of(a + (z - largest), tl.where(out > -infinity, out, 0.0))
        dz = tl.where(out > -infinity, share * grad, 0.0) - tl.exp(z - largest) / total * row_sum
        if CAPPED:
            dz *= cap_derivative(z, softcap, ACC)
        tl.store(z_ptr + offs, tl.where(alive, dz, 0.0), mask=mask)
    one = tl.full([], 1.0, ACC)
    tl.store(state_ptr + num_samples + sample, one)
    tl.store(state_ptr + 2 * num_samples + sample, one)
    tl.store(state_ptr + 3 * num_samples + sample, tl.where(alive, one, 0.0))
