"""Which parameters are matrices of a hidden layer, and how their entries make them: one row per feature.

A layer's weight maps features to features: [out, in], a convolution's [out, in, h, w] flattened to [out, in * h * w], a
transposed one's [in, out / groups, h, w] to [out, in / groups * h * w], an LSTM's one matrix per gate, fused experts'
one per expert. Embeddings, shared with an output layer or not, and whatever scales or shifts, are none.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from alrao_fast.optim.layouts import Layout
from alrao_fast.optim.library_layouts import TABLES

_EMBEDDING = re.compile(r"embed", re.IGNORECASE)


class Matrices(NamedTuple):
    """`blocks` matrices [rows, columns] of a parameter, row by row: its dimensions in this order, of which the first
    counts as two, [groups, size / groups]."""

    order: tuple[int, ...]
    groups: int
    blocks: int
    rows: int
    columns: int

    def of(self, tensor: Tensor) -> Tensor:
        """The entries of the parameter, or of a tensor of its shape, as [blocks, rows, columns]."""
        parts = tensor.unflatten(0, (self.groups, -1))
        return parts.permute(self.order).reshape(self.blocks, self.rows, self.columns)

    def back(self, matrices: Tensor, param: Tensor) -> Tensor:
        """The matrices in the parameter's shape, a view but for more groups than one."""
        shape = self.groups, param.size(0) // self.groups, *param.shape[1:]
        sizes = [shape[dim] for dim in self.order]
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return matrices.reshape(sizes).permute(places).flatten(0, 1)


def matrices_of(param: Tensor, layout: Layout) -> Matrices | None:
    """The matrices of a parameter, by the dimension of its features, whether or not these have a rate per entry; None
    where there are no rows or no columns."""
    layout = layout.by_feature or layout
    dims = layout.dims
    others = tuple(dim for dim in range(param.dim()) if dim not in dims)
    rows = math.prod(param.size(dim) for dim in dims)
    columns = math.prod(param.size(dim) for dim in others)
    groups = blocks = 1
    # Of the parts [groups, size / groups] of dimension 0, and all others.
    order = (0, *(dim + 1 for dim in (*dims, *others)))
    if len(dims) == 2 and layout.feature_of is not None:
        groups = _groups(param, layout)
        if not groups:
            return None
        # [I, O / groups, ...]: a row has the inputs of its group.
        rows, columns = layout.vector.length, param.numel() // layout.vector.length
        order = (0, 2, 1, *range(3, param.dim() + 1))
    elif len(dims) == 2 and dims[0] == 0 and param.dim() == 3:
        # Experts, or heads.
        blocks = param.size(0)
    elif len(dims) == 1 and layout.feature_of is None and layout.vector.length:
        # Gates: so many blocks of rows with the same features.
        blocks = rows // layout.vector.length
    rows //= max(blocks, 1)
    if rows < 2 or columns < 2:
        return None
    return Matrices(order, groups, blocks, rows, columns)


def _groups(param: Tensor, layout: Layout) -> int:
    """The groups of a transposed convolution's weight [I, O / groups, ...]; 0 where the features are others."""
    features, inputs, each = layout.vector.length, param.size(0), param.size(1)
    groups = features // each if each else 0
    if layout.dims != (0, 1) or not groups or features % each or inputs % groups:
        return 0
    index = torch.arange(features, device="cpu").view(groups, 1, each)
    usual = index.expand(groups, inputs // groups, each).flatten()
    assert layout.feature_of is not None
    return groups if torch.equal(layout.feature_of.cpu(), usual) else 0


def is_hidden_matrix(param: Tensor, layout: Layout) -> bool:
    """Whether a parameter is a hidden layer's, as far as a rule of layouts says so."""
    layout = layout.by_feature or layout
    if layout.vector.kind == "clone" or layout.rule not in ("built-in", "registered"):
        return False
    *_, last = layout.name.split(".")
    if any(map(_EMBEDDING.search, (layout.module, *layout.sharing))) or TABLES.fullmatch(last):
        return False
    shape = matrices_of(param, layout)
    if shape is None:
        return False
    if param.dim() > 2 and (layout.dims in ((0,), (1,)) or shape.groups > 1):
        # A convolution with one input channel: a filter for each channel, no two of which see the same.
        inputs = param.size(1) if layout.dims == (0,) else param.size(0) // shape.groups
        return inputs > 1
    return True
