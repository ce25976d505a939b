"""What the tests of layouts share: layouts by name, the feature of each entry, and random module trees."""

from __future__ import annotations

import itertools
import warnings

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from alrao_fast.optim.layouts import Layout, memory_rates, resolve_all


def table(module: nn.Module) -> dict[str, Layout]:
    """Layouts by parameter name."""
    return {layout.name: layout for layout in resolve_all([module]).values()}


def features(param: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The feature of each entry, in the parameter's shape, as the kernels read it from memory."""
    vector = layout.rates(torch.arange(layout.vector.length, dtype=torch.float64))
    rates, inner = memory_rates(vector, param, layout.dims)
    i = torch.arange(param.numel())
    in_memory = rates[(i // inner) % rates.numel()]
    return in_memory.as_strided(param.shape, param.stride()).long()


class Raw(nn.Module):
    """Parameters of every rank on an unknown module."""

    def __init__(self, shapes):
        super().__init__()
        self.raw = nn.ParameterList([nn.Parameter(torch.zeros(s)) for s in shapes])


sizes = st.integers(1, 5)


@st.composite
def leaves(draw):
    a, b, g = draw(sizes), draw(sizes), draw(st.integers(1, 3))
    makers = [
        lambda: nn.Linear(a, b, bias=draw(st.booleans())),
        lambda: nn.Bilinear(a, b, g),
        lambda: nn.Conv2d(a * g, b * g, (a, 2), groups=g),
        lambda: nn.ConvTranspose2d(a * g, b * g, (2, b), groups=g, bias=draw(st.booleans())),
        lambda: nn.ConvTranspose3d(a * g, b * g, 2, groups=g),
        lambda: nn.Embedding(a, b),
        lambda: nn.EmbeddingBag(a, b),
        lambda: nn.LSTM(
            a,
            b + 1,
            num_layers=draw(st.integers(1, 2)),
            bidirectional=draw(st.booleans()),
            proj_size=draw(st.integers(0, b)),
            bias=draw(st.booleans()),
        ),
        lambda: nn.GRUCell(a, b),
        lambda: nn.MultiheadAttention(
            2 * a,
            2,
            kdim=draw(st.sampled_from([None, 3])),
            add_bias_kv=draw(st.booleans()),
            bias=draw(st.booleans()),
        ),
        lambda: nn.BatchNorm2d(a, affine=draw(st.booleans())),
        lambda: nn.GroupNorm(1, a),
        lambda: nn.LayerNorm([a, b][: draw(st.integers(1, 2))]),
        lambda: nn.PReLU(a),
        lambda: Raw(draw(st.lists(st.lists(sizes, max_size=4), max_size=3))),
        lambda: nn.TransformerEncoderLayer(2 * a, 2, b),
    ]
    module = draw(st.sampled_from(makers))()
    if isinstance(module, nn.Linear | nn.Conv2d) and draw(st.booleans()):
        wrap = draw(
            st.sampled_from(
                [
                    nn.utils.weight_norm,
                    parametrizations.weight_norm,
                    parametrizations.spectral_norm,
                    nn.utils.spectral_norm,
                ]
            )
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = wrap(module)
    return module


@st.composite
def trees(draw):
    modules = draw(st.lists(leaves(), min_size=1, max_size=4))
    # A module met twice, a nested one, tied weights, a frozen half, parameters moved to channels_last.
    modules += draw(st.lists(st.sampled_from(modules), max_size=2))
    model = nn.ModuleList([modules[0], nn.ModuleDict({"rest": nn.ModuleList(modules[1:])})])
    linears = [m for m in model.modules() if type(m) in (nn.Linear, nn.Embedding)]
    # Of one under nn.utils.weight_norm the weight is computed, and cannot be tied.
    linears = [m for m in linears if isinstance(m.weight, nn.Parameter)]
    for first, second in itertools.combinations(linears, 2):
        if first.weight.shape == second.weight.shape and draw(st.booleans()):
            second.weight = first.weight
    for param in model.parameters():
        if param.dim() == 4 and draw(st.booleans()):
            param.data = param.data.contiguous(memory_format=torch.channels_last)
        elif param.dim() == 2 and draw(st.booleans()):
            param.data = param.data.t().contiguous().t()
        param.requires_grad_(draw(st.booleans()))
    return model
