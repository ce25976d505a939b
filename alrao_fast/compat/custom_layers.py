"""The last layers and the losses that scripts name."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alrao_fast.ops.mixture.likelihood import SIGMA2


class LinearClassifier(nn.Module):
    """Log-probabilities of `n_classes` classes: a linear layer `fc` and log_softmax over dim 1."""

    def __init__(self, in_features: int, n_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.fc(x), dim=1)


class LinearClassifierRNN(nn.Module):
    """Log-probabilities [T * B, ntoken] of the next token from features [T, B, nhid]: a linear layer `decoder`."""

    def __init__(self, nhid: int, ntoken: int) -> None:
        super().__init__()
        self.nhid = nhid
        self.ntoken = ntoken
        self.decoder = nn.Linear(nhid, ntoken)
        self.init_weights()

    def init_weights(self) -> None:
        """Weights uniform on [-0.1, 0.1], no bias."""
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.decoder(x.reshape(-1, self.decoder.in_features)), dim=1)


class LinearRegressor(nn.Module):
    """A linear layer `layer`; ValueError if its output is not finite."""

    def __init__(self, dim_input: int, dim_output: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim_input, dim_output)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        if not bool(out.isfinite().all()):
            raise ValueError("the output of LinearRegressor is not finite: the layer has diverged")
        return out


class _GaussianLoss(nn.Module):
    def __init__(self, sigma2: float = 1.0) -> None:
        super().__init__()
        self.sigma2 = float(SIGMA2.check("sigma2", sigma2))

    def constant(self) -> float:
        return 0.5 * math.log(2 * math.pi * self.sigma2)


class L2LossLog(_GaussianLoss):
    """Gaussian negative log-likelihood: mean over the batch of |input - target|^2 / (2 sigma2), summed over dim 1,
    plus log(2 pi sigma2) / 2, once whatever the dimension."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        squared = (input - target).square().sum(1)
        return squared.mean() / (2 * self.sigma2) + self.constant()


class L2LossAdditional(_GaussianLoss):
    """Negative log-likelihood of the mixture: `loss((means [B, K, N], ps [N]), target [B, K])` is minus the mean over
    the batch of log sum_k ps_k exp(-|means_k - target|^2 / (2 sigma2) - log(2 pi sigma2) / 2)."""

    def forward(self, input: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        means, ps = input
        squared = (means - target.unsqueeze(-1)).square().sum(1)
        log_density = -squared / (2 * self.sigma2) - self.constant()
        # In the logarithm, so that a layer far off every target leaves 0, not log 0.
        return -torch.logsumexp(ps.log() + log_density, dim=-1).mean()
