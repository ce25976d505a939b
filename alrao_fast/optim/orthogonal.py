"""Orthogonalisation of many matrices at once by the iteration of Newton and Schulz, as in torch.optim.Muon.

Five steps of x = a x + b (x x^T) x + c (x x^T)^2 x from x / |x| (Frobenius) bring every singular value to 0.7 to 1.2
(K. Jordan and others, Muon: an optimizer for hidden layers in neural networks, 2024). Matrices of one shape, or of its
transpose, go through batched products together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
# From so many times as many columns as rows on, products of rows by rows are cheaper, where they are precise.
WIDE = 2
# The least norm that is brought to 1.
EPS = 1e-7


def scale_of(rows: int, columns: int, adjust_lr_fn: str) -> float:
    """What multiplies an orthogonal matrix: "original" keeps the size of rows, whatever the shape of a tall matrix;
    "match_rms_adamw" makes the root mean square of the entries 0.2."""
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def size_of_update(rows: int, columns: int, adjust_lr_fn: str) -> float:
    """The root mean square of the entries of what `scale_of` has scaled."""
    return scale_of(rows, columns, adjust_lr_fn) / math.sqrt(max(rows, columns))


class Scaled(NamedTuple):
    """Matrices [blocks, rows, columns], and what their orthogonal ones are to be multiplied by."""

    matrices: Tensor
    scale: float


def orthogonalized(given: Sequence[Scaled]) -> list[Tensor]:
    """For each entry the orthogonal matrices nearest to it, about, times its scale: [blocks, rows, columns].

    On a GPU in bfloat16, on a CPU, where that is slower, in float32, of float64 in float64.
    """
    batches: dict[tuple[int, int, float], list[int]] = {}
    for number, (matrices, scale) in enumerate(given):
        rows, columns = matrices.shape[1:]
        batches.setdefault((min(rows, columns), max(rows, columns), scale), []).append(number)
    found: list[Tensor] = [matrices for matrices, _ in given]
    for (short, _, scale), numbers in batches.items():
        wide = [found[n] if found[n].size(1) == short else found[n].mT for n in numbers]
        batch = wide[0] if len(wide) == 1 else torch.cat(wide)
        parts = _iterated(batch, scale).split([part.size(0) for part in wide])
        for n, part in zip(numbers, parts):
            found[n] = part if found[n].size(1) == short else part.mT
    return found


def _iterated(batch: Tensor, scale: float) -> Tensor:
    """Of matrices with at least as many columns as rows."""
    # The square of an entry of 2e19 is none of float32's.
    norms = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    x = batch / norms.to(batch.dtype).clamp(min=EPS)
    if x.dtype != torch.float64:
        x = x.to(torch.float32 if x.is_cpu else torch.bfloat16)
    if x.dtype != torch.bfloat16 and x.size(-1) >= WIDE * x.size(-2):
        return scale * _product(x @ x.mT) @ x
    for step in range(STEPS):
        factor = scale if step == STEPS - 1 else 1.0
        x = torch.baddbmm(x, _polynomial(x @ x.mT), x, beta=A * factor, alpha=factor)
    return x


def _polynomial(gram: Tensor) -> Tensor:
    return torch.baddbmm(gram, gram, gram, beta=B, alpha=C)


def _product(gram: Tensor) -> Tensor:
    """What the steps multiply a matrix by, all together, from x x^T alone: products of small matrices."""
    product = None
    for step in range(STEPS):
        factor = _polynomial(gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(A)
        product = factor if product is None else factor @ product
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product
