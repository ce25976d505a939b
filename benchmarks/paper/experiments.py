"""Which runs each table and figure of the paper is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from paper.cases import Case
from paper.published import BEST_LR
from paper.tasks import Task

NETWORKS = ("mobilenet", "googlenet", "vgg19", "lstm-chars", "lstm-words")
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)


class Plan(NamedTuple):
    """What the command line says about every run of one network."""

    network: str
    task: Task
    seeds: int
    epochs: int
    patience: int
    width: float
    widths: tuple[float, ...]
    dropout: float
    amp: str | None
    grid: list[float]
    lr_range: tuple[float, float]
    clones: int

    def case(self, method: str, seed: int, **options: Any) -> Case:
        train, valid, test = self.task.sizes
        if method.startswith("alrao"):
            options = {"lr_range": self.lr_range, "clones": self.clones, **options}
        common = {"width": self.width, "dropout": self.dropout, "amp": self.amp}
        return Case(
            network=self.network,
            method=method,
            data=self.task.data,
            train=train,
            valid=valid,
            test=test,
            epochs=self.epochs,
            patience=self.patience,
            seed=seed,
            **{**common, **options},
        )


def comparison(plan: Plan) -> Iterator[Case]:
    """Table 1, figure 2: Alrao, Adam, and SGD at every rate of the grid."""
    for seed in range(plan.seeds):
        yield from _comparison(plan, seed)


def _comparison(plan: Plan, seed: int, **options: Any) -> Iterator[Case]:
    yield plan.case("alrao", seed, **options)
    yield plan.case("adam", seed, **options)
    for lr in plan.grid:
        yield plan.case("sgd", seed, lr=lr, **options)


def triangle(plan: Plan) -> Iterator[Case]:
    """Figure 3: Alrao on every interval between rates of the grid; on the diagonal, SGD."""
    for seed in range(plan.seeds):
        for lo in plan.grid:
            for hi in plan.grid:
                if lo < hi:
                    yield plan.case("alrao", seed, lr_range=(lo, hi))
                elif lo == hi:
                    yield plan.case("sgd", seed, lr=lo)


def alrao_alone(plan: Plan) -> Iterator[Case]:
    """Figure 4: the posterior over the clones."""
    for seed in range(plan.seeds):
        yield plan.case("alrao", seed)


def adam(plan: Plan) -> Iterator[Case]:
    """Figure 5: Alrao on Adam, against Adam and Alrao on SGD."""
    for seed in range(plan.seeds):
        for method in ("alrao", "adam", "alrao-adam"):
            yield plan.case(method, seed)


def per_weight(plan: Plan) -> Iterator[Case]:
    """Figure 6 (appendix E): a rate for each weight, against a rate for each feature."""
    for seed in range(plan.seeds):
        for method in ("alrao", "alrao-per-weight"):
            yield plan.case(method, seed)


def fractions(plan: Plan) -> Iterator[Case]:
    """Figure 7 (appendix F): SGD at the paper's best rate, on a random part of the features."""
    for seed in range(plan.seeds):
        for p in FRACTIONS:
            yield plan.case("fraction", seed, p=p, lr=BEST_LR.get(plan.network, 1.0))


def widths(plan: Plan) -> Iterator[Case]:
    """Figure 8: everything of table 1, at each width."""
    for seed in range(plan.seeds):
        for width in plan.widths:
            yield from _comparison(plan, seed, width=plan.width * width)


# Command -> its runs.
EXPERIMENTS: dict[str, Callable[[Plan], Iterator[Case]]] = {
    "table1": comparison,
    "figure2": comparison,
    "figure3": triangle,
    "figure4": alrao_alone,
    "figure5": adam,
    "figure6": per_weight,
    "figure7": fractions,
    "figure8": widths,
}
# The networks that a command trains unless --models names others.
DEFAULT_NETWORKS = {
    "table1": ("mobilenet", "googlenet", "vgg19", "lstm-chars"),
    "figure2": ("mobilenet", "googlenet", "vgg19", "lstm-chars"),
    "figure3": ("googlenet",),
    "figure4": ("googlenet",),
    "figure5": ("mobilenet", "googlenet", "vgg19", "lstm-chars"),
    "figure6": ("googlenet",),
    "figure7": ("googlenet",),
    "figure8": ("mobilenet", "googlenet"),
}
