"""Checks of single tensors; csrc/common/checks.cpp words them alike.

An op's checks stand twice. Those in Python serve the Triton kernels. A compiled implementation checks by itself: a
caller that was compiled reaches it through the dispatcher, with no Python in between.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
}
LOW_PRECISION = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *LOW_PRECISION)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


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
    check(
        tensor.dtype in dtypes,
        f"{name}: got dtype {dtype_name(tensor.dtype)}, expected {'one of ' if len(dtypes) > 1 else ''}"
        f"{', '.join(map(dtype_name, dtypes))}",
    )
    check(
        tensor.device == device,
        f"{name}: is on {tensor.device}, expected {device} as the others; move them to one device",
    )
