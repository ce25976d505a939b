"""Protects averages of models that average buffers, the switch's log-posterior among them.

- A case by hand; posterior, predictions, losses, suggested rate and collapse are of probabilities that sum to 1.
- torch's averages, exponential and equal, and the formulas of other libraries; float16; a switch that has seen nothing;
  clones without any mass; compat.
- Training goes on from an average.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from clones_harness import C, D, N, classifier, regressor
from torch import nn
from torch.optim import swa_utils

import alrao_fast.compat as authors
from alrao_fast.nn import AlraoModel, Switch
from alrao_fast.optim import AlraoSGD

OP = "switch_mixture"
pytestmark = pytest.mark.usefixtures("used_backend", "used_device")

AVERAGES = {
    "equal": {},
    "equal-one-by-one": {"avg_fn": swa_utils.get_swa_avg_fn()},
    "exponential": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "exponential-one-by-one": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    # Few updates: most of the first model is left, and t, which torch cuts off, stands still.
    "slow": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.999)},
}


def model(make=classifier):
    return AlraoModel(nn.Sequential(nn.Linear(5, D), nn.Tanh()), make())


def observe(switch):
    switch.update(3 * torch.randn(N))


def averaged(net, *, steps=20, **arguments):
    if next(net.parameters()).is_cuda:
        # torch's own choice there refuses integers: t, and BatchNorm's counter.
        arguments = arguments or {"avg_fn": swa_utils.get_swa_avg_fn()}
    average = swa_utils.AveragedModel(net, use_buffers=True, **arguments)
    for _ in range(steps):
        observe(net.head.switch)
        average.update_parameters(net)
    return average.module


def expected_probabilities(net):
    return net.head.switch.log_posterior.softmax(0)


def test_by_hand():
    # The geometric means of (1/2, 1/2) and (1/5, 4/5) are as 1 to 2.
    switch, other = Switch(2), Switch(2)
    other.log_posterior.copy_(torch.tensor([0.2, 0.8]).log())
    average = swa_utils.AveragedModel(switch, use_buffers=True)
    for s in (switch, other):
        average.update_parameters(s)
    assert average.module.log_posterior.exp().sum().item() == pytest.approx(0.9 * 10**0.5 / 3)
    torch.testing.assert_close(
        average.module.posterior(), torch.tensor([1 / 3, 2 / 3]).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("arguments", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("half", [False, True])
def test_torch_averages(arguments, half):
    net = model().half() if half else model()
    average = averaged(net, **arguments)
    assert average.head.switch.log_posterior.exp().sum().item() < 0.99
    torch.testing.assert_close(average.posterior(), expected_probabilities(average))
    assert average.posterior().sum().item() == pytest.approx(1, abs=1e-12)
    assert 1 <= average.head.switch.t.item() <= net.head.switch.t.item()


@pytest.mark.emulated
@pytest.mark.parametrize("make", [classifier, regressor])
def test_readers(backend, make):
    average = averaged(model(make)).eval()
    head, p = average.head, expected_probabilities(average)
    x = torch.randn(4, 5)
    y = torch.randint(C, (4,)) if make is classifier else torch.randn(4, C)
    outputs = head.clone_outputs(average.backbone(x)).double()
    weights = p.view(N, 1, 1)
    if make is classifier:
        prediction = (weights * outputs.softmax(-1)).sum(0).log()
        loss = F.nll_loss(prediction, y)
        plain = prediction
    else:
        plain = prediction = (weights * outputs).sum(0)
        logp = -(outputs - y).square().sum(-1) / 2 - C / 2 * math.log(2 * math.pi)
        loss = -(p.view(N, 1) * logp.exp()).sum(0).log().mean()
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(average(x), prediction, **close)
    torch.testing.assert_close(average(x, targets=y), loss, **close)
    torch.testing.assert_close(average.collapse("mixture")(x), plain, **close)
    if make is regressor:
        other = head.clone_loss(average.backbone(x), lambda out: -logp.float())
        torch.testing.assert_close(other, loss, **close)


def test_suggested_lr():
    net = model()
    AlraoSGD(net, lr_range=(1e-4, 1.0))
    average = averaged(net)
    p = expected_probabilities(average)
    rates = average.head.clone_lr.double()
    assert average.suggested_lr() == pytest.approx((p * rates.log()).sum().exp().item())


def test_nothing_seen():
    net = model()
    average = averaged(net, steps=0)
    torch.testing.assert_close(average.posterior(), torch.full((N,), 1 / N).double())
    average = swa_utils.AveragedModel(net, use_buffers=True)
    for _ in range(3):
        average.update_parameters(net)
    torch.testing.assert_close(average.module.posterior(), torch.full((N,), 1 / N).double())
    assert average.module.head.switch.t.item() == 1


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_clone_without_mass(value):
    """Where a log-posterior was -inf, some formulas for averages give NaN."""
    switch = Switch(3)
    switch.log_posterior.copy_(torch.tensor([0.25, 0.25, 0.5]).log())
    switch.log_posterior[1] = value
    expected = torch.tensor([1 / 3, 0, 2 / 3]).double()
    torch.testing.assert_close(switch.posterior(), expected, rtol=1e-6, atol=0)
    switch.log_posterior.fill_(value)
    assert switch.posterior().isnan().all()


def test_other_libraries_formula():
    """Every entry of the state_dict, whole numbers too, by decay * old + (1 - decay) * new."""
    net = model()
    average = copy.deepcopy(net)
    for _ in range(20):
        observe(net.head.switch)
        with torch.no_grad():
            for old, new in zip(average.state_dict().values(), net.state_dict().values()):
                old.copy_(old * 0.9 + new * 0.1)
    torch.testing.assert_close(average.posterior(), expected_probabilities(average))
    assert average.posterior().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.emulated
def test_training_goes_on(backend):
    average = averaged(model())
    partner = copy.deepcopy(average)
    switch = partner.head.switch
    shift = switch.logw.logsumexp((0, 1))
    switch.logw -= shift
    switch.log_posterior.copy_(switch.logw.logsumexp(0))
    x, y = torch.randn(4, 5), torch.randint(C, (4,))
    for net in (average, partner):
        net(x, targets=y).backward()
    torch.testing.assert_close(average.head.switch.logw, switch.logw)
    assert average.head.switch.log_posterior.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for p, q in zip(average.parameters(), partner.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_compat(task):
    switch = authors.Switch(
        N, task=task, loss=nn.NLLLoss() if task == "classification" else nn.MSELoss()
    )
    average = swa_utils.AveragedModel(switch, use_buffers=True)
    for _ in range(5):
        switch.observe(3 * torch.randn(N).abs(), None, torch.zeros(1))
        average.update_parameters(switch)
    p = average.module.logposterior.softmax(0)
    assert average.module.logposterior.exp().sum().item() < 0.99
    torch.testing.assert_close(average.module.posterior(), p)
    outputs = torch.randn(N, 4, C, dtype=torch.float64).log_softmax(-1)
    result = average.module(list(outputs))
    if task == "classification":
        torch.testing.assert_close(result, (p.view(N, 1, 1) * outputs.exp()).sum(0).log())
    else:
        torch.testing.assert_close(result[1], p)


def test_compat_model():
    backbone = nn.Sequential(nn.Linear(5, D), nn.Tanh())
    net = authors.AlraoModel(
        "classification", nn.NLLLoss(), backbone, N, authors.LinearClassifier, D, C
    )
    net.switch.logposterior -= 1
    x = torch.randn(4, 5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(net(x).exp().sum(-1), torch.ones(4))
