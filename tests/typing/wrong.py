"""Mistakes that a type checker finds: each line has the code of its error."""

from torch import nn

from alrao_fast import *  # noqa: F403

AlraoModel(nn.Linear(2, 2), nn.Linear(2, 2))  # noqa: F405  [arg-type]
AlraoSGD(nn.Linear(2, 2), momentum="high")  # noqa: F405  [arg-type]
ClassifierClones(2, num_classes="3")  # noqa: F405  [arg-type]
print(describe_rates(nn.Linear(2, 2)).rows)  # noqa: F405  [attr-defined]
rank({}, [], [], widht=2)  # noqa: F405  [call-arg]
AlraoModel(nn.Linear(2, 2), ClassifierClones(2, 2)).suggested_lr().item()  # noqa: F405  [attr-defined]
