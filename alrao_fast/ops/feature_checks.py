"""Checks of the feature optimizers' arguments, for implementations in Python.

csrc/feature/multi_tensor.cpp words them alike for the compiled ones, which are called without Python in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast.arguments import FLOATS, Integer, shown
from alrao_fast.ops.checks import LOW_PRECISION

if TYPE_CHECKING:
    from alrao_fast.ops.feature import Lists


_INTEGER = Integer()
# What is expected of a parameter or state, and of a gradient, in place of a sparse tensor.
_DENSE = (
    " or of another layout, expected an ordinary strided tensor",
    ", expected an ordinary (dense) gradient: sparse=False in the embedding, or grad.to_dense()",
)


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Size and stride of each dimension; the stride of a dimension of size 1 has no meaning."""
    return [(n, s if n > 1 else 0) for n, s in zip(tensor.shape, tensor.stride(), strict=True)]


def is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((s, n) for n, s in _layout(tensor) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _text(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)} with strides {list(tensor.stride())}"


def as_list(
    op: str, name: str, values: Any, *, optional: bool = False, integers: bool = False
) -> list[Any]:
    """A public function's argument as a list; `optional`: empty for None, `integers`: of these, not of tensors.

    TypeError for what is no list, or for an entry of another type, naming it; RuntimeError for a tensor that is sparse
    or on meta.
    """
    if values is None and optional:
        return []
    if not isinstance(values, (list, tuple)) and (
        isinstance(values, (Tensor, str, bytes, Mapping)) or not isinstance(values, Iterable)
    ):
        what = "integers" if integers else "tensors"
        raise TypeError(
            f"{op}: {name}: got {shown(values)}, expected a list of {what}, one for each of params"
        )
    entries = list(values)
    for t, entry in enumerate(entries):
        if integers:
            entries[t] = _INTEGER.check(f"{op}: {name}[{t}]", entry)
        else:
            check_entry(op, f"{name}[{t}]", entry)
    return entries


