"""switch_mixture_log_prob: log-probabilities of the mixture, and the backward (reference/switch_mixture.py).

Forward 2 B N C D flops, backward 6 (it makes the logits again); regimes, memory and accuracy as in `switch_mixture`.
The backward multiplies in float32 at least: its sums over classes cancel.
"""

import torch
from torch import Tensor

from ..launch import launch
from .gemm import finite, input_gradient
from .log_prob_stream import log_prob_backward_row_kernel, log_prob_row_kernel
from .problem import Inputs, lowest, row_block, tile_of
from .stream import combine
from .tile import log_prob_tile_kernel


def _chunks(inputs: Inputs, memory_budget: int) -> list[slice]:
    _, _, num_clones, num_classes = inputs.sizes
    rows = num_classes if tile_of(num_clones, num_classes) is None else num_clones * num_classes
    return inputs.chunks(rows * inputs.dtype.itemsize, memory_budget)


def _tile(
    inputs: Inputs,
    part: slice,
    out: Tensor,
    mass: Tensor,
    grad: Tensor | None = None,
    flag: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """All clones of some samples; returns their logits, or with `grad` the gradient to them."""
    _, _, num_clones, num_classes = inputs.sizes
    n, c, warps = tile_of(num_clones, num_classes)
    z, *others = inputs.logits(part)
    launch(
        log_prob_tile_kernel,
        (z.size(0),),
        z,
        *others,
        out[part],
        mass[part],
        out if grad is None else grad[part],
        z if flag is None else flag,
        num_clones,
        num_classes,
        num_warps=warps,
        softcap=softcap,
        BACKWARD=grad is not None,
        HAS_BIAS=inputs.bias is not None,
        CAPPED=softcap != 0,
        N_P=n,
        C_P=c,
    )
    return z


def switch_mixture_log_prob(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    memory_budget: int,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The op, on checked arguments."""
    inputs = Inputs.of(x, weight, bias, log_posterior)
    num_samples, _, num_clones, num_classes = inputs.sizes
    out = x.new_empty((num_samples, num_classes), dtype=inputs.dtype)
    mass = out.new_empty(num_samples)
    block, warps = row_block(num_classes, x.dtype)
    for part in _chunks(inputs, memory_budget):
        if tile_of(num_clones, num_classes) is not None:
            _tile(inputs, part, out, mass, softcap=softcap)
        else:
            for clone in range(num_clones):
                launch(
                    log_prob_row_kernel,
                    (part.stop - part.start,),
                    *inputs.logits(part, clone),
                    out[part],
                    mass,
                    clone,
                    part.start,
                    num_clones,
                    num_classes,
                    num_warps=warps,
                    softcap=softcap,
                    FIRST=clone == 0,
                    HAS_BIAS=bias is not None,
                    CAPPED=softcap != 0,
                    LOWEST=lowest(x.dtype),
                    BLOCK=block,
                )
    return out, mass


def switch_mixture_log_prob_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    log_prob: Tensor,
    log_mass: Tensor,
    need_dx: bool,
    need_dw: bool,
    memory_budget: int,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, on checked arguments."""
    inputs = Inputs.of(x, weight, bias, log_posterior)
    num_samples, _, num_clones, num_classes = inputs.sizes
    acc = inputs.dtype
    dx = x.new_empty(x.shape if need_dx else (0,), dtype=acc)
    dweight = x.new_zeros(weight.shape if need_dw else (0,), dtype=acc)
    dbias = x.new_zeros((num_clones, num_classes) if need_dw else (0,), dtype=acc)
    if num_samples and (need_dx or need_dw):
        samples = finite(inputs.x.to(acc)) if need_dw else x
        run = _backward_stream if tile_of(num_clones, num_classes) is None else _backward_tile
        gradients = dx if need_dx else None, dweight if need_dw else None, dbias
        chunks = _chunks(inputs, memory_budget)
        given = grad.contiguous(), log_prob.contiguous(), log_mass.contiguous()
        run(inputs, samples, chunks, *given, *gradients, softcap)
    return dx, dweight, dbias


def _backward_tile(
    inputs, samples, chunks, grad, log_prob, log_mass, dx, dweight, dbias, softcap
) -> None:
    wide = inputs.matrix.to(inputs.dtype)
    flag = torch.zeros(1, dtype=torch.int32, device=samples.device)
    for part in chunks:
        z = _tile(inputs, part, log_prob, log_mass, grad, flag, softcap)
        if dx is not None:
            input_gradient(z, wide, flag, dx[part])
        if dweight is not None:
            dweight.view(-1, dweight.size(2)).addmm_(z.t(), samples[part])
            dbias.view(-1).add_(z.sum(0))


def _backward_stream(
    inputs, samples, chunks, grad, log_prob, log_mass, dx, dweight, dbias, softcap
) -> None:
    num_samples, _, num_clones, num_classes = inputs.sizes
    block, warps = row_block(num_classes, inputs.x.dtype)
    state = grad.new_empty((4, num_samples))
    total = None if dx is None else torch.empty_like(dx)
    for clone in range(num_clones):
        wide = inputs.weight[clone].to(inputs.dtype)
        for part in chunks:
            z, *others = inputs.logits(part, clone)
            launch(
                log_prob_backward_row_kernel,
                (z.size(0),),
                z,
                *others,
                log_prob,
                log_mass,
                grad,
                state,
                clone,
                part.start,
                num_samples,
                num_classes,
                num_warps=warps,
                softcap=softcap,
                HAS_BIAS=inputs.bias is not None,
                CAPPED=softcap != 0,
                LOWEST=lowest(inputs.x.dtype),
                BLOCK=block,
            )
            if dweight is not None:
                dweight[clone].addmm_(z.t(), samples[part])
                dbias[clone].add_(z.sum(0))
            if dx is not None:
                combine(torch.mm(z, wide), total, dx, state, None, part.start, clone, num_clones)
