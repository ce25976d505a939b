"""Feature layouts: which entries of a parameter share a learning rate.

A feature is a unit, a channel, an LSTM unit: the entries that compute it, over all its parameters, share one rate. A
rule says for a module type which dimension of each parameter runs over the features and which parameters share one
vector of rates; `register_feature_layout` adds rules for other modules. Every parameter that no rule covers has one
rate per index of its dimension 0 and is marked `default`.

In memory order entry i of a parameter has the rate `rates[(i // inner) % len(rates)]`: that is how the kernels read
rates, for any dense strides. `memory_rates` computes it from the parameter's strides of the moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from alrao_fast import fsdp1
from alrao_fast.arguments import Choice, Data, Instance, Integer, Kind, Optional, checked, shown
from alrao_fast.flat_shards import check_whole
from alrao_fast.sharding import check_parts


class _Dims(Kind):
    """A dimension, or several in ascending order."""

    expected = "a dimension, or a tuple of dimensions"

    def check(self, name: str, value: Any) -> int | tuple[int, ...]:
        number = Integer(words=self.expected)
        if isinstance(value, tuple | list):
            return tuple([number.check(f"{name}[{k}]", dim) for k, dim in enumerate(value)])
        return number.check(name, value)


_FEATURE = {
    "dim": _Dims(),
    "num_features": Optional(Integer(low=0)),
    "vector": Instance(str, "a string"),
    "feature_of": Optional(Data("an int64 tensor")),
    "kind": Choice("feature", "clone"),
}


class _Feature(NamedTuple):
    dim: int | tuple[int, ...]
    num_features: int | None
    vector: str
    feature_of: Tensor | None
    kind: Literal["feature", "clone"]


class Feature(_Feature):
    """How the rates of one parameter are laid out.

    dim: the dimension, or several in ascending order, that runs over the features; () for one rate in all.
    num_features: the length of the rate vector; None takes the parameter's size along `dim`. It may divide that size:
        index i then has the feature i % num_features (an LSTM's gates).
    vector: parameters of one module that name the same vector share it.
    feature_of: for each position along `dim` (several dimensions: row by row) the feature it belongs to, int64.
    kind: "feature" draws the rates from the sampler; "clone" takes the sampler's clone rates, in order.

    TypeError or ValueError, naming the field, for one of another type or an unknown kind.
    """

    __slots__ = ()

    def __new__(
        cls,
        dim: int | tuple[int, ...] = 0,
        num_features: int | None = None,
        vector: str = "out",
        feature_of: Tensor | None = None,
        kind: Literal["feature", "clone"] = "feature",
    ) -> Feature:
        given = (dim, num_features, vector, feature_of, kind)
        return super().__new__(cls, **checked(_FEATURE, dict(zip(_FEATURE, given))))


Rule = Callable[[Any], "dict[str, Feature]"]


class _Registered(NamedTuple):
    rule: Rule
    builtin: bool


_RULES: dict[type[nn.Module], _Registered] = {}


def register_feature_layout(module_type: type[nn.Module], rule: Rule | None) -> None:
    """Register how the parameters of `module_type` and its subclasses are divided into features.

    `rule(module)` returns a `Feature` per parameter name; names that are None in the module are ignored, parameters
    it leaves out have one rate per index of dimension 0. The rule of the nearest class in the method resolution order
    is used. `rule=None` removes the rule. A weight-normed or parametrized module follows the rule of its own type.

        register_feature_layout(MyDense, lambda m: {"kernel": Feature(dim=1), "bias": Feature(dim=0)})
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(
            f"module_type: got {shown(module_type)}, expected a subclass of torch.nn.Module"
        )
    if rule is None:
        _RULES.pop(module_type, None)
        return
    if not callable(rule):
        raise TypeError(f"rule: got {shown(rule)}, expected a function of the module, or None")
    _RULES[module_type] = _Registered(rule, builtin=False)


def register_builtin(*module_types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Decorator for the rules that come with the package: one that does not fit a subclass gives way to dimension 0."""

    def register(rule: Rule) -> Rule:
        for module_type in module_types:
            _RULES[module_type] = _Registered(rule, builtin=True)
        return rule

    return register


# What the packages' own modules say of the parameters that no rule above covers; None for other modules.
_LIBRARIES: list[Callable[[nn.Module], dict[str, Feature] | None]] = []


def register_library(
    rule: Callable[[nn.Module], dict[str, Feature] | None],
) -> Callable[[nn.Module], dict[str, Feature] | None]:
    """Decorator for a rule that is asked of every module without a registered one; it knows its own by their class."""
    _LIBRARIES.append(rule)
    return rule


@dataclass(eq=False)
class Vector:
    """One vector of rates, drawn once; the parameters of a module that name it share it. `among`: of a head that has
    retired clones, how many it was made with, and the numbers of those left."""

    name: str
    length: int
    kind: str
    among: tuple[int, Sequence[int]] | None = None


@dataclass(eq=False)
class Layout:
    """The feature layout of one parameter, resolved: dimensions checked, vector shared by identity.

    rule: "built-in" or "registered"; where no rule covers the parameter "shape" if it is broadcast along dimension 0,
        else "default".
    sharing: the classes of the other modules that have the parameter.
    by_feature: where there is a rate per entry, the layout that would be without.
    """

    name: str
    module: str
    rule: str
    dims: tuple[int, ...]
    vector: Vector
    feature_of: Tensor | None = None
    per_weight: bool = False
    sharing: set[str] = field(default_factory=set)
    by_feature: Layout | None = None

    def length(self, param: Tensor) -> int:
        """The number of rates that this parameter's state holds."""
        if self.per_weight:
            return param.numel()
        return self.vector.length if self.feature_of is None else self.feature_of.numel()

    def rates(self, vector_rates: Tensor) -> Tensor:
        """This parameter's rates, the vector itself or the part it uses."""
        if self.feature_of is None or self.per_weight:
            return vector_rates
        return vector_rates[self.feature_of.to(vector_rates.device)]

    def per_entry(self, param: Tensor) -> Layout:
        """The layout with one rate per entry of the parameter, in row-major order."""
        vector = Vector(self.name, param.numel(), self.vector.kind)
        dims = tuple(range(param.dim()))
        return replace(
            self, dims=dims, vector=vector, feature_of=None, per_weight=True, by_feature=self
        )


def default_layout(name: str, param: Tensor, module: str = "") -> Layout:
    """One rate per index of dimension 0 (one rate for a 0-dim parameter).

    Where dimension 0 has size 1 the parameter is broadcast along it, as tokens [1, n, D] and scales [1, 1, D] are: then
    the features are along the last dimension, of maps [1, C, H, W] along the channels.
    """
    check_param(name, param, module)
    dims = (_feature_dim(param),) if param.dim() else ()
    length = param.size(dims[0]) if dims else 1
    rule = "shape" if param.dim() > 1 and param.size(0) == 1 else "default"
    return Layout(name, module, rule, dims, Vector(name, length, "feature"))


def _feature_dim(param: Tensor) -> int:
    """The dimension along which the default rule finds features."""
    wide = [d for d in range(param.dim()) if param.size(d) != 1]
    if not wide or param.size(0) != 1:
        return 0
    if len(wide) == 1:
        return wide[0]
    is_map = param.dim() == 4 and len(wide) == 3 and param.size(2) == param.size(3) != param.size(1)
    return 1 if is_map else param.dim() - 1


def resolve(model: nn.Module, table: dict[Tensor, Layout], prefix: str = "") -> None:
    """Add the layout of every parameter of `model` to `table`, in the order in which rates are drawn.

    Modules in the order of `model.modules()`, within a module the rule's order, then what the rule leaves out. A
    parameter that several modules share belongs to the first of them. Where FullyShardedDataParallel (FSDP1) has
    flattened parameters, their twins are laid out.
    """
    with fsdp1.unflattened(model):
        for module_name, module in model.named_modules(prefix=prefix):
            _resolve_module(module, fsdp1.clean(module_name), table)


def _resolve_module(module: nn.Module, module_name: str, table: dict[Tensor, Layout]) -> None:
    own = dict(own_parameters(module))
    type_name = _class_name(module)
    for name, param in own.items():
        check_param(_join(module_name, name), param, type_name)
        if param in table:
            table[param].sharing.add(type_name)
    registered = next((_RULES[c] for c in type(module).__mro__ if c in _RULES), None)
    # Which entry has which rate is worked out on the CPU, whatever torch's default device is.
    with torch.device("cpu"):
        features = _features(registered.rule, module) if registered else {}
        if not registered or registered.builtin:
            for library in _LIBRARIES:
                features = {**(library(module) or {}), **features}
    if not isinstance(features, Mapping) or not all(
        isinstance(name, str) and isinstance(feature, Feature) for name, feature in features.items()
    ):
        raise TypeError(
            f"the feature layout registered for {type_name} returned {shown(features)}, expected a dict "
            "{parameter's name: Feature}"
        )
    rule = "registered" if registered and not registered.builtin else "built-in"
    if rule == "built-in":
        own |= _below(module, features)
    vectors: dict[str, Vector] = {}
    for rule_name, feature in features.items():
        names = [rule_name] if rule_name in own else _stand_ins(rule_name, own)
        missing = not names and rule_name not in module._parameters
        if missing and rule == "registered" and not hasattr(module, rule_name):
            raise ValueError(
                f"the feature layout registered for {type_name} names the parameter {rule_name!r}, which the "
                f"module does not have; it has {', '.join(own) or 'none'}"
            )
        for name in names:
            param = own.pop(name)
            if param in table:
                continue
            full_name = _join(module_name, name)
            layout = _fitted(feature, param, full_name, module, rule, vectors, module_name)
            if isinstance(layout, str):
                if rule == "registered" and name == rule_name:
                    raise ValueError(
                        f"the feature layout registered for {type_name} does not fit parameter "
                        f"{full_name!r} of shape {list(param.shape)}: {layout}"
                    )
                layout = _leftover(full_name, param, type_name, name != rule_name)
            table[param] = layout
    for name, param in own.items():
        # The parametrization's own parameters are met here first, before its module is.
        if param not in table and not name.startswith("parametrizations."):
            table[param] = default_layout(_join(module_name, name), param, type_name)


def _class_name(module: nn.Module) -> str:
    """The name of the module's class, also where `fully_shard` has made a subclass of it and FSDPModule."""
    own, *bases = type(module).__mro__
    return bases[1].__name__ if bases[0].__name__ == "FSDPModule" else own.__name__


def _below(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The submodules' parameters that a built-in rule names, `child.name`, save those of registered types."""
    found: dict[str, Tensor] = {}
    for full_name in names:
        path, _, name = full_name.rpartition(".")
        if not path or path.startswith("parametrizations"):
            continue
        child = module.get_submodule(path)
        registered = next((_RULES[c] for c in type(child).__mro__ if c in _RULES), None)
        param = child._parameters.get(name)
        if param is not None and (registered is None or registered.builtin):
            found[full_name] = param
    return found


def _features(rule: Rule, module: nn.Module) -> Any:
    """What the rule says of the module; its own errors pass as they are."""
    try:
        return rule(module)
    except TypeError as problem:
        if problem.__traceback__ is None or problem.__traceback__.tb_next is not None:
            raise
        raise TypeError(
            f"the feature layout registered for {_class_name(module)}: the rule {shown(rule)} cannot be called with "
            "the module, expected a function of the module that returns a dict {parameter's name: Feature}"
        ) from problem


def own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters registered on the module itself and the originals of its parametrized ones, with dotted names."""
    yield from ((n, p) for n, p in module._parameters.items() if p is not None)
    # Modules parametrized by torch.nn.utils.parametrize hold their originals one level down.
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict):
        for target, plist in parametrizations.items():
            for n, p in plist._parameters.items():
                if p is not None:
                    yield f"parametrizations.{target}.{n}", p


def _stand_ins(name: str, own: dict[str, Tensor]) -> list[str]:
    """What torch.nn.utils.weight_norm, spectral_norm, prune and parametrize put in the parameter's place."""
    names = [n for n in (f"{name}_v", f"{name}_g", f"{name}_orig") if n in own]
    originals = [n for n in own if n.startswith(f"parametrizations.{name}.original")]
    # The largest first: its size along the feature dimension is the parameter's own, a norm's may be 1.
    return names + sorted(originals, key=lambda n: -own[n].numel())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def check_param(name: str, param: Tensor, module: str = "") -> None:
    """Raises ValueError for an uninitialized parameter, which has no shape, for a sparse one that is trained, and for
    shards that do not say where their entries are."""
    where = f"parameter {name!r}{f' of {module}' if module else ''}"
    if is_lazy(param):
        raise ValueError(
            f"{where} is uninitialized: run one batch through the model first, then construct the optimizer"
        )
    if param.layout is not torch.strided and param.requires_grad:
        raise ValueError(
            f"{where} has layout {param.layout}, expected an ordinary (strided) tensor: its rates follow its memory"
        )
    check_whole(name, param)
    check_parts(name, param)


def _fitted(
    feature: Feature,
    param: Tensor,
    name: str,
    module: Any,
    rule: str,
    vectors: dict[str, Vector],
    module_name: str,
) -> Layout | str:
    """The layout of `param` under `feature`, or why the feature does not fit."""
    dims = (feature.dim,) if isinstance(feature.dim, int) else tuple(feature.dim)
    if any(not -param.dim() <= d < param.dim() for d in dims):
        return f"dim {feature.dim} is out of range"
    dims = tuple(d % param.dim() for d in dims)
    if list(dims) != sorted(set(dims)):
        return f"dim {feature.dim} is not ascending"
    size = math.prod(param.size(d) for d in dims)
    length = size if feature.num_features is None else feature.num_features
    if feature.feature_of is not None:
        if feature.num_features is None:
            return "feature_of needs num_features"
        if feature.feature_of.shape != (size,) or feature.feature_of.dtype != torch.int64:
            return f"feature_of must be int64 of shape [{size}], it is {list(feature.feature_of.shape)}"
        if (
            size
            and not 0 <= int(feature.feature_of.min()) <= int(feature.feature_of.max()) < length
        ):
            return f"feature_of must lie in [0, {length})"
    elif size != length and (len(dims) != 1 or length < 1 or size % length):
        return f"{length} features do not divide the size {size} along dim {feature.dim}"
    vector = vectors.get(feature.vector)
    if vector is None:
        kept = getattr(module, "kept", None) if feature.kind == "clone" else None
        among = None if kept is None else (kept.numel(), module.clone_numbers)
        vector = Vector(_join(module_name, feature.vector), length, feature.kind, among)
        vectors[feature.vector] = vector
    if (vector.length, vector.kind) != (length, feature.kind):
        return f"vector {feature.vector!r} has {vector.length} {vector.kind} rates, this needs {length} {feature.kind}"
    return Layout(name, _class_name(module), rule, dims, vector, feature.feature_of)


def _leftover(name: str, param: Tensor, module: str, stand_in: bool) -> Layout:
    """A parameter its rule does not fit: a weight_norm's g along another dimension, or a subclass's own shape."""
    layout = default_layout(name, param, module)
    if not stand_in:
        return layout
    dims = tuple(d for d in range(param.dim()) if param.size(d) != 1)
    length = math.prod(param.size(d) for d in dims)
    return replace(layout, dims=dims, vector=Vector(name, length, "feature"))


def resolve_all(models: Iterable[nn.Module]) -> dict[Tensor, Layout]:
    """The layouts of several models' parameters, in the order in which rates are drawn."""
    table: dict[Tensor, Layout] = {}
    for model in models:
        resolve(model, table)
    return table


def memory_span(param: Tensor, dims: tuple[int, ...], name: str = "") -> tuple[list[int], int]:
    """The dimensions, outermost in memory first, that lie between the outermost and the innermost of `dims`, and the
    stride of the last of them. Dimensions of size 1 do not count. Raises ValueError where `param` is not dense."""
    order = sorted((d for d in range(param.dim()) if param.size(d) != 1), key=param.stride)
    expected = 1
    for d in order if param.numel() else ():
        if param.stride(d) != expected:
            raise ValueError(
                f"parameter {name!r} of shape {list(param.shape)} has strides {list(param.stride())}; expected dense, "
                "non-overlapping memory: replace it by a clone"
            )
        expected *= param.size(d)
    order.reverse()
    places = [k for k, d in enumerate(order) if d in dims]
    if not places or not param.numel():
        return [], 1
    span = order[places[0] : places[-1] + 1]
    return span, param.stride(span[-1])


def memory_rates(
    rate: Tensor, param: Tensor, dims: tuple[int, ...], name: str = ""
) -> tuple[Tensor, int]:
    """`(rates, inner)` such that entry i of `param`, in memory order, has the rate `rates[(i // inner) % len(rates)]`.

    `rate` holds one rate per position along `dims` in row-major order, or for a single dimension a divisor of its
    size. The result is `rate` itself unless several dimensions do not lie next to each other in memory.
    """
    span, inner = memory_span(param, dims, name)
    if len(span) < 2:
        return rate, inner
    shape = [param.size(d) if d in dims else 1 for d in range(param.dim())]
    spanned = [param.size(d) if d in span else 1 for d in range(param.dim())]
    order = span + [d for d in range(param.dim()) if d not in span]
    return rate.view(shape).expand(spanned).permute(order).reshape(-1), inner
