"""Which parameters are matrices of a hidden layer, and how their entries make them: one row per feature.

A layer's weight maps features to features: [out, in], a convolution's [out, in, h, w] flattened to [out, in * h * w],
an LSTM's one matrix per gate, fused experts' one per expert. Embeddings, and whatever scales or shifts, are none.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from torch import Tensor

from alrao_fast.optim.layouts import Layout
from alrao_fast.optim.library_layouts import TABLES

_EMBEDDING = re.compile(r"embed", re.IGNORECASE)


class Matrices(NamedTuple):
    """`blocks` matrices [rows, columns] of a parameter: its dimensions in this order, row by row."""

    order: tuple[int, ...]
    blocks: int
    rows: int
    columns: int

    def of(self, tensor: Tensor) -> Tensor:
        """The entries of the parameter, or of a tensor of its shape, as [blocks, rows, columns]."""
        return tensor.permute(self.order).reshape(self.blocks, self.rows, self.columns)

    def back(self, matrices: Tensor, param: Tensor) -> Tensor:
        """A view of the matrices in the parameter's shape."""
        sizes = [param.size(dim) for dim in self.order]
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return matrices.reshape(sizes).permute(places)


def matrices_of(param: Tensor, layout: Layout) -> Matrices | None:
    """The matrices of a parameter, by the dimension of its features; None where there are no rows or no columns."""
    dims, per_feature = layout.dims, not layout.per_weight
    if layout.per_weight:
        dims = (0,) if param.dim() else ()
    others = tuple(dim for dim in range(param.dim()) if dim not in dims)
    rows = math.prod(param.size(dim) for dim in dims)
    columns = math.prod(param.size(dim) for dim in others)
    blocks = 1
    if len(dims) == 2 and dims[0] == 0 and param.dim() == 3:
        # Experts, or heads.
        blocks = param.size(0)
    elif len(dims) == 1 and per_feature and layout.feature_of is None and layout.vector.length:
        # Gates: so many blocks of rows with the same features.
        blocks = rows // layout.vector.length
    rows //= max(blocks, 1)
    if rows < 2 or columns < 2:
        return None
    return Matrices((*dims, *others), blocks, rows, columns)


def is_hidden_matrix(param: Tensor, layout: Layout) -> bool:
    """Whether a parameter is a hidden layer's, as far as a rule of layouts says so."""
    if layout.vector.kind == "clone" or layout.rule not in ("built-in", "registered"):
        return False
    *_, last = layout.name.split(".")
    if _EMBEDDING.search(layout.module) or TABLES.fullmatch(last):
        return False
    if param.dim() > 2 and layout.dims == (0,) and param.size(1) == 1:
        # A filter for each channel: no two of them see the same.
        return False
    return matrices_of(param, layout) is not None
