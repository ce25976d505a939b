"""A small model, its training, and the comparison of two optimizers, for the tests of checkpoints."""

import torch
from torch import nn

from alrao_fast.nn import AlraoModel, ClassifierClones


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(dtype=torch.float32, seed=0) -> AlraoModel:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh())
    model = AlraoModel(backbone, ClassifierClones(8, 3, num_clones=4))
    model.backbone[1].bias.requires_grad_(False)
    return model.to(dtype)


def train(model, optimizer, steps) -> None:
    for step in steps:
        torch.manual_seed(500 + step)
        x, y = torch.randn(10, 6), torch.randint(3, (10,))
        optimizer.zero_grad()
        model(x.to(next(model.parameters())), targets=y).backward()
        optimizer.step()


def assert_same_state(a, b) -> None:
    for group, other in zip(a.param_groups, b.param_groups):
        for key in group:
            if key != "params":
                assert group[key] == other[key], key
        for p, q in zip(group["params"], other["params"]):
            assert torch.equal(p, q)
            assert a.state[p].keys() == b.state[q].keys()
            for key, value in a.state[p].items():
                assert value.dtype == b.state[q][key].dtype, key
                assert torch.equal(value, b.state[q][key]), key
