"""Checks of single tensors; csrc/common/checks.cpp words them alike.

An op's checks stand twice. Those in Python serve the Triton kernels. A compiled implementation checks by itself: a
caller that was compiled reaches it through the dispatcher, with no Python in between.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alrao_fast.arguments import shown
from alrao_fast.sharding import PLAIN, is_sharded
from alrao_fast.tracing import hint

_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}
LOW_PRECISION = (torch.bfloat16, torch.float16)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_together(optional: str = "", /, **tensors: Any) -> None:
    """TypeError for an argument that is no tensor (`optional` names one that may be None), RuntimeError for one that is
    sparse, sharded or not on the device of the first.

    It stands before every implementation: one on meta would make the dispatcher call the op's fake, which does nothing.
    """
    device = None
    for name, tensor in tensors.items():
        # This runs in every training step: an ordinary tensor is asked for its layout and device alone.
        is_plain = type(tensor) in PLAIN
        if not is_plain and not isinstance(tensor, Tensor):
            if tensor is None and name == optional:
                continue
            raise TypeError(f"{name}: got {shown(tensor)}, expected a tensor{hint(tensor)}")
        if tensor.layout is not torch.strided:
            raise RuntimeError(
                f"{name}: got layout {tensor.layout}, expected an ordinary (strided) tensor: use {name}.to_dense()"
            )
        if not is_plain and is_sharded(tensor):
            raise RuntimeError(
                f"{name}: got a DTensor, of which a part is here, expected the whole: under fully_shard call the "
                "module itself that was sharded (the head, not a layer that holds it), or a method that "
                "torch.distributed.fsdp.register_fsdp_forward_method has registered; in tensor parallelism leave the "
                "head out of parallelize_module"
            )
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise RuntimeError(
                f"{name}: is on {tensor.device}, expected {device}, as {first}; move them to one device"
            )


def dtype_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Raise RuntimeError unless `tensor` has that shape, one of the dtypes, and is on `device`."""
    check(
        list(tensor.shape) == list(shape),
        f"{name}: got shape {list(tensor.shape)}, expected {list(shape)}",
    )
    check_dtype(name, tensor, dtypes)
    check(
        tensor.device == device,
        f"{name}: is on {tensor.device}, expected {device} as the others; move them to one device",
    )


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise RuntimeError unless `tensor` has one of the dtypes."""
    if tensor.dtype not in dtypes:
        one = "one of " if len(dtypes) > 1 else ""
        raise RuntimeError(
            f"{name}: got dtype {dtype_name(tensor.dtype)}, expected {one}{', '.join(map(dtype_name, dtypes))}"
        )
