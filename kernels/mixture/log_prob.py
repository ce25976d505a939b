"""switch_mixture_log_prob: log-probabilities of the mixture, and the backward (reference/switch_mixture.py).

Forward 2 B N C D flops, backward 6 (it makes the logits again); regimes, memory and accuracy as in `switch_mixture`.
The backward multiplies in float32 at least: its sums over classes cancel.
"""

import torch
from torch import Tensor

from ..launch import accumulator, launch
from .gemm import finite, input_gradient, matmul
from .loss import Inputs, chunk_of, combine, lowest, row_block, tile_of
from .stream import log_prob_backward_row_kernel, log_prob_row_kernel
from .tile import log_prob_backward_tile_kernel, log_prob_tile_kernel


def switch_mixture_log_prob(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor, memory_budget: int
) -> Tensor:
    """The op, on checked arguments."""
    inputs = Inputs.of(x, weight, bias, log_posterior)
    x, weight, bias, log_posterior = inputs
    num_samples, num_features, num_clones, num_classes = inputs.sizes
    acc = accumulator(x.dtype)
    out = x.new_empty((num_samples, num_classes), dtype=acc)
    tile = tile_of(num_clones, num_classes)
    rows = num_classes if tile is None else num_clones * num_classes
    chunk = chunk_of(num_samples, rows * acc.itemsize, memory_budget)
    block, warps = row_block(num_classes, x.dtype)
    for start in range(0, num_samples, chunk):
        part = slice(start, min(start + chunk, num_samples))
        if tile is not None:
            z = x.new_empty((part.stop - start, rows), dtype=acc)
            matmul(x[part], weight.view(rows, num_features).t(), z)
            launch(
                log_prob_tile_kernel,
                (z.size(0),),
                z,
                z if bias is None else bias,
                log_posterior,
                out[part],
                num_clones,
                num_classes,
                num_warps=tile[2],
                HAS_BIAS=bias is not None,
                N_P=tile[0],
                C_P=tile[1],
            )
            continue
        for clone in range(num_clones):
            z = x.new_empty((part.stop - start, num_classes), dtype=acc)
            matmul(x[part], weight[clone].t(), z)
            launch(
                log_prob_row_kernel,
                (z.size(0),),
                z,
                z if bias is None else bias,
                log_posterior,
                out[part],
                clone,
                num_classes,
                num_warps=warps,
                FIRST=clone == 0,
                HAS_BIAS=bias is not None,
                LOWEST=lowest(x.dtype),
                BLOCK=block,
            )
    return out


def switch_mixture_log_prob_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    log_prob: Tensor,
    need_dx: bool,
    need_dw: bool,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, on checked arguments."""
    inputs = Inputs.of(x, weight, bias, log_posterior)
    x, weight, bias, _ = inputs
    num_samples, _, num_clones, num_classes = inputs.sizes
    acc = accumulator(x.dtype)
    dx = x.new_empty(x.shape if need_dx else (0,), dtype=acc)
    dweight = x.new_zeros(weight.shape if need_dw else (0,), dtype=acc)
    dbias = x.new_zeros((num_clones, num_classes) if need_dw else (0,), dtype=acc)
    if num_samples and (need_dx or need_dw):
        run = _backward_stream if tile_of(num_clones, num_classes) is None else _backward_tile
        run(
            inputs, grad.contiguous(), log_prob, dx, dweight, dbias, need_dx, need_dw, memory_budget
        )
    return dx, dweight, dbias


def _backward_tile(
    inputs, grad, log_prob, dx, dweight, dbias, need_dx, need_dw, memory_budget
) -> None:
    x, weight, bias, log_posterior = inputs
    num_samples, num_features, num_clones, num_classes = inputs.sizes
    acc, rows = accumulator(x.dtype), num_clones * num_classes
    n, c, warps = tile_of(num_clones, num_classes)
    matrix = weight.view(rows, num_features)
    wide = matrix.to(acc)
    samples = finite(x.to(acc)) if need_dw else x
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    chunk = chunk_of(num_samples, rows * acc.itemsize, memory_budget)
    for start in range(0, num_samples, chunk):
        part = slice(start, min(start + chunk, num_samples))
        z = x.new_empty((part.stop - start, rows), dtype=acc)
        matmul(x[part], matrix.t(), z)
        launch(
            log_prob_backward_tile_kernel,
            (z.size(0),),
            z,
            z if bias is None else bias,
            log_posterior,
            log_prob[part],
            grad[part],
            flag,
            num_clones,
            num_classes,
            num_warps=warps,
            HAS_BIAS=bias is not None,
            N_P=n,
            C_P=c,
        )
        if need_dx:
            input_gradient(z, wide, flag, dx[part])
        if need_dw:
            dweight.view(rows, -1).addmm_(z.t(), samples[part])
            dbias.view(-1).add_(z.sum(0))


def _backward_stream(
    inputs, grad, log_prob, dx, dweight, dbias, need_dx, need_dw, memory_budget
) -> None:
    x, weight, bias, log_posterior = inputs
    num_samples, num_features, num_clones, num_classes = inputs.sizes
    acc = accumulator(x.dtype)
    block, warps = row_block(num_classes, x.dtype)
    samples = finite(x.to(acc)) if need_dw else x
    state = x.new_empty((4, num_samples), dtype=acc)
    total = x.new_empty((num_samples, num_features) if need_dx else (0,), dtype=acc)
    chunk = chunk_of(num_samples, num_classes * acc.itemsize, memory_budget)
    for clone in range(num_clones):
        wide = weight[clone].to(acc)
        for start in range(0, num_samples, chunk):
            part = slice(start, min(start + chunk, num_samples))
            z = x.new_empty((part.stop - start, num_classes), dtype=acc)
            matmul(x[part], weight[clone].t(), z)
            launch(
                log_prob_backward_row_kernel,
                (z.size(0),),
                z,
                z if bias is None else bias,
                log_posterior,
                log_prob,
                grad,
                state,
                clone,
                start,
                num_samples,
                num_classes,
                num_warps=warps,
                HAS_BIAS=bias is not None,
                LOWEST=lowest(x.dtype),
                BLOCK=block,
            )
            if need_dw:
                dweight[clone].addmm_(z.t(), samples[part])
                dbias[clone].add_(z.sum(0))
            if need_dx:
                combine(torch.mm(z, wide), total, dx, state, None, start, clone, num_clones)
