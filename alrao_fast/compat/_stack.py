"""One tensor over the parameters of all last layers: `[N, *shape]`, its slices being the layers' own parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """A tensor [N, *shape] over the memory of N tensors that lie one after the other in one storage, else None.

    Nothing is copied: what is written to the result is written to the tensors.
    """
    first, last = tensors[0], tensors[-1]
    pitch = first.numel() * first.element_size()
    start, shape, dtype = first.data_ptr(), first.shape, first.dtype
    for k, tensor in enumerate(tensors):
        if tensor.data_ptr() != start + k * pitch or tensor.shape != shape:
            return None
        if tensor.dtype != dtype or not tensor.is_contiguous():
            return None
    # Evenly spaced pointers between two tensors of one storage all belong to it.
    if first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return None
    strides = (first.numel(), *first.stride())
    return first.detach().as_strided((len(tensors), *shape), strides, first.storage_offset())


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one [N, *shape]: without a copy where they already lie so."""
    view = stacked_view(tensors)
    return torch.stack([t.detach() for t in tensors]) if view is None else view


def lay_out(params: Sequence[Tensor]) -> Tensor | None:
    """`stacked_view(params)`, after moving the parameters into a common storage if they are not in one.

    Moving, copying or unpickling a model lays its parameters apart: they are brought together again here. The
    parameters stay the same objects. None where they differ in shape, dtype or device, are not all distinct, or would
    leave memory that processes share.
    """
    view = stacked_view(params)
    if view is not None:
        return view
    first = params[0]
    alike = all(
        (p.shape, p.dtype, p.device, p.layout)
        == (first.shape, first.dtype, first.device, torch.strided)
        for p in params
    )
    if not alike or len({id(p) for p in params}) < len(params) or not first.numel():
        return None
    if first.device.type == "cpu" and any(p.is_shared() for p in params):
        return None
    with torch.inference_mode(False):
        together = torch.stack([p.detach() for p in params])
    for param, slot in zip(params, together.unbind(0)):
        param.data = slot
    return stacked_view(params)


class ParameterStack:
    """`lay_out` for the same parameters again and again: a look at their addresses where nothing has moved."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._view: Tensor | None = None

    def __call__(self, params: Sequence[Tensor]) -> Tensor | None:
        # The view keeps its memory alive: nothing else can have these addresses.
        if self._view is None or [p.data_ptr() for p in params] != self._addresses:
            self._view = lay_out(params)
            self._addresses = [p.data_ptr() for p in params]
        return self._view
