"""Which runs each table and figure of the paper is made of; a run is a case, named by all that decides its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.experiments.methods import METHODS, Setting
from benchmarks.results import Record

NETWORKS = ("mobilenet", "googlenet", "vgg19", "lstm-chars", "lstm-words")
# What the paper reports as the rate of the best SGD of its grid.
BEST_LR = {"mobilenet": 1e-1, "googlenet": 1e-2, "vgg19": 1e-1, "lstm-chars": 1.0}
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run.

    `lr` is SGD's rate, `lr_range` and `clones` are Alrao's, `p` is the part of the features that learn; `data` names
    the data's content and `train`, `valid` and `test` count its images or tokens. `seed` decides initial values, rates,
    order of the images and their crops.
    """

    network: str
    method: str
    data: str
    train: int
    valid: int
    test: int
    epochs: int
    patience: int
    seed: int = 0
    width: float = 1.0
    dropout: float = 0.0
    amp: str | None = None
    lr: float | None = None
    lr_range: tuple[float, float] | None = None
    clones: int | None = None
    p: float | None = None

    @classmethod
    def of(cls, fields: Record) -> Case:
        """From what `record` returned."""
        ends = fields.get("lr_range")
        return cls(**{**fields, "lr_range": None if ends is None else tuple(ends)})

    def record(self) -> Record:
        """As JSON holds it, without what does not apply."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        return {key: value for key, value in fields.items() if value is not None}

    def key(self) -> str:
        """A name for files, from the content."""
        content = json.dumps(self.record(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def setting(self) -> Setting:
        """What the optimizer is made from."""
        return Setting(self.lr, self.lr_range, self.seed, self.p)

    def label(self) -> str:
        """The method and its parameters, for progress bars and tables."""
        if self.method == "sgd":
            return f"SGD {self.lr:g}"
        if self.method == "fraction":
            return f"SGD {self.lr:g} on {self.p:.0%} of the features"
        if self.lr_range is not None:
            return f"{METHODS[self.method].label} ({self.lr_range[0]:g}, {self.lr_range[1]:g})"
        return METHODS[self.method].label

    def title(self) -> str:
        """Network, method and seed."""
        width = "" if self.width == 1 else f" x{self.width:g}"
        return f"{self.network}{width} {self.label()} seed {self.seed}"


class Plan(NamedTuple):
    """What the command line says about every run of one network: `base` is such a run of plain Alrao."""

    base: Case
    seeds: int
    widths: tuple[float, ...]
    grid: list[float]

    def case(self, method: str, seed: int, **options: Any) -> Case:
        """A run; only Alrao's have an interval and clones."""
        if not METHODS[method].is_alrao:
            options |= {"lr_range": None, "clones": None}
        return dataclasses.replace(self.base, method=method, seed=seed, **options)


def comparison(plan: Plan, seed: int, **options: Any) -> Iterator[Case]:
    """Table 1, figure 2: Alrao, Adam, and SGD at every rate of the grid."""
    yield plan.case("alrao", seed, **options)
    yield plan.case("adam", seed, **options)
    for lr in plan.grid:
        yield plan.case("sgd", seed, lr=lr, **options)


def triangle(plan: Plan, seed: int) -> Iterator[Case]:
    """Figure 3: Alrao on every interval between rates of the grid; on the diagonal, SGD."""
    for lo in plan.grid:
        for hi in plan.grid:
            if lo < hi:
                yield plan.case("alrao", seed, lr_range=(lo, hi))
            elif lo == hi:
                yield plan.case("sgd", seed, lr=lo)


def methods(*names: str) -> Callable[[Plan, int], Iterator[Case]]:
    """One run of each method."""
    return lambda plan, seed: (plan.case(name, seed) for name in names)


def fractions(plan: Plan, seed: int) -> Iterator[Case]:
    """Figure 7 (appendix F): SGD at the paper's best rate, on a random part of the features."""
    for p in FRACTIONS:
        yield plan.case("fraction", seed, p=p, lr=BEST_LR.get(plan.base.network, 1.0))


def widths(plan: Plan, seed: int) -> Iterator[Case]:
    """Figure 8: everything of table 1, at each width."""
    for width in plan.widths:
        yield from comparison(plan, seed, width=plan.base.width * width)


class Experiment(NamedTuple):
    """Its runs of one seed, and the networks that are trained unless --models names others."""

    runs: Callable[[Plan, int], Iterator[Case]]
    networks: tuple[str, ...] = ("googlenet",)

    def cases(self, plan: Plan) -> Iterator[Case]:
        for seed in range(plan.seeds):
            yield from self.runs(plan, seed)


_MOST = ("mobilenet", "googlenet", "vgg19", "lstm-chars")
# Command -> its runs. Figure 4: the posterior over the clones. Figure 5: Alrao on Adam, against Adam and Alrao on SGD.
# Figure 6 (appendix E): a rate for each weight, against a rate for each feature.
EXPERIMENTS = {
    "table1": Experiment(comparison, _MOST),
    "figure2": Experiment(comparison, _MOST),
    "figure3": Experiment(triangle),
    "figure4": Experiment(methods("alrao")),
    "figure5": Experiment(methods("alrao", "adam", "alrao-adam"), _MOST),
    "figure6": Experiment(methods("alrao", "alrao-per-weight")),
    "figure7": Experiment(fractions),
    "figure8": Experiment(widths, ("mobilenet", "googlenet")),
}
