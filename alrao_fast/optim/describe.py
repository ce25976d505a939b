"""`describe_rates`: the assignment of rates to parameters, in sum or in full, as a table."""

import math
import sys
from typing import Any, NamedTuple, TextIO

from torch import Tensor, nn

from alrao_fast.arguments import Flag, shown
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.flat_layouts import FlatLayout
from alrao_fast.optim.layouts import Layout, memory_span, resolve_all


class RateRow(NamedTuple):
    """One parameter's row: `features` rates in vector `vector`, entry i in memory order has rate i // inner % features.

    Not of parameters that have a part of the vector, or its rates more than once: of MultiheadAttention with `kdim` or
    `vdim` the query's, key's and value's weights have a third each, in that order, and so have `bias_k` and `bias_v`;
    of a grouped transposed convolution an input channel's rates are those of its group's outputs.

    rule: "built-in", "registered" (by `register_feature_layout`), "shape" (no rule, and a parameter that is broadcast
        along dim 0: one rate per index of its last), or "default": no rule, one rate per index of dim 0.
    kind: "feature", "clone" or "weight" (one rate per entry). group, lr_min, lr_max: None where a model was given.
    orthogonalized: whether `AlraoMuon` orthogonalises its momentum; None of other optimizers.
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
    orthogonalized: bool | None = None
    lr_min: float | None = None
    lr_max: float | None = None


class _Stdout:
    """The default of `file`: standard output as it is at the call."""

    def __repr__(self) -> str:
        return "sys.stdout"


_STDOUT: Any = _Stdout()


def describe_rates(
    model_or_optimizer: nn.Module | AlraoOptimizer,
    *,
    details: bool = False,
    file: TextIO | None = _STDOUT,
) -> list[RateRow]:
    """Print which entries share a rate, and return one row per parameter.

    Args:
        model_or_optimizer: a module, or an `AlraoSGD`, `AlraoAdam` or `AlraoMuon`.
        details: False prints one line per rule and module class, the largest first: its parameters, entries, their
            share of all and the number of rates, a shared vector counted once. True prints every row; of an optimizer
            the drawn rates' range and the param group, too; of `AlraoMuon` which parameters are orthogonalised.
        file: where to, standard output by default; None prints nothing.

    TypeError for anything else.
    """
    details = Flag().check("details", details)
    if file is _STDOUT:
        file = sys.stdout
    elif file is not None and not callable(getattr(file, "write", None)):
        raise TypeError(f"file: got {shown(file)}, expected a writable text file or None")
    if isinstance(model_or_optimizer, AlraoOptimizer):
        optimizer = model_or_optimizer
        rows, layouts = _optimizer_rows(optimizer)
    elif isinstance(model_or_optimizer, nn.Module):
        table = resolve_all([model_or_optimizer])
        rows, layouts = (
            [_row(param, layout) for param, layout in table.items()],
            list(table.values()),
        )
    else:
        raise TypeError(
            f"model_or_optimizer: got {shown(model_or_optimizer)}, expected a torch.nn.Module, AlraoSGD, AlraoAdam or "
            "AlraoMuon"
        )
    if file is not None:
        print(_table(rows) if details else _summary(rows, layouts), file=file)
    return rows


def _optimizer_rows(optimizer: AlraoOptimizer) -> tuple[list[RateRow], list[Layout]]:
    optimizer.refresh()
    rows, layouts = [], []
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            rate, layout = optimizer.state[param]["rate"], optimizer.layout_of(param)
            found = [(param, layout, rate)]
            if isinstance(layout, FlatLayout):
                found = [(part.twin, part.layout, part.rates(rate)) for part in layout.slices]
            for whole, own, rates in found:
                row = _row(whole, own)._replace(
                    group=number,
                    trainable=param.requires_grad,
                    orthogonalized=group.get("orthogonalize"),
                )
                if rates.numel():
                    row = row._replace(lr_min=float(rates.min()), lr_max=float(rates.max()))
                rows.append(row)
                layouts.append(own)
    return rows, layouts


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


def _summary(rows: list[RateRow], layouts: list[Layout]) -> str:
    total = sum(math.prod(row.shape) for row in rows)
    groups: dict[tuple[str, str], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((row.rule, row.module), []).append(number)
    lines = []
    for (rule, module), numbers in groups.items():
        entries = sum(math.prod(rows[n].shape) for n in numbers)
        features = sum({layouts[n].vector: rows[n].features for n in numbers}.values())
        lines.append(
            (
                entries,
                [rule, module, len(numbers), entries, f"{entries / max(total, 1):.1%}", features],
            )
        )
    lines.sort(key=lambda line: -line[0])
    heading = ["rule", "module", "parameters", "entries", "share", "features"]
    return _aligned([heading] + [[str(cell) for cell in line] for _, line in lines])


def _table(rows: list[RateRow]) -> str:
    names = [n for n in RateRow._fields if any(getattr(row, n) is not None for row in rows)]
    return _aligned([names] + [[_cell(getattr(row, n)) for n in names] for row in rows])


def _aligned(cells: list[list[str]]) -> str:
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
