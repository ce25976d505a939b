"""`describe_rates`: the whole assignment of rates to parameters, as a table."""

import sys
from typing import NamedTuple, TextIO

from torch import Tensor, nn

from alrao_fast.arguments import shown
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.layouts import Layout, memory_span, resolve_all


class RateRow(NamedTuple):
    """One parameter's row: `features` rates in vector `vector`, entry i in memory order has rate i // inner % features.

    rule: "built-in", "registered" (by `register_feature_layout`), or "default": no rule, one rate per index of dim 0.
    kind: "feature", "clone" or "weight" (one rate per entry). group, lr_min, lr_max: None where a model was given.
    """

    parameter: str
    shape: tuple[int, ...]
    module: str
    rule: str
    kind: str
    vector: str
    features: int
    inner: int
    trainable: bool
    group: int | None = None
    lr_min: float | None = None
    lr_max: float | None = None


def describe_rates(
    model_or_optimizer: nn.Module | AlraoOptimizer, *, file: TextIO | None = None
) -> list[RateRow]:
    """Print which entries of every parameter share a rate, one aligned row per parameter, and return the rows.

    Of an optimizer (`AlraoSGD`, `AlraoAdam`) the drawn rates' range and the param group are shown too. The table goes
    to `file`, standard output by default.
    """
    if isinstance(model_or_optimizer, AlraoOptimizer):
        rows = _optimizer_rows(model_or_optimizer)
    elif isinstance(model_or_optimizer, nn.Module):
        table = resolve_all([model_or_optimizer])
        rows = [_row(param, layout) for param, layout in table.items()]
    else:
        raise TypeError(
            f"model_or_optimizer: got {shown(model_or_optimizer)}, expected a torch.nn.Module, AlraoSGD or AlraoAdam"
        )
    print(_table(rows), file=file or sys.stdout)
    return rows


def _optimizer_rows(optimizer: AlraoOptimizer) -> list[RateRow]:
    optimizer.refresh()
    rows = []
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            rate = optimizer.state[param]["rate"]
            row = _row(param, optimizer.layout_of(param))
            if rate.numel():
                row = row._replace(lr_min=float(rate.min()), lr_max=float(rate.max()))
            rows.append(row._replace(group=number))
    return rows


def _row(param: Tensor, layout: Layout) -> RateRow:
    vector = layout.vector
    return RateRow(
        parameter=layout.name,
        shape=tuple(param.shape),
        module=layout.module,
        rule=layout.rule,
        kind="weight" if layout.per_weight else vector.kind,
        vector=vector.name,
        features=vector.length,
        inner=memory_span(param, layout.dims, layout.name)[1],
        trainable=param.requires_grad,
    )


def _table(rows: list[RateRow]) -> str:
    names = [n for n in RateRow._fields if any(getattr(row, n) is not None for row in rows)]
    cells = [names] + [[_cell(getattr(row, n)) for n in names] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2e}"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    return str(value)
