"""Learning rates for the parameters of the internal network."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from alrao_fast.arguments import Interval
from alrao_fast.optim.layouts import own_parameters

LrSampler = Callable[[Tensor, torch.Size], Tensor]


def lr_sampler_generic(minlr: float, maxlr: float) -> LrSampler:
    """A function `f(tensor, size)`: rates of shape `size`, log-uniform between `minlr` and `maxlr`, of the dtype and
    on the device of `tensor`."""
    minlr, maxlr = Interval().check("(minlr, maxlr)", (minlr, maxlr))
    low, high = math.log(minlr), math.log(maxlr)

    def sample(tensor: Tensor, size: torch.Size) -> Tensor:
        uniform = torch.rand(size, dtype=torch.float64, device=tensor.device)
        return (low + (high - low) * uniform).exp().to(tensor.dtype)

    return sample


def generator_randomlr_neurons(
    module: nn.Module, lr_sampler: LrSampler, memo: set[Tensor] | None = None
) -> Iterator[Tensor]:
    """A rate tensor for each parameter of `module`, in the order of `module.parameters()`.

    Linear and Conv2d have a rate per output row, shared with the bias; Embedding one per column; LSTM one per row of
    each weight matrix, and each bias those of its matrix; every other parameter one per entry. A parameter that
    several modules share has the rates of the first of them. Parameters in `memo` are left out, those yielded added.
    """
    rates: dict[Tensor, Tensor] = {}
    for child in module.modules():
        rows: dict[str, Tensor] = {}
        for full_name, param in own_parameters(child):
            if param not in rates:
                # A parametrization keeps the originals of the parameter it is named after.
                name = full_name.removeprefix("parametrizations.").partition(".")[0]
                rates[param] = _rates(child, name, param, lr_sampler, rows)
    memo = set() if memo is None else memo
    for param in module.parameters():
        if param not in memo:
            memo.add(param)
            yield rates[param]


def generator_randomlr_weights(
    module: nn.Module, lr_sampler: LrSampler, memo: set[Tensor] | None = None
) -> Iterator[Tensor]:
    """A rate for each entry of each parameter of `module`, in the order of `module.parameters()`."""
    memo = set() if memo is None else memo
    for param in module.parameters():
        if param not in memo:
            memo.add(param)
            yield lr_sampler(param.detach(), param.shape)


def _rates(
    module: nn.Module, name: str, param: Tensor, sampler: LrSampler, rows: dict[str, Tensor]
) -> Tensor:
    """The rates of one parameter; `rows` keeps those of the module's rows, for its other parameters."""
    detached = param.detach()
    # weight_norm, spectral_norm and prune keep weight_g, weight_v, weight_orig in the weight's place.
    plain = name.removesuffix("_g").removesuffix("_v").removesuffix("_orig")
    if isinstance(module, nn.Linear | nn.Conv2d) and plain in ("weight", "bias"):
        return _by_row(detached, "rows", sampler, rows)
    if isinstance(module, nn.Embedding) and plain == "weight":
        rate = sampler(detached, param.shape[-1:])
        return rate.expand(param.shape).contiguous()
    if isinstance(module, nn.LSTM) and plain.startswith(("weight_", "bias_")):
        return _by_row(detached, plain.partition("_")[2], sampler, rows)
    return sampler(detached, param.shape)


def _by_row(param: Tensor, key: str, sampler: LrSampler, rows: dict[str, Tensor]) -> Tensor:
    if key not in rows:
        rows[key] = sampler(param, param.shape[:1])
    rate = rows[key]
    if rate.numel() != param.size(0):
        # Not a row of the matrix after all, such as the vector of spectral_norm.
        return sampler(param, param.shape)
    return rate.view(-1, *[1] * (param.dim() - 1)).expand(param.shape).contiguous()
