"""Which pass evaluates the last layers: linear where they provably are, batched where that works, else a loop."""

import copy
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from numbers import Number
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.compat._fused_pass import FusedPass, fits
from alrao_fast.compat._graph_pass import GraphPass
from alrao_fast.compat._passes import ClonePass, LinearPass
from alrao_fast.compat._stack import ParameterStack, lay_out
from alrao_fast.compat.custom_layers import LinearClassifier, LinearClassifierRNN, LinearRegressor

Runner = Callable[[Tensor], ClonePass]
# What `LinearRunner` is told of them.
_KNOWN = {
    LinearClassifier: {"log_softmax": True, "flatten": False},
    LinearClassifierRNN: {"log_softmax": True, "flatten": True},
    LinearRegressor: {"log_softmax": False, "flatten": False},
}
_PLAIN = {nn.Linear, *_KNOWN}
# A rule that only holds near zero (a clamp, a threshold) shows at other scales.
_PROBE_SCALES = (1.0, 1e-3, 100.0)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ANY_MODULE = set(nn.Module().__dict__) - {"training"}
_IMMUTABLE = {
    *(int, float, bool, str, bytes, NoneType, FunctionType, BuiltinFunctionType, type),
    *(torch.dtype, torch.device),
}


class _OpaqueError(Exception):
    """A layer has an attribute that may change without a trace."""


def signature(layers: Sequence[nn.Module], x: Tensor) -> Hashable:
    """What the choice depends on; layers edited so that another pass is right have another signature.

    None where an edit might not show: then the layers have to be called.
    """
    parts: list[Hashable] = [x.dim(), x.size(-1) if x.dim() else 0, x.dtype]
    classes: set[type] = set()
    try:
        for layer in layers:
            _describe(layer, parts, classes)
    except _OpaqueError:
        return None
    return tuple(parts)


def _describe(module: nn.Module, parts: list[Hashable], classes: set[type]) -> None:
    # Called for every layer in every forward: one look-up each, past nn.Module's __getattr__.
    kind, own = type(module), module.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
    hooked = bool(hooked or own["_backward_pre_hooks"])
    if kind in _PLAIN:
        parts.append(
            (
                kind,
                id(module),
                hooked,
                "forward" in own,
                own["_parameters"].get("bias") is None,
            )
        )
    else:
        parts.append((kind, id(module), hooked))
        # An attribute may change what the module computes: a temperature, the training mode.
        parts += [_shown(value) for key, value in own.items() if key not in _OF_ANY_MODULE]
        if kind not in classes:
            classes.add(kind)
            parts += _of_class(kind)
    for child in own["_modules"].values():
        if child is not None:
            _describe(child, parts, classes)


def _of_class(kind: type) -> list[Hashable]:
    """The attributes that the modules of a user's class have in common."""
    return [
        value if isinstance(value, property | classmethod | staticmethod) else _shown(value)
        for base in kind.__mro__
        if base is not object and not base.__module__.startswith("torch.")
        for key, value in vars(base).items()
        if not key.startswith("__")
    ]


def _shown(value: Any) -> Hashable:
    """Another value once `value` has changed; raises _OpaqueError where a change might not show."""
    if type(value) in _IMMUTABLE or isinstance(value, Number):
        return value
    if isinstance(value, Tensor) and not value.is_inference():
        return id(value), value._version
    if isinstance(value, list | tuple):
        return tuple(map(_shown, value))
    raise _OpaqueError


def choose(layers: Sequence[nn.Module], x: Tensor) -> Runner:
    """The pass for these layers and for features like `x`; asks copies of them where their class is unknown."""
    loop = loop_over(layers)
    if signature(layers, x) is None:
        return loop
    modules = [m for layer in layers for m in layer.modules()]
    if any(m.__dict__[name] for m in modules for name in _HOOKS):
        return loop
    known = _KNOWN.get(type(layers[0]))
    overridden = any("forward" in m.__dict__ for m in modules)
    linears = _linears(layers)
    if x.dim() < 2:
        return loop
    if known is not None and all(type(layer) is type(layers[0]) for layer in layers):
        # LinearClassifier normalises over dim 1, which is the classes only in a matrix.
        fits = x.dim() == 2 or type(layers[0]) is not LinearClassifier
        if fits and not overridden and linears is not None:
            return LinearRunner(layers, linears, **known)
        linears = None
    stackable = _stackable(layers)
    if linears is None and not stackable:
        return loop
    # Nothing that a trial does to the layers is to stay.
    with torch.inference_mode(False):
        try:
            copies = copy.deepcopy(layers)
        except Exception:
            return loop
        made = _first_that_agrees(copies, x, linears=linears is not None, stackable=stackable)
    return loop if made is None else made(layers)