def check_entry(op: str, name: str, tensor: Any) -> None:
    """Raise TypeError or RuntimeError unless `tensor` is an ordinary one, with data."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: got {shown(tensor)}, expected a tensor")
    if tensor.is_meta:
        raise RuntimeError(f"{op}: {name} is on meta, expected a tensor with data")
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"{op}: {name} is sparse{_DENSE[name.startswith('grads')]}")


class State(NamedTuple):
    """A list of states; for one that may be left out, whether it is needed and the option that decides it."""

    tensors: Sequence[Tensor]
    needed: tuple[bool, str] | None = None


def check_inputs(
    op: str,
    lists: Lists,
    grads: Sequence[Tensor],
    states: Mapping[str, State],
    scalars: Mapping[str, Tensor | None],
) -> None:
    """Raise RuntimeError, naming the argument, what it is and what is expected, unless all tensors fit together."""
    params, _, masters, rates, inners, seeds, steps, averages = lists

    def check(condition: bool, message: str) -> None:
        if not condition:
            raise RuntimeError(f"{op}: {message}")

    count = len(params)
    for name, (given, need) in states.items():
        if need is not None:
            needed, because = need
            check(
                bool(given) == needed,
                f"{name} is empty, expected one for each of params because {because}"
                if needed
                else f"{name} has entries, expected an empty list because {because}",
            )
    present = {
        name: state.tensors
        for name, state in states.items()
        if state.tensors or state.needed is None
    }
    required: dict[str, Sequence[object]] = {
        "grads": grads,
        **present,
        "rates": rates,
        "inners": inners,
    }
    for name, values in (
        required | {"masters": masters, "averages": averages, "seeds": seeds}
    ).items():
        optional = name not in required
        check(
            len(values) == count or (optional and not values),
            f"{name} has {len(values)} entries, expected {count}, one for each of params"
            + (", or none" if optional else ""),
        )
    check(
        steps.dtype == torch.int64 and steps.is_contiguous() and steps.numel() == count,
        f"steps has dtype {_name(steps)} and {_text(steps)}, expected a contiguous int64 tensor with {count} entries, "
        "one for each of params",
    )

    for name, scalar in scalars.items():
        if scalar is not None:
            check(
                scalar.dtype in (torch.float32, torch.float64) and scalar.numel() == 1,
                f"{name} has dtype {_name(scalar)} and {scalar.numel()} elements, expected one float32 or float64 "
                "element on the parameters' device",
            )

    for t, param in enumerate(params):
        tensors = {f"{name}[{t}]": values[t] for name, values in present.items()}
        if masters and masters[t].numel():
            tensors[f"masters[{t}]"] = masters[t]
        if averages and averages[t].numel():
            tensors[f"averages[{t}]"] = averages[t]
        for name, tensor in {f"params[{t}]": param, **tensors, f"rates[{t}]": rates[t]}.items():
            check(
                tensor.layout == torch.strided,
                f"{name} is sparse{_DENSE[0]}",
            )
            check(
                tensor.device == params[0].device,
                f"{name} is on another device than params[0], expected all tensors on one device",
            )
        check(
            param.dtype in FLOATS,
            f"params[{t}] has an unsupported dtype, expected float64, float32, bfloat16 or float16",
        )
        check(
            param.numel() == 0 or is_dense(param),
            f"params[{t}] has {_text(param)}, expected a dense tensor without overlap or gaps: use a copy made by "
            ".contiguous()",
        )
        for name, tensor in tensors.items():
            check(
                _layout(tensor) == _layout(param),
                f"{name} has {_text(tensor)}, expected those of params[{t}], {_text(param)}: make it by "
                "torch.empty_like or zeros_like",
            )
            if name.startswith("masters"):
                check(
                    param.dtype in LOW_PRECISION and tensor.dtype == torch.float32,
                    f"{name} has dtype {_name(tensor)} for a {_name(param)} parameter, expected float32 for a "
                    "bfloat16 or float16 parameter, else an empty tensor",
                )
            elif name.startswith("averages"):
                wide = "float64" if param.dtype is torch.float64 else "float32"
                check(
                    _name(tensor) == wide,
                    f"{name} has dtype {_name(tensor)} for a {_name(param)} parameter, expected {wide}",
                )
            else:
                check(
                    tensor.dtype in (param.dtype, torch.float32),
                    f"{name} has dtype {_name(tensor)}, expected {_name(param)} as params[{t}], or float32",
                )

        rate, inner, numel = rates[t], inners[t], param.numel()
        double = param.dtype == torch.float64
        check(
            rate.dtype == torch.float32 or (double and rate.dtype == torch.float64),
            f"rates[{t}] has dtype {_name(rate)}, expected float32{' or float64' if double else ''}",
        )
        check(
            rate.dim() == 1 and rate.is_contiguous(),
            f"rates[{t}] has {_text(rate)}, expected a contiguous vector, one rate per feature",
        )
        check(inner >= 1, f"inners[{t}] is {inner}, expected at least 1")
        period = rate.numel()
        check(
            numel == 0 or period == 1 or (period > 0 and numel % (inner * period) == 0),
            f"rates[{t}] has {period} entries and inners[{t}] is {inner}, which does not divide params[{t}] of {numel} "
            f"elements, {_text(param)}: expected rates with as many entries as the parameter has features, and inner "
            "the stride of their dimension",
        )

        grad = grads[t]
        check(
            grad.layout == torch.strided,
            f"grads[{t}] is sparse{_DENSE[1]}",
        )
        check(
            grad.device == param.device,
            f"grads[{t}] is on another device than params, expected the same device",
        )
        check(
            grad.dtype == param.dtype,
            f"grads[{t}] has dtype {_name(grad)}, expected {_name(param)} as params[{t}]",
        )
        check(
            grad.shape == param.shape,
            f"grads[{t}] has {_text(grad)}, expected the shape of params[{t}], {_text(param)}",
        )

    if not torch.compiler.is_compiling():  # tensors have no memory yet while a graph is traced
        kept = (tensor for state in present.values() for tensor in state)
        written = [*params, *kept, *masters, *averages]
        starts = sorted(
            (tensor.data_ptr(), tensor.numel() * tensor.element_size())
            for tensor in written
            if tensor.numel()
        )
        check(
            all(a + size <= b for (a, size), (b, _) in itertools.pairwise(starts)),
            "two of params, their states, masters and averages share memory, expected each tensor once",
        )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
