"""A network's last layer without the package: one of them for ordinary training, or Alrao's clones one by one."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss


def first(out):
    """The features or the loss, without the state of a recurrent network that may come along."""
    return out[0] if isinstance(out, tuple) else out


class PlainModel(nn.Module):
    """Backbone and one linear classifier: the network that plain SGD or Adam trains, with `AlraoModel`'s call.

    With `extras`, what the backbone returns beside the features comes back too, as it does from an `AlraoModel`.
    """

    def __init__(
        self, backbone: nn.Module, features: int, classes: int, *, extras: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, classes)
        self.extras = extras

    def forward(self, *args, targets: Tensor | None = None):
        out = self.backbone(*args)
        logits = self.head(first(out))
        if targets is None:
            result = logits.log_softmax(-1)
        else:
            result = cross_entropy(logits.flatten(0, -2), targets.flatten())
        return (result, *out[1:]) if self.extras and isinstance(out, tuple) else result


class PlainRegressor(nn.Module):
    """Backbone and one linear regressor, trained as `RegressorClones` is: by the log-likelihood of unit variance."""

    def __init__(self, backbone: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, outputs)

    def forward(self, *args, targets: Tensor | None = None):
        values = self.head(first(self.backbone(*args)))
        if targets is None:
            return values
        return (values - targets).square().sum(-1).mean() / 2


class ClonesOneByOne(nn.Module):
    """Alrao's head the straightforward way: N separate layers, evaluated for the mixture and again for their own loss.

    `losses` returns the mixture loss and the list of the clones' own losses (on detached features); the training step
    backpropagates all N + 1. This is what the fused head replaces, kept as the peer it is measured against.
    """

    def __init__(self, backbone: nn.Module, features: int, classes: int, clones: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.clones = nn.ModuleList(nn.Linear(features, classes) for _ in range(clones))
        self.register_buffer("log_posterior", torch.full((clones,), 1 / clones).log())

    def losses(self, *args, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = first(self.backbone(*args)).flatten(0, -2)
        targets = targets.flatten()
        log_probs = [clone(features).log_softmax(-1) for clone in self.clones]
        joint = torch.stack(log_probs, dim=-1) + self.log_posterior
        mixture = nll_loss(torch.logsumexp(joint, dim=-1), targets)
        fixed = features.detach()
        own = [cross_entropy(clone(fixed), targets) for clone in self.clones]
        return mixture, own

    def backward(self, mixture: Tensor, own: list[Tensor]) -> None:
        """Gradient of the mixture loss in the backbone, of its own loss in each clone."""
        mixture.backward()
        self.clones.zero_grad()
        for loss in own:
            loss.backward()
