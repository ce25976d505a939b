"""switch_mixture: loss and gradients of the mixture of clones in one pass (reference/switch_mixture.py).

With L = B N C logits, bounds on an H200 (4.3 TB/s; 790 TFLOP/s bfloat16, 400 TF32, 67 float32):

* tile (N C up to 4096, both padded to powers of two): the logits of all clones by one product, one kernel that reads
  them once (4 bytes a logit) and writes G and r G (2 to 8 bytes), two products. 6 L D flops: 4096 x 2048 features, 10 x
  200 classes in bfloat16: 127 us, the logits' traffic 19 us more, so 80 to 85 % of the flops' bound. Small problems (10
  x 10 classes, up to 512 samples) are bound by their 6 launches, 15 us.
* stream (larger): clone after clone, 5 or 6 launches each. 6 L D flops, 12 to 16 bytes a logit and 12 a sample, clone
  and feature: 4096 x 2048 features, 10 x 1000 classes in bfloat16: 637 us + 390 us; 8192 x 768 features, 6 x 50304
  classes: 14.4 ms + 8 ms, 65 % of the flops' bound.
* fused (larger, with few features): no logit is written, `switch_mixture_fused` has its bounds.

None holds more logits than the memory budget. Logits, their softmax and every sum are float32 (float64 for float64);
TF32 is used where torch.backends.cuda.matmul allows it. Sums have a fixed order; nothing waits for the device.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import accumulator, launch
from .fused import is_fused, mixture_fused
from .gemm import finite, input_gradient, matmul, safe_matmul, sum_rows, zero_dead
from .stream import combine_kernel, mixture_row_kernel
from .tile import mixture_tile_kernel

# The largest tile of [N, C], both padded to powers of two, that stays in registers.
TILE = 4096
# Multiplications of a product below which launches cost more than our own kernel's lower speed.
DIRECT = 1 << 26


class Inputs(NamedTuple):
    """Contiguous and checked; `x [B, D]`, `weight [N, C, D]`, `bias [N, C]` or None, `log_posterior [N]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    log_posterior: Tensor

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor) -> "Inputs":
        bias = None if bias is None else bias.contiguous()
        return cls(x.contiguous(), weight.contiguous(), bias, log_posterior.contiguous())

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, D, N, C)."""
        return (*self.x.shape, self.weight.size(0), self.weight.size(1))


def tile_of(num_clones: int, num_classes: int) -> tuple[int, int, int] | None:
    """(N_P, C_P, warps) of the tile kernels, or None where the clones are streamed."""
    n, c = triton.next_power_of_2(num_clones), max(triton.next_power_of_2(num_classes), 16)
    if n * c > TILE:
        return None
    return n, c, 1 if n * c <= 256 else 4 if n * c <= 2048 else 8


def row_block(num_classes: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK, warps) of the row kernels."""
    # Entries of a thread: as many as stay in its registers.
    largest, share = (1024, 256) if dtype == torch.float64 else (4096, 512)
    block = min(max(triton.next_power_of_2(num_classes), 128), largest)
    return block, max(block // share, 1)


def lowest(dtype: torch.dtype) -> float:
    return torch.finfo(accumulator(dtype)).min


def chunk_of(num_samples: int, bytes_per_sample: int, memory_budget: int) -> int:
    """Samples whose logits are held at a time."""
    return max(min(num_samples, memory_budget // max(bytes_per_sample, 1)), 1)


@triton.jit(do_not_specialize=["num_samples", "ignore_index"])
def prepare_kernel(
    target_ptr,
    norm_ptr,
    count_ptr,
    dead_ptr,
    num_samples,
    num_clones,
    ignore_index,
    MEAN: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    N_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the samples; clears the flags of dead clones, and that of anything not finite behind them."""
    n = tl.arange(0, N_P)
    tl.store(dead_ptr + n, tl.zeros([N_P], tl.int32), mask=n <= num_clones)
    if GAUSSIAN:
        count = tl.full([], num_samples, tl.int64)
    else:
        counts = tl.zeros([BLOCK], tl.int64)
        for base in range(0, num_samples, BLOCK):
            offs = base + tl.arange(0, BLOCK)
            mask = offs < num_samples
            target = tl.load(target_ptr + offs, mask=mask, other=ignore_index)
            counts += tl.where(mask & (target != ignore_index), 1, 0).to(tl.int64)
        count = tl.sum(counts, 0)
    tl.store(count_ptr, count.to(tl.float64))
    norm = tl.full([], 1.0, tl.float64)
    if MEAN:
        norm = 1.0 / tl.where(count > 0, count, 1).to(tl.float64)
    tl.store(norm_ptr, norm.to(norm_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_samples"])
def finish_kernel(
    nll_ptr,
    score_ptr,
    mix_ptr,
    count_ptr,
    loss_ptr,
    stats_ptr,
    num_samples,
    num_clones,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program n < N: the statistics of clone n; program N: the loss. Sums in float64."""
    clone = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr)
    lanes = tl.arange(0, BLOCK)
    if clone == num_clones:
        total = tl.zeros([BLOCK], tl.float64)
        for base in range(0, num_samples, BLOCK):
            offs = base + lanes
            total += tl.load(mix_ptr + offs, mask=offs < num_samples, other=0.0).to(tl.float64)
        loss = tl.sum(total, 0)
        if MEAN:
            loss = loss / tl.where(count > 0, count, 1.0)
        tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    else:
        nll = tl.zeros([BLOCK], tl.float64)
        score = tl.zeros([BLOCK], tl.float64)
        for base in range(0, num_samples, BLOCK):
            offs = base + lanes
            mask = offs < num_samples
            column = clone * num_samples + offs
            nll += tl.load(nll_ptr + column, mask=mask, other=0.0).to(tl.float64)
            score += tl.load(score_ptr + column, mask=mask, other=0.0).to(tl.float64)
        tl.store(stats_ptr + clone, tl.sum(nll, 0))
        tl.store(stats_ptr + num_clones + clone, tl.sum(score, 0))
        tl.store(stats_ptr + 2 * num_clones + clone, count)


class _Likelihood(NamedTuple):
    """What is mixed: categorical, or Gaussian with the given variance."""

    target: Tensor
    gaussian: bool
    ignore_index: int
    inv_sigma2: float
    log_normaliser: float


class _Work(NamedTuple):
    """Device memory of one call, `[B]` in the last dimension unless said otherwise."""

    norm: Tensor  # one element
    count: Tensor  # one element
    dead: Tensor  # [N + 1]: the clones, and whether anything was not finite
    nll: Tensor
    score: Tensor
    mix: Tensor


def _mixture(
    inputs: Inputs,
    kind: _Likelihood,
    mean: bool,
    need_dx: bool,
    need_dw: bool,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, weight, _, _ = inputs
    num_samples, _, num_clones, num_classes = inputs.sizes
    acc = accumulator(x.dtype)
    work = _Work(
        x.new_empty(1, dtype=acc),
        x.new_empty(1, dtype=torch.float64),
        x.new_empty(num_clones + 1, dtype=torch.int32),
        x.new_empty((num_clones, num_samples), dtype=acc),
        x.new_empty((num_clones, num_samples), dtype=acc),
        x.new_empty(num_samples, dtype=acc),
    )
    launch(
        prepare_kernel,
        (1,),
        kind.target,
        work.norm,
        work.count,
        work.dead,
        num_samples,
        num_clones,
        kind.ignore_index,
        num_warps=4,
        MEAN=mean,
        GAUSSIAN=kind.gaussian,
        N_P=triton.next_power_of_2(num_clones + 1),
        BLOCK=1024,
    )
    dx = x.new_empty(x.shape if need_dx else (0,), dtype=acc)
    dweight = x.new_empty(weight.shape if need_dw else (0,), dtype=acc)
    dbias = x.new_empty((num_clones, num_classes) if need_dw else (0,), dtype=acc)
    if num_samples == 0:
        dweight.zero_()
        dbias.zero_()
    else:
        run = _regime(inputs, kind)
        run(inputs, kind, work, dx, dweight, dbias, need_dx, need_dw, memory_budget)

    loss = x.new_empty((), dtype=acc)
    stats = x.new_empty((3, num_clones), dtype=torch.float64)
    launch(
        finish_kernel,
        (num_clones + 1,),
        work.nll,
        work.score,
        work.mix,
        work.count,
        loss,
        stats,
        num_samples,
        num_clones,
        num_warps=4,
        MEAN=mean,
        BLOCK=1024,
    )
    return loss, stats, dx, dweight, dbias


def _regime(inputs: Inputs, kind: _Likelihood) -> Callable[..., None]:
    _, num_features, num_clones, num_classes = inputs.sizes
    if tile_of(num_clones, num_classes) is not None:
        return _tile
    if not kind.gaussian and is_fused(inputs.x.dtype, num_features):
        return _fused
    return _stream


def _fused(inputs, kind, work, dx, dweight, dbias, need_dx, need_dw, memory_budget) -> None:
    mixture_fused(
        *inputs,
        kind.target,
        kind.ignore_index,
        work.norm,
        work.dead,
        work.nll,
        work.score,
        work.mix,
        dx if need_dx else None,
        dweight if need_dw else None,
        dbias if need_dw else None,
    )


def _folds(dtype: torch.dtype) -> bool:
    """Whether the logits' gradient carries the 1 / B; among the subnormals of float16 it would lose its digits."""
    return dtype != torch.float16


def _tile(inputs, kind, work, dx, dweight, dbias, need_dx, need_dw, memory_budget) -> None:
    x, weight, bias, log_posterior = inputs
    num_samples, num_features, num_clones, num_classes = inputs.sizes
    acc, rows = accumulator(x.dtype), num_clones * num_classes
    n, c, warps = tile_of(num_clones, num_classes)
    matrix = weight.view(rows, num_features)
    fold = _folds(x.dtype)
    norm = None if fold else work.norm
    held = rows * (acc.itemsize + x.element_size() * (need_dx + need_dw))
    chunk = chunk_of(num_samples, held, memory_budget)
    direct = (
        chunk >= num_samples
        and num_samples * rows * num_features <= DIRECT
        and acc == torch.float32
    )
    samples = x if direct or not need_dw else finite(x)
    flag = work.dead[num_clones:]
    for start in range(0, num_samples, chunk):
        part = slice(start, min(start + chunk, num_samples))
        z = x.new_empty((part.stop - start, rows), dtype=acc)
        matmul(x[part], matrix.t(), z)
        g = torch.empty_like(z, dtype=x.dtype) if need_dw else z
        rg = torch.empty_like(z, dtype=x.dtype) if need_dx else z
        launch(
            mixture_tile_kernel,
            (z.size(0),),
            z,
            z if bias is None else bias,
            log_posterior,
            kind.target,
            work.norm,
            g,
            rg,
            work.nll,
            work.score,
            work.mix,
            work.dead,
            start,
            num_samples,
            num_clones,
            num_classes,
            kind.ignore_index,
            kind.inv_sigma2,
            kind.log_normaliser,
            num_warps=warps,
            GAUSSIAN=kind.gaussian,
            HAS_BIAS=bias is not None,
            NEED_G=need_dw,
            NEED_RG=need_dx,
            FOLD=fold,
            N_P=n,
            C_P=c,
        )
        if direct:
            if need_dx:
                safe_matmul(rg, matrix, dx, norm=norm)
            if need_dw:
                safe_matmul(
                    g.t(),
                    x,
                    dweight.view(rows, num_features),
                    norm=norm,
                    dead=work.dead,
                    rows_per_clone=num_classes,
                    row_sum=dbias,
                )
            continue
        if need_dx:
            input_gradient(rg, matrix, flag, dx[part])
        if need_dw:
            matmul(g.t(), samples[part], dweight.view(rows, num_features), add=start > 0)
            sum_rows(g, dbias.view(-1), add=start > 0)
    if not direct:
        if norm is not None:
            dx.mul_(norm)
        _settle(work, (dweight, dbias), norm)


def _settle(work: _Work, own: tuple[Tensor, Tensor], norm: Tensor | None) -> None:
    """What the library's products leave to do for dweight and dbias: the scale, and nothing for dead clones."""
    for tensor in own:
        if norm is not None:
            tensor.mul_(norm)
        zero_dead(tensor, work.dead)


def _stream(inputs, kind, work, dx, dweight, dbias, need_dx, need_dw, memory_budget) -> None:
    x, weight, bias, log_posterior = inputs
    num_samples, num_features, num_clones, num_classes = inputs.sizes
    acc = accumulator(x.dtype)
    need_g = need_dx or need_dw
    in_place = x.dtype == acc
    held = num_classes * (acc.itemsize + (0 if in_place or not need_g else x.element_size()))
    chunk = chunk_of(num_samples, held, memory_budget)
    block, warps = row_block(num_classes, x.dtype)
    fold = _folds(x.dtype)
    samples = finite(x) if need_dw else x
    state = x.new_empty((4, num_samples), dtype=acc)
    total = x.new_empty((num_samples, num_features) if need_dx else (0,), dtype=acc)
    for clone in range(num_clones):
        for start in range(0, num_samples, chunk):
            part = slice(start, min(start + chunk, num_samples))
            z = x.new_empty((part.stop - start, num_classes), dtype=acc)
            matmul(x[part], weight[clone].t(), z)
            g = z if in_place or not need_g else torch.empty_like(z, dtype=x.dtype)
            launch(
                mixture_row_kernel,
                (z.size(0),),
                z,
                z if bias is None else bias,
                log_posterior,
                kind.target,
                work.norm,
                g,
                work.nll,
                work.score,
                work.mix,
                work.dead,
                state,
                clone,
                start,
                num_samples,
                num_classes,
                kind.ignore_index,
                kind.inv_sigma2,
                kind.log_normaliser,
                num_warps=warps,
                FIRST=clone == 0,
                GAUSSIAN=kind.gaussian,
                HAS_BIAS=bias is not None,
                NEED_G=need_g,
                FOLD=fold,
                LOWEST=lowest(x.dtype),
                BLOCK=block,
            )
            if need_dw:
                matmul(g.t(), samples[part], dweight[clone], add=start > 0)
                sum_rows(g, dbias[clone], add=start > 0)
            if need_dx:
                term = x.new_empty((part.stop - start, num_features), dtype=acc)
                matmul(g, weight[clone], term)
                combine(
                    term, total, dx, state, None if fold else work.norm, start, clone, num_clones
                )
    # The features' gradient was scaled when it was completed.
    _settle(work, (dweight, dbias), None if fold else work.norm)


def combine(
    term: Tensor,
    total: Tensor,
    out: Tensor,
    state: Tensor,
    norm: Tensor | None,
    start: int,
    clone: int,
    num_clones: int,
) -> None:
    """Take one clone's term [chunk, D] into the running sum [B, D]; the last clone completes `out [B, D]`."""
    num_samples, num_features = total.shape
    launch(
        combine_kernel,
        (term.size(0), max(triton.cdiv(num_features, 1024), 1)),
        term,
        total,
        out,
        state,
        state if norm is None else norm,
        start,
        num_samples,
        num_features,
        num_warps=4,
        FIRST=clone == 0,
        LAST=clone == num_clones - 1,
        SCALE=norm is not None,
        BLOCK=1024,
    )


def switch_mixture_nll(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    ignore_index: int,
    mean: bool,
    need_dx: bool,
    need_dw: bool,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op, on checked arguments."""
    kind = _Likelihood(target.contiguous(), False, ignore_index, 0.0, 0.0)
    inputs = Inputs.of(x, weight, bias, log_posterior)
    return _mixture(inputs, kind, mean, need_dx, need_dw, memory_budget)


def switch_mixture_gaussian_nll(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    sigma2: float,
    mean: bool,
    need_dx: bool,
    need_dw: bool,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op, on checked arguments."""
    log_normaliser = 0.5 * weight.size(1) * math.log(2 * math.pi * sigma2)
    kind = _Likelihood(target.contiguous(), True, 0, 1 / sigma2, log_normaliser)
    inputs = Inputs.of(x, weight, bias, log_posterior)
    return _mixture(inputs, kind, mean, need_dx, need_dw, memory_budget)
