"""Which pass evaluates the last layers: linear where they provably are, batched where that works, else a loop."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial

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


def signature(layers: Sequence[nn.Module], x: Tensor) -> Hashable:
    """What the choice depends on; layers edited so that another pass is right have another signature."""
    parts: list[Hashable] = [x.dim(), x.size(-1) if x.dim() else 0, x.dtype]
    for layer in layers:
        _describe(layer, parts)
    return tuple(parts)


def _describe(module: nn.Module, parts: list[Hashable]) -> None:
    # Called for every layer in every forward: one look-up each, past nn.Module's __getattr__.
    kind, own = type(module), module.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
    if kind in _PLAIN:
        parts.append(
            (
                kind,
                id(module),
                bool(hooked),
                "forward" in own,
                own["_parameters"].get("bias") is None,
            )
        )
    else:
        parts.append((kind, id(module), bool(hooked)))
        # An attribute may change what the module computes: a temperature, the training mode.
        for key, value in own.items():
            if key[0] != "_":
                plain = isinstance(value, int | float | str)
                parts.append(value if plain else id(value))
    for child in own["_modules"].values():
        if child is not None:
            _describe(child, parts)


def choose(layers: Sequence[nn.Module], x: Tensor) -> Runner:
    """The pass for these layers and for features like `x`; asks the layers themselves where their class is unknown."""
    loop = partial(GraphPass, layers=layers, batched=False)
    batched = partial(GraphPass, layers=layers, batched=True)
    modules = [m for layer in layers for m in layer.modules()]
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules):
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
            return LinearRunner(linears, **known)
    elif linears is not None:
        for log_softmax in (True, False):
            for flatten in (False, True) if x.dim() > 2 else (False,):
                runner = LinearRunner(linears, log_softmax, flatten)
                if _agrees(runner, loop, x):
                    return runner
    if _stackable(layers):
        with _evaluation(modules):
            if _agrees(batched, loop, x):
                return batched
    return loop


class LinearRunner:
    """Evaluates layers that are each one Linear of `linears`, with or without log_softmax."""

    def __init__(self, linears: Sequence[nn.Linear], log_softmax: bool, flatten: bool) -> None:
        self._parameters = [linear._parameters for linear in linears]
        self._log_softmax, self._flatten = log_softmax, flatten
        self._weight, self._bias = ParameterStack(), ParameterStack()

    def __call__(self, x: Tensor) -> LinearPass:
        weights = [own["weight"] for own in self._parameters]
        biases = [own["bias"] for own in self._parameters]
        weight = self._weight(weights)  # type: ignore[arg-type]
        bias = None if biases[0] is None else self._bias(biases)  # type: ignore[arg-type]
        if weight is None or (bias is None and biases[0] is not None):
            raise RuntimeError(
                "the last layers' parameters no longer have the same shape and device"
            )
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
    """Same class, no buffers, the same parameters in name and shape: one function of stacked parameters."""
    named = [dict(layer.named_parameters()) for layer in layers]
    names = list(named[0])
    if not names or any(type(layer) is not type(layers[0]) for layer in layers):
        return False
    if any(list(own) != names for own in named):
        return False
    if any(m._buffers for layer in layers for m in layer.modules()):
        return False
    return all(lay_out([own[name] for own in named]) is not None for name in names)


def _agrees(runner: Runner, loop: Runner, x: Tensor) -> bool:
    """Whether `runner` computes what calling the layers does, on random features shaped like `x`."""
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
    return True


@contextlib.contextmanager
def _evaluation(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules in evaluation mode for a while: their dropout would make any two evaluations differ."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode
