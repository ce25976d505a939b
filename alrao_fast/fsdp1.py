"""FullyShardedDataParallel (FSDP1): what its flat parameters hold.

Each wrapper has a handle, whose flat parameter knows the original parameters: their modules, names, shapes, and which
entries are on this rank. With `use_orig_params=True` the originals stay in the modules as flat views of it. For every
original there is a twin on the meta device, of its shape: that has the layout and, with it, the rates.
"""

import sys
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from alrao_fast import live
from alrao_fast.flat_shards import Flat, Part, note, parts_of

_WRAPPED = "_fsdp_wrapped_module"
_FLAT_PARAM = "_flat_param"
_ABSENT: Any = object()

# The handle of a flat parameter, and of an original that is one's view; the twins of a flat parameter; the module of a
# twin, and all such modules. Handles and modules by weak references.
_handles: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_twins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_homes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 has flattened a parameter, or it is the result."""
    return getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False)


def clean(name: str) -> str:
    """The name of a module or parameter as it was without wrappers."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def home_of(twin: Tensor) -> nn.Module | None:
    """The module of the original that a twin stands for."""
    reference = _homes.get(twin)
    return None if reference is None else reference()


def is_there(weight: Tensor, attributes: Mapping[str, Any]) -> bool:
    """Whether a head's weight `[N, C, D]` is whole: FSDP1 leaves a flat shard of it, or among the module's attributes a
    view of memory that is gone."""
    return not isinstance(attributes.get("weight"), Tensor) and weight.dim() == 3


def check_there(weight: Tensor, attributes: Mapping[str, Any]) -> None:
    """Raise RuntimeError where it is not."""
    if not is_there(weight, attributes):
        raise RuntimeError(
            "the head's parameters are flattened by FullyShardedDataParallel (FSDP1), expected whole ones: ask "
            "within FullyShardedDataParallel.summon_full_params(net), on all ranks"
        )


def is_home(module: nn.Module) -> bool:
    """Whether a module has, or had, parameters that are known to be flattened."""
    return module in _modules


def describe(params: Iterable[Tensor], root: nn.Module | None = None) -> list[Any]:
    """The handles of those of `params` that FSDP1 has flattened; what they hold is registered.

    Their wrappers are in `root`, or around it. Those that are found nowhere are left out.
    """
    flattened = [param for param in params if is_flattened(param)]
    if not flattened:
        return []
    _describe_all(wrapper for wrapper in (root.modules() if root is not None else ()))
    if any(param not in _handles for param in flattened):
        # No way leads from a parameter to a wrapper around its module.
        _describe_all(live.instances(_wrapper()))
    handles = (_handles[param]() for param in flattened if param in _handles)
    return [*{id(handle): handle for handle in handles if handle is not None}.values()]


def _wrapper() -> Any:
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    return getattr(module, "FullyShardedDataParallel", ())


def _describe_all(modules: Iterable[Any]) -> None:
    cls = _wrapper()
    for module in modules:
        # Without parameters of its own a wrapper has no handle.
        handle = getattr(module, "_handle", None) if isinstance(module, cls) else None
        if handle is None:
            continue
        try:
            _describe(module, handle)
        except AttributeError as error:
            raise ValueError(
                f"FullyShardedDataParallel of torch {torch.__version__} does not say what its flat parameters hold "
                f"({error}): use torch.distributed.fsdp.fully_shard (FSDP2)"
            ) from error


def _describe(wrapper: Any, handle: Any) -> None:
    flat = handle.flat_param
    if flat not in _twins:
        _twins[flat] = _twins_of(flat)
    groups = [handle.process_group, getattr(wrapper, "_inter_node_pg", None)]
    own = tuple(group for group in groups if group is not None)
    found: list[Part] = []
    for twin, info in zip(_twins[flat], flat._shard_param_infos):
        here = (0, 0, 0)
        if info.in_shard:
            stop = info.intra_param_end_idx + 1
            here = info.intra_param_start_idx, stop, info.offset_in_shard
        found.append(Part(twin, twin, *here))
    _handles[flat] = weakref.ref(handle)
    if not handle._use_orig_params:
        note(flat, Flat(tuple(found), own, gathers=True))
        return
    for param, part in zip(flat._params, found):
        _handles[param] = weakref.ref(handle)
        if handle.uses_sharded_strategy:
            note(param, Flat((part._replace(at=0),), own, gathers=True))
        else:
            # Whole, in its own shape.
            note(param, Flat(None, own, gathers=True))


