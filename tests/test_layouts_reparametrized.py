"""Feature layouts of modules whose parameters were replaced: weight_norm, spectral_norm, orthogonal and pruned modules,
old style and torch.nn.utils.parametrizations.
"""

from __future__ import annotations

import pytest
import torch
from layout_harness import features, table
from torch import nn
from torch.nn.utils import parametrizations, prune


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("module", "lengths"),
    [
        (nn.utils.weight_norm(nn.Linear(3, 4)), {"weight_v": 4, "weight_g": 4, "bias": 4}),
        (
            nn.utils.weight_norm(nn.Linear(3, 4), dim=1),
            {"weight_v": 4, "weight_g": 3, "bias": 4},
        ),
        (
            nn.utils.weight_norm(nn.Linear(3, 4), dim=None),
            {"weight_v": 4, "weight_g": 1, "bias": 4},
        ),
        (
            nn.utils.weight_norm(nn.ConvTranspose1d(2, 3, 2), dim=1),
            {"weight_v": 3, "weight_g": 3, "bias": 3},
        ),
        (
            nn.utils.weight_norm(nn.ConvTranspose1d(4, 6, 2, groups=2), dim=0),
            {"weight_v": 6, "weight_g": 4, "bias": 6},
        ),
        (
            nn.utils.weight_norm(nn.LSTM(2, 3), "weight_hh_l0"),
            {
                "weight_ih_l0": 3,
                "weight_hh_l0_v": 3,
                "weight_hh_l0_g": 3,
                "bias_ih_l0": 3,
                "bias_hh_l0": 3,
            },
        ),
        (nn.utils.spectral_norm(nn.Linear(3, 4)), {"weight_orig": 4, "bias": 4}),
        (prune.random_unstructured(nn.Linear(3, 4), "weight", 0.5), {"weight_orig": 4, "bias": 4}),
        (
            parametrizations.weight_norm(nn.Conv2d(2, 3, 2)),
            {
                "parametrizations.weight.original0": 3,
                "parametrizations.weight.original1": 3,
                "bias": 3,
            },
        ),
        (
            parametrizations.weight_norm(nn.Linear(3, 4), dim=1),
            {
                "parametrizations.weight.original0": 3,
                "parametrizations.weight.original1": 4,
                "bias": 4,
            },
        ),
        (
            parametrizations.weight_norm(nn.GRU(2, 3, bias=False), "weight_hh_l0"),
            {
                "weight_ih_l0": 3,
                "parametrizations.weight_hh_l0.original0": 3,
                "parametrizations.weight_hh_l0.original1": 3,
            },
        ),
        (
            parametrizations.spectral_norm(nn.Linear(3, 4)),
            {"parametrizations.weight.original": 4, "bias": 4},
        ),
        (
            parametrizations.orthogonal(nn.Embedding(5, 3)),
            {"parametrizations.weight.original": 3},
        ),
    ],
)
def test_reparametrized(module, lengths):
    layouts = table(module)
    assert set(layouts) == {name for name, _ in module.named_parameters()}
    assert {name: layout.vector.length for name, layout in layouts.items()} == lengths
    main = [n for n in lengths if n.endswith(("_v", "_orig", "original", "original1"))]
    if "bias" in layouts:
        assert layouts[main[0]].vector is layouts["bias"].vector
    for name, param in module.named_parameters():
        features(param, layouts[name])


def test_parametrization_with_its_own_parameters():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return x * self.log_scale.exp().sum()

    module = nn.Linear(3, 4)
    nn.utils.parametrize.register_parametrization(module, "weight", Scale())
    layouts = table(module)
    assert layouts["parametrizations.weight.original"].vector is layouts["bias"].vector
    assert layouts["parametrizations.weight.0.log_scale"].rule == "default"
