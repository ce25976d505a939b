"""What the tests of ranks with batches that differ share: networks and their losses, batches, and states."""

import torch
from torch import nn

import alrao_fast as alrao

WORLD = 2
# Sizes of the batches of both ranks in each epoch; the first rank has none in the second.
EPOCHS = ((3, 5), (4, 1, 7)), ((), (6, 2)), ((2, 8, 3), (5,))


class TwoHeads(nn.Module):
    """A classifier and a regressor, of which the one that is registered last observes first."""

    def __init__(self, evidence):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.classify = alrao.ClassifierClones(8, 5, 3, evidence=evidence)
        self.regress = alrao.RegressorClones(8, 2, 4, evidence=evidence)

    def forward(self, x, targets, num_items_in_batch=None):
        features, items = self.backbone(x), {"num_items_in_batch": num_items_in_batch}
        regression = self.regress(features, values(x), **items)
        return self.classify(features, targets, **items) + regression


def values(x):
    return x[:, :2] * x[:, 2:4]


def classifier(evidence):
    backbone = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh())
    return alrao.AlraoModel(backbone, alrao.ClassifierClones(8, 5, 3, evidence=evidence))


def regressor(evidence):
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    return alrao.AlraoModel(backbone, alrao.RegressorClones(8, 2, 3, evidence=evidence))


def by_criterion(net):
    criterion = alrao.MixtureLoss(net.module if hasattr(net, "module") else net)
    return lambda x, y, items: criterion(net(x), y, num_items_in_batch=items)


def by_values(net):
    return lambda x, y, items: net(x, targets=values(x), num_items_in_batch=items)


def by_targets(net):
    return lambda x, y, items: net(x, targets=y, num_items_in_batch=items)


CASES = {
    "mean": (classifier, "mean", by_targets),
    "sum": (classifier, "sum", by_targets),
    "criterion": (classifier, "mean", by_criterion),
    "regression": (regressor, "sum", by_values),
    "two heads": (TwoHeads, "mean", by_targets),
}


def build(case):
    make, evidence, loss_of = CASES[case]
    torch.manual_seed(0)
    return make(evidence), loss_of


def optimizer(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return alrao.AlraoAdam(
        net, lr_range=(1e-3, 1e-1), eps=1e-3, averaging=4, total_steps=20, generator=generator
    )


def samples(epoch, rank, k):
    generator = torch.Generator().manual_seed(100 * epoch + 10 * k + rank)
    size = EPOCHS[epoch][rank][k]
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(5, (size,), generator=generator)


def together(epoch, k):
    """The batches of all ranks that have one."""
    own = [samples(epoch, r, k) for r in range(WORLD) if k < len(EPOCHS[epoch][r])]
    return tuple(torch.cat(parts) for parts in zip(*own))


def items_of(epoch, k):
    """What each rank's sum is divided by, so that the mean over ranks is the mean over samples."""
    return len(together(epoch, k)[1]) / WORLD


def state(net, opt):
    heads = [m for m in net.modules() if hasattr(m, "running")]
    return {
        **{name: value.clone() for name, value in net.state_dict().items()},
        **{f"running {k}": head.running.clone() for k, head in enumerate(heads)},
        **{
            f"{name}.{key}": value.clone()
            for name, p in net.named_parameters()
            for key, value in opt.state[p].items()
        },
    }


def told(error, call):
    try:
        call()
    except error as raised:
        return str(raised)
    return ""


def accumulation(step, k):
    generator = torch.Generator().manual_seed(7 + 10 * step + k)
    sizes = ((4, 2), (6, 0), (1, 5))[k]
    x, y = torch.randn(6, 6, generator=generator), torch.randint(5, (6,), generator=generator)
    return list(zip(x.split(sizes), y.split(sizes)))


@torch.no_grad()
def evaluation(net, x, y):
    """Sums of losses, of log-likelihoods and entropies, of what is right, and their number."""
    likelihood, entropy = net.head.log_likelihood(net.backbone(x), y)
    correct = (net(x).argmax(-1) == y).sum()
    loss = net(x, targets=y, reduction="sum")
    mean = net(x, targets=y) * len(y)
    return torch.stack(
        [loss, mean, likelihood.sum(), entropy.sum(), correct.float(), torch.tensor(float(len(y)))]
    )
