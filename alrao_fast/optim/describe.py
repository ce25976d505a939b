"""`describe_rates`: the whole assignment of rates to parameters, as a table."""

import math
import sys
from typing import Any, NamedTuple, TextIO

from torch import Tensor, nn

from alrao_fast.arguments import Flag, shown
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.layouts import Layout, memory_span, resolve_all


class RateRow(NamedTuple):
    """One parameter's row: `features` rates in vector `vector`, entry i in memory order has rate i // inner % features.

    rule: "built-in", "registered" (by `register_feature_layout`), "shape" (no rule, and no doubt: one dimension alone,
    or a parameter that is broadcast along its first), or "default": no rule, one rate per index of dim 0.
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


# Standard output of the moment of the call; None is silence.
_STDOUT: Any = object()


def describe_rates(
    model_or_optimizer: nn.Module | AlraoOptimizer,
    *,
    details: bool = False,
    file: TextIO | None = _STDOUT,
) -> list[RateRow]:
    """Print which entries of the parameters share a rate, and return one row per parameter.

    Args:
        model_or_optimizer: of an optimizer (`AlraoSGD`, `AlraoAdam`) the drawn rates' range and the param group are
            known, too.
        details: print a line per parameter, not one per kind of module.
        file: where to; standard output by default, None for nowhere.

    TypeError for another kind of argument.
    """
    details = Flag().check("details", details)
    if isinstance(model_or_optimizer, AlraoOptimizer):
        rows = _optimizer_rows(model_or_optimizer)
    elif isinstance(model_or_optimizer, nn.Module):
        table = resolve_all([model_or_optimizer])
        rows = [_row(param, layout) for param, layout in table.items()]
    else:
        raise TypeError(
            f"model_or_optimizer: got {shown(model_or_optimizer)}, expected a torch.nn.Module, AlraoSGD or AlraoAdam"
        )
    if file is not None:
        lines = _table(rows) if details else _summary(rows)
        print(lines, file=sys.stdout if file is _STDOUT else file)
    return rows


class _Kind(NamedTuple):
    """The parameters of one name in the modules of one class, under one rule."""

    rule: str
    module: str
    parameter: str
    kind: str
    parameters: int
    entries: int
    share: str
    rates: int


def _summary(rows: list[RateRow]) -> str:
    """Of each kind how many parameters, entries and rates there are; those without a rule first, large ones first."""
    total = sum(math.prod(row.shape) for row in rows) or 1
    kinds: dict[tuple[str, str, str, str], list[RateRow]] = {}
    for row in rows:
        name = row.parameter.rpartition(".")[2]
        kinds.setdefault((row.rule, row.module, name, row.kind), []).append(row)
    lines = []
    for key, of_kind in kinds.items():
        entries = sum(math.prod(row.shape) for row in of_kind)
        rates = sum({row.vector: row.features for row in of_kind}.values())
        lines.append(_Kind(*key, len(of_kind), entries, f"{entries / total:.1%}", rates))
    lines.sort(key=lambda line: (line.rule != "default", -line.entries))
    return _aligned([list(_Kind._fields), *([_cell(cell) for cell in line] for line in lines)])


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
    return _aligned([names] + [[_cell(getattr(row, n)) for n in names] for row in rows])


def _aligned(cells: list[list[str]]) -> str:
    """Lines of columns, the first of them a heading."""
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
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
