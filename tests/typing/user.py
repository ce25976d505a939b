"""A user's program: type-checked by test_typing.py, never run."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import alrao_fast as alrao
from alrao_fast import AlraoModel, AlraoSGD, ClassifierClones, RegressorClones
from alrao_fast.functional import switch_mixture_log_prob, switch_mixture_nll


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(3):
        yield torch.randn(8, 4), torch.randint(3, (8,))


def backbone(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU())


head = ClassifierClones(in_features=16, num_classes=3, num_clones=4)
net = AlraoModel(backbone(16), head)
opt = AlraoSGD(net, lr_range=(1e-5, 10.0), momentum=0.9, generator=torch.Generator())
scheduler = CosineAnnealingLR(opt, T_max=10)
for x, y in batches():
    opt.zero_grad()
    loss: Tensor = net(x, targets=y)
    loss.backward()
    opt.step()
    scheduler.step()
log_probs: Tensor = net.eval()(x)
posterior: Tensor = net.posterior()
rate: float = net.suggested_lr()
plain: nn.Module = net.collapse("best")
metrics: dict[str, Tensor] = net.clone_metrics(reset=True)
print(head.clone_outputs(x).shape, head.clone_lr.tolist(), head.switch.log_posterior)


def l1(outputs: Tensor) -> Tensor:
    return (outputs - x).abs().sum(-1)


print(head.clone_loss(x, l1))
regressor = RegressorClones(16, 2, sigma2=0.5)
adam = alrao.AlraoAdam([{"params": regressor.parameters(), "lr": 0.5}], betas=(0.9, 0.99))
one_cycle = OneCycleLR(adam, max_lr=1.0, total_steps=5)
adam.load_state_dict(copy.deepcopy(adam.state_dict()))
adam.add_param_group({"params": nn.Linear(2, 2), "sampler": alrao.Constant(0.1)})
closure_loss = opt.step(lambda: 1.0)
rows: list[alrao.RateRow] = alrao.describe_rates(net)
for row in rows:
    print(row.parameter, row)
samplers = [alrao.LogUniform(1e-5, 10.0), alrao.PerWeight(1e-5, 10.0), alrao.Fraction(0.5, 0.1)]
criterion = alrao.MixtureLoss(net)
value: Tensor = criterion(net(x), y)
switch = alrao.Switch(3, theta=0.99)
switch.update(torch.zeros(3))
with alrao.use_backend("reference"):
    nll = switch_mixture_nll(x, head.weight, head.bias, head.switch.log_posterior, y)
    lp: Tensor = switch_mixture_log_prob(x, head.weight, head.bias, head.switch.log_posterior)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


def rule(module: Gain) -> dict[str, alrao.Feature]:
    return {"gain": alrao.Feature(dim=0)}


alrao.register_feature_layout(Gain, rule)
alrao.register_feature_layout(Gain, lambda module: {"gain": alrao.Feature(dim=0)})

ranking: alrao.Ranking = alrao.rank(
    {"narrow": lambda: backbone(4), "wide": lambda: backbone(32)},
    list(batches()),
    list(batches()),
    num_classes=3,
    epochs=1,
)
best: alrao.Ranked = ranking[0]
print(best.suggested_lr, ranking)
step = alrao.GraphedStep(net, opt, x, y)
result: Tensor = step(x, y)
print(alrao.backends.status("switch_mixture", "cpu").available, alrao.__version__)
wide = alrao.nn.AlraoModel(backbone(4), alrao.nn.ClassifierClones(4, 2))
print(alrao.optim.AlraoSGD(wide).param_groups, alrao.functional.switch_mixture_mean)
history = alrao.History(net)
history.record()
for name, number in alrao.metrics(net, opt, prefix="a/").items():
    print(name, number.is_integer(), alrao.posterior_line(net))
alrao.plot.posterior(history).set_title("mine")
alrao.plot.rates(net, opt)