def _first_that_agrees(
    copies: Sequence[nn.Module], x: Tensor, *, linears: bool, stackable: bool
) -> Callable[[Sequence[nn.Module]], Runner] | None:
    """What makes a pass, not the loop, that computes what calling the layers does; None if nothing is found."""
    if linears:
        for log_softmax in (True, False):
            for flatten in (False, True) if x.dim() > 2 else (False,):
                linear = partial(_linear, log_softmax=log_softmax, flatten=flatten)
                if _agrees(linear(copies), copies, x):
                    return linear
    if stackable:
        # Their dropout would make any two evaluations differ.
        for layer in copies:
            layer.eval()
        if _agrees(_batched(copies), copies, x):
            return _batched
    return None


def _linear(layers: Sequence[nn.Module], log_softmax: bool, flatten: bool) -> Runner:
    linears = _linears(layers)
    assert linears is not None
    return LinearRunner(layers, linears, log_softmax, flatten)


def loop_over(layers: Sequence[nn.Module]) -> Runner:
    """The pass that calls the layers one by one: right for any layers."""
    return partial(GraphPass, layers=layers, batched=False)


def _batched(layers: Sequence[nn.Module]) -> Runner:
    return partial(GraphPass, layers=layers, batched=True)


class LinearRunner:
    """Evaluates layers that are each one Linear of `linears`, with or without log_softmax.

    Parameters that can no longer lie together, tied ones for instance: the layers are called.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        linears: Sequence[nn.Linear],
        log_softmax: bool,
        flatten: bool,
    ) -> None:
        self._loop = loop_over(layers)
        self._parameters = [linear._parameters for linear in linears]
        self._log_softmax, self._flatten = log_softmax, flatten
        self._weight, self._bias = ParameterStack(), ParameterStack()

    def __call__(self, x: Tensor) -> ClonePass:
        weights = [own["weight"] for own in self._parameters]
        biases = [own["bias"] for own in self._parameters]
        weight = self._weight(weights)  # type: ignore[arg-type]
        bias = None if biases[0] is None else self._bias(biases)  # type: ignore[arg-type]
        if weight is None or (bias is None and biases[0] is not None):
            return self._loop(x)
        fused = self._log_softmax and (self._flatten or x.dim() == 2) and fits(x, weight)
        return (FusedPass if fused else LinearPass)(
            x,
            weight,
            bias,
            weights if bias is None else weights + biases,  # type: ignore[arg-type]
            log_softmax=self._log_softmax,
            flatten=self._flatten,
        )


def _linears(layers: Sequence[nn.Module]) -> list[nn.Linear] | None:
    """The single plain Linear in each layer, None where there is another number of them or anything else to learn."""
    found = []
    for layer in layers:
        linear = None
        for module in layer.modules():
            if type(module) is nn.Linear and set(module._parameters) == {"weight", "bias"}:
                if linear is not None:
                    return None
                linear = module
            elif any(p is not None for p in module._parameters.values()) or module._buffers:
                return None
        if linear is None:
            return None
        found.append(linear)
    with_bias = {linear.bias is not None for linear in found}
    if len(with_bias) > 1 or lay_out([linear.weight for linear in found]) is None:
        return None
    if with_bias == {True} and lay_out([linear.bias for linear in found]) is None:
        return None
    return found


def _stackable(layers: Sequence[nn.Module]) -> bool:
    """Several of the same class, no buffers, the same parameters in name and shape: one function of stacked ones."""
    if len(layers) < 2:
        return False
    named = [dict(layer.named_parameters()) for layer in layers]
    names = list(named[0])
    if not names or any(type(layer) is not type(layers[0]) for layer in layers):
        return False
    if any(list(own) != names for own in named):
        return False
    if any(m._buffers for layer in layers for m in layer.modules()):
        return False
    return all(lay_out([own[name] for own in named]) is not None for name in names)


def _agrees(runner: Runner, layers: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether `runner` computes what calling the layers does, on random features shaped like `x`, and a call leaves
    the layers as they were."""
    loop, before = loop_over(layers), signature(layers, x)
    devices = [x.device] if x.is_cuda else []
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-4
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for scale in _PROBE_SCALES:
            probe = torch.randn(x.shape, dtype=x.dtype, device=x.device) * scale
            try:
                expected, actual = loop(probe).outputs, runner(probe).outputs
            except Exception:
                # Whatever the layers or torch.func cannot do here, the loop will report or manage.
                return False
            if expected.shape != actual.shape or expected.dtype != actual.dtype:
                return False
            if not torch.allclose(expected, actual, rtol=tolerance, atol=tolerance * scale):
                return False
    return signature(layers, x) == before
