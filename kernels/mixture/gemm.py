"""Matrix products around the mixture's kernels: torch's, summed in float32, and one that skips what is not finite.

A dead clone has zeros for its rows of the logits' gradient, but 0 * inf is NaN, so its weights must not enter the sum.
`safe_matmul` reads an entry that is not finite as 0. It serves small problems, where the launches count and not its
speed, and repairs the library's product otherwise: guarded by a flag on the device, it returns at once where all
was finite, and costs one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED_BF16, accumulator, launch, round_to, widen


@triton.jit
def multiply(a, b, TF32: tl.constexpr):
    """a @ b in float32."""
    if INTERPRETED_BF16:
        a = widen(a, tl.float32)
        b = widen(b, tl.float32)
    if TF32:
        return tl.dot(a, b, input_precision="tf32", out_dtype=tl.float32)
    else:
        return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def only_finite(value):
    """`value` with 0 for what is not finite."""
    return tl.where(tl.abs(widen(value, tl.float32)) < float("inf"), value, tl.zeros_like(value))


@triton.jit
def safe_matmul_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    sum_ptr,
    dead_ptr,
    flag_ptr,
    norm_ptr,
    num_rows,
    num_columns,
    depth,
    rows_per_clone,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    TF32: tl.constexpr,
    GUARDED: tl.constexpr,
    MASK_DEAD: tl.constexpr,
    SUM_A: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = a @ b with 0 for what is not finite in b; rows of dead clones 0; sum_ptr gets the row sums of a."""
    wanted = 1
    if GUARDED:
        wanted = tl.load(flag_ptr)
    if wanted != 0:
        block_m = tl.program_id(0)
        block_n = tl.program_id(1)
        rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = rows < num_rows
        mask_n = columns < num_columns
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        for k in range(0, depth, BLOCK_K):
            inner = k + tl.arange(0, BLOCK_K).to(tl.int64)
            mask_k = inner < depth
            a = tl.load(
                a_ptr + rows[:, None] * stride_am + inner[None, :] * stride_ak,
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + inner[:, None] * stride_bk + columns[None, :] * stride_bn,
                mask=mask_k[:, None] & mask_n[None, :],
                other=0.0,
            )
            b = only_finite(b)
            if SUM_A:
                row_sum += tl.sum(widen(a, tl.float32), 1)
            total += multiply(a, b, TF32)
        if SCALE:
            norm = tl.load(norm_ptr)
            total *= norm
            row_sum *= norm
        if MASK_DEAD:
            dead = tl.load(dead_ptr + rows // rows_per_clone, mask=mask_m, other=0) != 0
            total = tl.where(dead[:, None], 0.0, total)
            row_sum = tl.where(dead, 0.0, row_sum)
        tl.store(
            out_ptr + rows[:, None] * num_columns + columns[None, :],
            round_to(total, out_ptr.dtype.element_ty),
            mask=mask_m[:, None] & mask_n[None, :],
        )
        if SUM_A:
            if block_n == 0:
                tl.store(sum_ptr + rows, row_sum, mask=mask_m)


def tf32(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` may use TF32."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def safe_matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    flag: Tensor | None = None,
    norm: Tensor | None = None,
    dead: Tensor | None = None,
    rows_per_clone: int = 1,
    row_sum: Tensor | None = None,
) -> None:
    """out [M, N] = norm * a [M, K] @ b [K, N]; entries of b that are not finite count as 0.

    With `flag` only where it is not 0; `dead` zeroes the rows of dead clones; `row_sum [M]` gets norm * a.sum(1).
    """
    (num_rows, depth), num_columns = a.shape, b.size(1)
    if not out.numel() and (row_sum is None or not num_rows):
        return
    launch(
        safe_matmul_kernel,
        (triton.cdiv(num_rows, 32), max(triton.cdiv(num_columns, 32), 1)),
        a,
        b,
        out,
        out if row_sum is None else row_sum,
        a if dead is None else dead,
        a if flag is None else flag,
        a if norm is None else norm,
        num_rows,
        num_columns,
        depth,
        rows_per_clone,
        *a.stride(),
        *b.stride(),
        num_warps=4,
        num_stages=2,
        TF32=tf32(a.dtype),
        GUARDED=flag is not None,
        MASK_DEAD=dead is not None,
        SUM_A=row_sum is not None,
        SCALE=norm is not None,
        BLOCK_M=32,
        BLOCK_N=32,
        BLOCK_K=16,
    )


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b (out += with `add`) by the library, accumulated and returned in the dtype of `out`."""
    if a.dtype != out.dtype and not a.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def sum_rows(g: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out [R] = the sum of g [B, R] over samples (out += with `add`)."""
    if add:
        out.add_(g.sum(0, dtype=out.dtype))
    else:
        torch.sum(g, 0, dtype=out.dtype, out=out)


def finite(tensor: Tensor) -> Tensor:
    """A copy with 0 for what is not finite."""
    return torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)


def input_gradient(g: Tensor, weight: Tensor, flag: Tensor, out: Tensor) -> None:
    """out [B, D] = g [B, R] @ weight [R, D], whatever dead clones have in `weight` where `flag` says so."""
    if accumulator(g.dtype) == torch.float64:
        matmul(g, finite(weight), out)
    else:
        matmul(g, weight, out)
        safe_matmul(g, weight, out, flag=flag)


@triton.jit
def zero_dead_kernel(tensor_ptr, dead_ptr, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeroes tensor [N, size] for dead clones; returns at once for the living."""
    clone = tl.program_id(0).to(tl.int64)
    if tl.load(dead_ptr + clone) != 0:
        start = tl.program_id(1).to(tl.int64) * BLOCK
        for base in range(start, size, PARTS * BLOCK):
            offs = base + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK], tensor_ptr.dtype.element_ty)
            tl.store(tensor_ptr + clone * size + offs, zero, mask=offs < size)


def zero_dead(tensor: Tensor, dead: Tensor) -> None:
    """Zero `tensor[n]` for the dead clones."""
    if tensor.numel():
        size = tensor[0].numel()
        parts = min(triton.next_power_of_2(triton.cdiv(size, 4096)), 64)
        launch(
            zero_dead_kernel,
            (tensor.size(0), parts),
            tensor,
            dead,
            size,
            num_warps=4,
            PARTS=parts,
            BLOCK=1024,
        )


def settle(dweight: Tensor, dbias: Tensor, dead: Tensor, norm: Tensor | None) -> None:
    """What the library's products leave to do: the scale, and nothing for dead clones."""
    for tensor in (dweight, dbias):
        if norm is not None:
            tensor.mul_(norm)
        zero_dead(tensor, dead)