def _twins_of(flat: Any) -> list[nn.Parameter]:
    if any(extension is not None for extension in flat._param_extensions):
        raise ValueError(
            "FullyShardedDataParallel over DTensors: expected ordinary parameters, or fully_shard (FSDP2)"
        )
    originals = flat._params or [flat] * len(flat._shapes)
    twins = []
    for shape, stride, original, info in zip(
        flat._shapes, flat._strides, originals, flat._param_infos
    ):
        meta = torch.empty_strided(shape, stride, dtype=flat.dtype, device="meta")
        twin = nn.Parameter(meta, requires_grad=original.requires_grad)
        _homes[twin] = weakref.ref(info.module)
        _modules.add(info.module)
        twins.append(twin)
    return twins


def forget_gathered(params: Iterable[Tensor]) -> None:
    """Free what wrappers keep of the whole parameters that are flattened."""
    for handle in describe(params):
        # Before the first forward there is no place for them.
        has_place = hasattr(handle.flat_param, "_full_param_padded")
        if has_place and handle.uses_sharded_strategy and not handle.needs_unshard():
            handle.reshard(True)


def flats_among(params: Iterable[Tensor], root: nn.Module | None = None) -> list[Tensor]:
    """The vectors among `params` that FSDP1 has made: not where it keeps the originals whole."""
    own = [param for param in params if is_flattened(param)]
    describe(own, root)
    return [param for param in own if parts_of(param) is not None]


def roots_of(params: Iterable[Tensor]) -> list[nn.Module]:
    """The wrapped modules that hold those of `params` that FSDP1 has flattened, without those within another."""
    modules = [handle._fully_sharded_module for handle in describe(params)]
    inner = {id(m) for module in modules for m in module.modules() if m is not module}
    return [module for module in modules if id(module) not in inner]


def check_not_later(root: nn.Module, known: Container[Tensor]) -> None:
    """Raise ValueError for parameters of a module that were flattened after an optimizer was made, which has the
    originals still."""
    for name, param in root.named_parameters():
        if is_flattened(param) and param not in known:
            raise ValueError(
                f"parameter {clean(name)!r} was made by FullyShardedDataParallel (FSDP1) after the optimizer, expected "
                "the optimizer to be made after the wrapper, or the wrapper with use_orig_params=True"
            )


@contextmanager
def unflattened(root: nn.Module) -> Iterator[None]:
    """Within it the modules have the twins where they had parameters before they were wrapped."""
    saved: list[tuple[nn.Module, str, Any]] = []

    def put(module: nn.Module, name: str, param: Any) -> None:
        saved.append((module, name, module._parameters.get(name, _ABSENT)))
        if param is _ABSENT:
            module._parameters.pop(name, None)
        else:
            module._parameters[name] = param

    try:
        for handle in describe(root.parameters(), root):
            flat = handle.flat_param
            if handle._use_orig_params and not handle.uses_sharded_strategy:
                continue
            put(handle._fully_sharded_module, _FLAT_PARAM, _ABSENT)
            named = {}
            for info, twin in zip(flat._param_infos, _twins[flat]):
                put(info.module, info.param_name, twin)
                named[id(info.module), info.param_name] = twin
            for shared in flat._shared_param_infos:
                twin = named[id(shared.prim_module), shared.prim_param_name]
                put(shared.module, shared.param_name, twin)
        yield
    finally:
        for module, name, param in reversed(saved):
            if param is _ABSENT:
                module._parameters.pop(name, None)
            else:
                module._parameters[name] = param
