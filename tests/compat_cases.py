"""Last layers of several kinds and small models of them, for the tests of compat."""

import torch
import torch.nn.functional as F
from torch import nn

import alrao_fast.compat as alrao

N, D, C, B = 4, 6, 3, 8


class Loose(nn.Module):
    """One Linear and log_softmax, in a class of the user's."""

    def __init__(self, d=D, c=C):
        super().__init__()
        self.out = nn.Linear(d, c)
        self.temperature = 1.0

    def forward(self, x):
        return F.log_softmax(self.out(x) / self.temperature, dim=-1)


class Deep(nn.Module):
    def __init__(self, d=D, c=C):
        super().__init__()
        self.a, self.b = nn.Linear(d, 5), nn.Linear(5, c)

    def forward(self, x):
        return F.log_softmax(self.b(torch.tanh(self.a(x))), dim=1)


class Normed(nn.Module):
    """Buffers that the forward changes: nothing for torch.func."""

    def __init__(self, d=D, c=C):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(d), nn.Linear(d, c)

    def forward(self, x):
        return F.log_softmax(self.fc(self.norm(x)), dim=1)


class Clamped(nn.Module):
    """Looks linear near zero."""

    def __init__(self, d=D, c=C):
        super().__init__()
        self.fc = nn.Linear(d, c)

    def forward(self, x):
        return F.log_softmax(self.fc(x).clamp(-20, 20), dim=1)


def model(layer=alrao.LinearClassifier, n=N, task="classification", loss=None, seed=0, args=(D, C)):
    torch.manual_seed(seed)
    internal = nn.Sequential(nn.Linear(5, D), nn.Tanh())
    return alrao.AlraoModel(task, loss or nn.NLLLoss(), internal, n, layer, *args).double()


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(C, (B,), generator=generator)


def sgd(net, **options):
    rates = [0.1 * 2.0**-k for k in range(net.n_last_layers)]
    return alrao.SGDAlrao(
        net.parameters_internal_nn(),
        [0.1, 0.05],
        net.last_layers_parameters_list(),
        rates,
        **options,
    )
