"""What torch can ask of an op beyond one backward: a second derivative, a forward-mode one, a transform of torch.func.

The ops know the backward alone, and one of them has no other derivative: a loss whose gradient is not that of one
function. A term that is silently 0 is worse than an error, so whatever cannot be right is refused here.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or forward-mode AD may see this call: dispatched ops would drop what these keep of tensors."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_traced(tensor: Tensor) -> bool:
    """Whether it may have no values to look at: under torch.compile, torch.func, make_fx, FakeTensorMode, ..."""
    return (
        torch.compiler.is_compiling()
        or transformed()
        or type(tensor) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at without a wait: on a GPU that would be one, and what is traced has none."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def is_batch(tensor: Tensor) -> bool:
    """Whether it stands for many tensors: in torch.func.vmap, or in autograd.grad(is_grads_batched=True)."""
    # A traced backward has no batches, and no way to ask.
    return not torch.compiler.is_compiling() and (
        _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)
    )


class _Refusal(torch.autograd.Function):
    """A zero that depends on some tensors, and raises when that dependence is to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, *tensors: Tensor | None) -> Tensor:
        return torch.zeros((), device="cpu")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> tuple[None, ...]:
        raise RuntimeError(ctx.message)


def final(
    gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None], message: str
) -> tuple[Tensor | None, ...]:
    """The gradients, of unknown derivative by `sources`: asking for it raises RuntimeError(message).

    What else they depend on, as the gradient that they were scaled by, is differentiated as ever.
    """
    refusal = _Refusal.apply(message, *sources)
    return tuple(None if gradient is None else gradient + refusal for gradient in gradients)


class _TracedOnce(torch.autograd.Function):
    """Its tensors, through which one derivative comes back; torch's own words refuse the forward-mode one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, source: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.message, source, *_ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            gradients = final(gradients, ctx.saved_tensors, ctx.message)
        # A traced backward adds what comes, None too.
        nothing = torch.zeros_like(ctx.saved_tensors[0]) if torch.compiler.is_compiling() else None
        return None, nothing, *gradients


class _Once(_TracedOnce):
    """The same with our words: torch.compile cannot trace them."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise RuntimeError(ctx.message)


def once(message: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, for plain PyTorch whose first derivative is right and whose others are not.

    One backward passes. A second derivative or a forward-mode one raises RuntimeError(message).
    """
    given = [tensor for tensor in tensors if tensor is not None]
    # Depends on them all without keeping any: each may change in place before the backward.
    source = torch.stack([tensor[:0].sum() for tensor in given]).sum()
    function = _TracedOnce if torch.compiler.is_compiling() else _Once
    passed = iter(function.apply(message, source, *given))
    return tuple([None if tensor is None else next(passed) for tensor in tensors])


def plain_gradients(
    function: Callable[[list[Tensor | None]], Any], inputs: Sequence[Tensor | None], grad: Any
) -> list[Tensor | None]:
    """The gradients of `function(inputs)` to each of the inputs, by autograd, from that to its result, or results.

    With create_graph they have derivatives; `grad` may be a batch or a dual tensor.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may depend on another; the gradient is by each in its own place.
        places = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t in places if t is not None and t.requires_grad]
        made = iter(torch.autograd.grad(function(places), wanted, grad, create_graph=create_graph))
    return [next(made) if t is not None and t.requires_grad else None for t in places]


@contextlib.contextmanager
def outside(message: str, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors as they are without torch.func, which in the block sees nothing; RuntimeError(message) under vmap.

    For what a training step writes by the way: it is a constant to every derivative, but a transform takes no writing
    into a tensor that it does not know.
    """
    plain = []
    for tensor in tensors:
        while _functorch.is_gradtrackingtensor(tensor):
            tensor = _functorch.get_unwrapped(tensor)
        if _functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError(message)
        plain.append(tensor)
    with temporarily_clear_interpreter_stack():
        yield plain
