"""Plots of a training by Alrao, on matplotlib's axes: `pip install 'alrao-fast[plot]'`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alrao_fast.arguments import Instance
from alrao_fast.monitor import History
from alrao_fast.nn.heads import head_of
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.flat_layouts import FlatLayout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HISTORY = Instance(History, "an alrao_fast.History")
_OPTIMIZER = Instance(torch.optim.Optimizer, "an AlraoSGD, AlraoAdam or AlraoMuon")
# Of Okabe and Ito's colours, which colour-blind people tell apart.
_FEATURES, _CLONES = "#56B4E9", "#D55E00"
_BINS = 24


def _axes(ax: Axes | None) -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"alrao_fast.plot needs matplotlib ({error}): pip install 'alrao-fast[plot]'"
        ) from error
    return plt.subplots(figsize=(7, 4), layout="constrained")[1] if ax is None else ax


def posterior(history: History, *, ax: Axes | None = None) -> Axes:
    """The posterior over time: how much the switch trusts each learning rate after how many observations.

    The line is the rates' geometric mean under the posterior, which `suggested_lr()` is in the end. Clones are in the
    order of their rates; by number where these are not known, 0, or shared by several clones.

    Args:
        history: with one record at least; ValueError for an empty one.
        ax: matplotlib's axes to draw on; None makes a figure. They are returned.

    ImportError without matplotlib.
    """
    _HISTORY.check("history", history)
    if not len(history):
        raise ValueError("history: got one without a record, expected some: call history.record()")
    ax = _axes(ax)
    table, times, rates = (
        history.posterior,
        history.observations.double(),
        history.clone_lr.double(),
    )
    # Clones of one rate have no place of their own on its axis.
    known = not bool(rates.isnan().any()) and bool((rates > 0).all())
    known = known and len(rates.unique()) == len(rates)
    if known:
        rates, order = rates.sort()
        table = table[:, order]
    heights = rates if known else torch.arange(len(rates), dtype=torch.float64)
    mesh = ax.pcolormesh(
        _edges(times, False).numpy(),
        _edges(heights, known).numpy(),
        table.t().numpy(),
        cmap="viridis",
        vmin=0,
        vmax=1,
    )
    ax.figure.colorbar(mesh, ax=ax, label="posterior of the clone")
    if known:
        ax.set_yscale("log")
        mean = torch.xlogy(table, rates).sum(1).exp()
        # White on what is dark, with an outline on what is bright.
        ax.plot(times.numpy(), mean.numpy(), color="black", linewidth=3)
        ax.plot(times.numpy(), mean.numpy(), color="white", linewidth=1.5, label="posterior mean")
        ax.legend(loc="lower right", facecolor="0.6")
    ax.set_ylabel("learning rate of the clone" if known else "clone")
    ax.set_xlabel("observations of the switch")
    ax.set_title("Which learning rate the switch trusts")
    return ax


def _edges(centers: Tensor, log: bool) -> Tensor:
    """The limits between neighbours, halfway, and those of the first and the last."""
    centers = centers.log() if log else centers
    if len(centers) == 1:
        edges = torch.cat([centers - 0.5, centers + 0.5])
    else:
        middle = (centers[1:] + centers[:-1]) / 2
        ends = centers[[0, -1]] + (centers[[0, -1]] - middle[[0, -1]])
        edges = torch.cat([ends[:1], middle, ends[1:]])
    return edges.exp() if log else edges


def rates(net: nn.Module, opt: torch.optim.Optimizer, *, ax: Axes | None = None) -> Axes:
    """The learning rates: how those of the features are spread, and how much the switch trusts those of the clones.

    Args:
        net: an `AlraoModel`, a head, or any module with one head in it.
        opt: its optimizer, which has drawn the rates.
        ax: matplotlib's axes to draw on; None makes a figure. They are returned.

    ValueError where the clones have no rates; ImportError without matplotlib.
    """
    head = head_of(net)
    _OPTIMIZER.check("opt", opt)
    own = head.clone_lr.double().cpu()
    if own.isnan().any():
        raise ValueError("opt: got an optimizer without the clones' rates, expected that of net")
    ax = _axes(ax)
    features = _feature_rates(opt, head)
    positive = torch.cat([features[features > 0], own[own > 0]])
    low, high = positive.min().item(), positive.max().item()
    span = max(math.log(high / low), math.log(10))
    middle = (math.log(low) + math.log(high)) / 2
    edges = torch.linspace(middle - span / 2, middle + span / 2, _BINS + 1, dtype=torch.float64)
    edges = edges.exp()
    inside = features[features > 0].clamp(edges[0].item(), edges[-1].item())
    if len(inside):
        shares = torch.full_like(inside, 1 / len(features))
        label = f"rates of {len(features)} features: share per bin"
        ax.hist(
            inside.numpy(), edges.tolist(), weights=shares.numpy(), color=_FEATURES, label=label
        )
    trust = head.switch.posterior().cpu()
    label = f"rates of {len(own)} clones: posterior"
    ax.vlines(own.numpy(), 0, trust.numpy(), color=_CLONES, linewidth=2)
    ax.plot(own.numpy(), trust.numpy(), "o", color=_CLONES, label=label)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.25)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("share, probability")
    ax.set_title("Learning rates of features and clones")
    ax.legend(loc="upper left")
    return ax


def _feature_rates(opt: torch.optim.Optimizer, head: nn.Module) -> Tensor:
    """The rate of every feature outside of the clones, each shared vector once, float64, on the CPU."""
    clones = set(head.parameters())
    vectors: dict[Any, Tensor] = {}
    # Of parameters that have a part of a vector each, or its rates more than once.
    parts: dict[Any, Tensor] = {}
    whole = set()
    for number, group in enumerate(opt.param_groups):
        for param in group["params"]:
            rate = opt.state.get(param, {}).get("rate")
            if rate is None or param in clones:
                continue
            layout = opt.layout_of(param) if isinstance(opt, AlraoOptimizer) else None
            if isinstance(layout, FlatLayout):
                for part in layout.features():
                    if part.layout.vector.kind != "clone":
                        vectors[id(rate), part.first] = part.rates(rate)
                continue
            key = number, layout and layout.vector
            if layout is None or layout.feature_of is None or layout.per_weight:
                vectors[id(rate), 0] = rate
                whole.add(key)
                continue
            own = torch.full((layout.vector.length,), math.nan, dtype=torch.float64)
            own = parts.setdefault(key, own)
            own[layout.feature_of.cpu()] = rate.double().cpu()
    flat = [rate.flatten().double().cpu() for rate in vectors.values()]
    flat += [own[~own.isnan()] for key, own in parts.items() if key not in whole]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.float64)
