"""Parameters that other libraries have flattened into one vector and cut: their entries do not say what feature they
belong to, and the optimizers refuse them."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

_CURE = (
    "expected whole parameters or DTensors, whose entries say to which feature they belong: shard by "
    "torch.distributed.fsdp.fully_shard (FSDP2), before or after the optimizer is made"
)
# The attributes by which libraries mark their parameters.
_MARKS = {
    "_is_flat_param": "the flat parameter of FullyShardedDataParallel (FSDP1)",
    "_fsdp_flattened": "a flat shard of FullyShardedDataParallel (FSDP1)",
    "ds_tensor": "partitioned by DeepSpeed's ZeRO-3",
}


def check_whole(name: str, param: Tensor) -> None:
    """Raise ValueError for a flat shard of a parameter, and for the vector it was cut from."""
    for mark, what in _MARKS.items():
        if hasattr(param, mark):
            raise ValueError(f"parameter {name!r} is {what}, {_CURE}")


def check_modules(modules: Iterable[nn.Module]) -> None:
    """The same for all parameters of the modules, which have come after those that an optimizer knows."""
    for module in modules:
        for name, param in module.named_parameters():
            check_whole(name, param)


def check_exchange(number: int, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    """Raise ValueError where all parameters of a param group have given way to vectors with their entries.

    So do ZeRO-1 and ZeRO-2 of DeepSpeed and Megatron's distributed optimizer, which mark nothing.
    """
    if not before or not now or all(param.dim() < 2 for param in before):
        return
    known = set(map(id, before))
    shapes = {tuple(param.shape) for param in before}
    for param in now:
        if id(param) in known or param.dim() != 1 or tuple(param.shape) in shapes:
            return
    raise ValueError(
        f"the {len(before)} parameters of param group {number} were replaced by vectors of other shapes "
        f"({', '.join(str(list(param.shape)) for param in now[:3])}), as flat partitions are (ZeRO of DeepSpeed, the "
        f"distributed optimizer of Megatron), {_CURE}"
    )
