"""What is trained: one run is one case, named by everything that decides its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from networks import PlainModel
from torch import nn

import alrao_fast as alrao

METHODS = {
    "sgd": "SGD",
    "adam": "Adam, default",
    "alrao": "Alrao",
    "alrao-adam": "Alrao-Adam",
    "alrao-per-weight": "Alrao, a rate per weight",
    "fraction": "SGD on a part of the features",
}


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

    def record(self) -> dict[str, Any]:
        """As JSON holds it, without what does not apply."""
        fields = {
            key: value for key, value in dataclasses.asdict(self).items() if value is not None
        }
        return json.loads(json.dumps(fields))

    def key(self) -> str:
        """A name for files, from the content."""
        content = json.dumps(self.record(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def label(self) -> str:
        """The method and its parameters, for progress bars and plots."""
        if self.method == "sgd":
            return f"SGD {self.lr:g}"
        if self.method == "fraction":
            return f"SGD {self.lr:g} on {self.p:.0%} of the features"
        if self.lr_range is not None:
            return f"{METHODS[self.method]} ({self.lr_range[0]:g}, {self.lr_range[1]:g})"
        return METHODS[self.method]


def build(
    case: Case, backbone: nn.Module, classes: int, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network on `device` and its optimizer. Initial values are drawn from torch's global generator, on the CPU."""
    features = int(backbone.out_features)  # type: ignore[arg-type]
    if case.method in ("alrao", "alrao-adam", "alrao-per-weight"):
        assert case.clones is not None and case.lr_range is not None
        head = alrao.ClassifierClones(features, classes, case.clones)
        net: nn.Module = alrao.AlraoModel(backbone, head).to(device)
        rates = torch.Generator().manual_seed(case.seed)
        if case.method == "alrao-adam":
            return net, alrao.AlraoAdam(net, case.lr_range, generator=rates)
        sampler = alrao.PerWeight(*case.lr_range) if case.method == "alrao-per-weight" else None
        return net, alrao.AlraoSGD(net, case.lr_range, sampler=sampler, generator=rates)
    model = PlainModel(backbone, features, classes, extras=True).to(device)
    if case.method == "adam":
        return model, torch.optim.Adam(
            model.parameters(), fused=True, capturable=device.type == "cuda"
        )
    assert case.lr is not None
    if case.method == "sgd":
        return model, torch.optim.SGD(model.parameters(), lr=case.lr, fused=True)
    assert case.method == "fraction" and case.p is not None
    # The last layer always learns: no other part of the network could make up for its classes.
    groups = [
        {"params": model.backbone, "sampler": alrao.Fraction(case.p, case.lr)},
        {"params": model.head, "sampler": alrao.Constant(case.lr)},
    ]
    return model, alrao.AlraoSGD(groups, generator=torch.Generator().manual_seed(case.seed))
