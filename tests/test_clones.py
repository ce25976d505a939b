"""Protects what the heads compute (the mixture's arithmetic: test_switch_mixture.py).

- A case by hand; the mixture's gradient for the features, each clone's own for the clone; the same for any criterion.
- The switch: updated by training losses only, after mixing with the posterior from before; once per micro-batch.
- Dead clones; ignored targets; running statistics.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from clones_harness import (
    C,
    D,
    N,
    assert_same,
    batch,
    classifier,
    concentrate,
    own_losses,
    regressor,
    state,
)
from torch import nn

from alrao_fast.nn import ClassifierClones

OP = "switch_mixture"

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("used_backend", "used_device")]


def test_by_hand(backend):
    # Clone 0 gives the classes 1/4 and 3/4, clone 1 1/2 each; target 1 has 5/8, responsibilities 3/5 and 2/5.
    head = ClassifierClones(1, 2, 2, bias=False)
    log3 = math.log(3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[[0.0], [log3]], [[0.0], [0.0]]]))
    x = torch.ones(1, 1, requires_grad=True)
    loss = head(x, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(5 / 8), abs=1e-6)
    assert x.grad.item() == pytest.approx(-0.6 * 0.25 * log3, abs=1e-6)
    expected = torch.tensor([[[0.25], [-0.25]], [[0.5], [-0.5]]])
    torch.testing.assert_close(head.weight.grad, expected)
    metrics = head.clone_metrics()
    torch.testing.assert_close(
        metrics["loss"], -torch.tensor([0.75, 0.5], dtype=torch.float64).log(), rtol=1e-6, atol=0
    )
    assert metrics["accuracy"].tolist() == [1, 0]
    assert metrics["count"].item() == 1
    # (the class that comes first wins clone 1's tie)
    assert head.switch.posterior().argmax() == 0


@pytest.mark.parametrize("make", [classifier, regressor])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 2, 2)], ids=str)
def test_gradients(backend, make, shape):
    head = make(dtype=torch.float64)
    concentrate(head, -1, -2, -1.5)
    x, y = batch(*shape, dtype=torch.float64)
    if make is regressor:
        y = torch.randn(*shape, C, dtype=torch.float64)
    posterior = head.switch.posterior()
    loss = head(x, y)
    (3 * loss).backward()

    with torch.no_grad():
        fixed = [w.clone() for w in (head.weight, head.bias)]
    x_again = x.detach().requires_grad_()
    outputs = torch.einsum("...d,ncd->n...c", x_again, fixed[0]) + fixed[1].view(
        N, *[1] * len(shape), C
    )
    if make is classifier:
        logp = outputs.log_softmax(-1).gather(-1, y.expand(N, *shape).unsqueeze(-1)).squeeze(-1)
    else:
        logp = -(outputs - y).square().sum(-1) / 2 - C / 2 * math.log(2 * math.pi)
    mixture = -(posterior.view(N, *[1] * len(shape)) * logp.exp()).sum(0).log().mean()
    torch.testing.assert_close(loss, mixture)
    (3 * mixture).backward()
    torch.testing.assert_close(x.grad, x_again.grad)
    for own in own_losses(head, x.detach(), y):
        grads = torch.autograd.grad(3 * own, [head.weight, head.bias], retain_graph=True)
        for total, grad in zip((head.weight.grad, head.bias.grad), grads):
            total -= grad
    assert head.weight.grad.abs().max() < 1e-12
    assert head.bias.grad.abs().max() < 1e-12


@pytest.mark.parametrize("make", [classifier, regressor])
def test_any_criterion_as_the_built_in_one(backend, make):
    head = make(dtype=torch.float64)
    concentrate(head, -1, -2, -1.5)
    twin = copy.deepcopy(head)
    x, y = batch(2, 5, dtype=torch.float64)
    x_twin = x.detach().requires_grad_()
    if make is classifier:

        def criterion(out):
            return F.cross_entropy(out.movedim(-1, 1), y.expand(N, 2, 5), reduction="none")

    else:
        y = torch.randn(2, 5, C, dtype=torch.float64)

        def criterion(out):
            return (out - y).square().sum(-1) / 2 + C / 2 * math.log(2 * math.pi)

    loss = head(x, y)
    other = twin.clone_loss(x_twin, criterion)
    torch.testing.assert_close(other, loss)
    loss.backward()
    other.backward()
    for a, b in ((x, x_twin), (head.weight, twin.weight), (head.bias, twin.bias)):
        torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(twin.switch.logw, head.switch.logw)
    assert twin.switch.t.item() == 3
    metrics = twin.clone_metrics()
    torch.testing.assert_close(metrics["loss"], head.clone_metrics()["loss"])
    assert metrics[twin._score].isnan().all()

    twin.eval()
    before = state(twin)
    twin.clone_loss(x_twin, criterion)
    assert_same(state(twin), before)


def test_criterion_may_leave_samples_out():
    head = classifier(reduction="sum")
    x, y = batch(5)
    twin = copy.deepcopy(head)
    kept = torch.tensor([True, False, True, True, False])
    target = y[kept].expand(N, 3)
    loss = head.clone_loss(
        x, lambda out: F.cross_entropy(out[:, kept].movedim(-1, 1), target, reduction="none")
    )
    expected = twin(x, torch.where(kept, y, -100))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head.switch.logw, twin.switch.logw)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e38])
def test_any_criterion_with_a_dead_clone(poison):
    head = classifier()
    x, _ = batch(4)
    with torch.no_grad():
        head.weight[1, 2] = poison
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin.weight[1] = 0
    twin.switch.log_posterior[1] = -math.inf
    x_twin = x.detach().requires_grad_()

    def criterion(out):
        return (out - 1).square().sum(-1)

    loss = head.clone_loss(x, criterion)
    expected = twin.clone_loss(x_twin, criterion)
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, x_twin.grad)
    assert not head.weight.grad[1].any()
    torch.testing.assert_close(head.weight.grad[::2], twin.weight.grad[::2])
    assert head.switch.posterior().isfinite().all()


def test_any_criterion_with_a_bad_sample():
    head = classifier()
    x, _ = batch(4)
    with torch.no_grad():
        x[1] = math.nan
    before = state(head.switch)
    loss = head.clone_loss(x, lambda out: (out - 1).square().sum(-1))
    loss.backward()
    assert loss.item() == math.inf
    assert not head.weight.grad.any()
    assert x.grad[0].any()
    assert not x.grad[1].any()
    assert_same(state(head.switch), before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_whose_sum_overflows(reduction):
    head = classifier(reduction=reduction)
    x, _ = batch(3)
    size = torch.tensor(2e38)
    loss = head.clone_loss(x, lambda out: size + out.sum(-1))
    torch.testing.assert_close(loss.item(), 2e38 if reduction == "mean" else math.inf)
    loss.backward()
    weight = 1 if reduction == "mean" else 3
    torch.testing.assert_close(head.weight.grad, x.detach().mean(0).expand(N, C, D) * weight)
    assert x.grad.isfinite().all()
    torch.testing.assert_close(head.switch.posterior(), torch.full((N,), 1 / N).double())


def test_criterion_that_reduces_is_refused():
    x, _ = batch(4)
    with pytest.raises(
        ValueError, match=r"criterion: returned losses of shape \[\], expected \[3, \.\.\.\]"
    ):
        classifier().clone_loss(x, lambda out: out.mean())


def test_clone_outputs():
    x, _ = batch(2, 5)
    for bias in (True, False):
        head = classifier(bias=bias)
        out = head.clone_outputs(x)
        assert out.shape == (N, 2, 5, C)
        for n in range(N):
            expected = F.linear(x, head.weight[n], head.bias[n] if bias else None)
            torch.testing.assert_close(out[n], expected)


@pytest.mark.parametrize("make", [classifier, regressor])
def test_prediction(backend, make):
    head = make()
    concentrate(head, -1, -2, -1.5)
    x, _ = batch(2, 5)
    outputs = head.clone_outputs(x)
    p = head.switch.posterior().float().view(N, 1, 1, 1)
    before = state(head)
    prediction = head(x)
    if make is classifier:
        torch.testing.assert_close(prediction, (p * outputs.softmax(-1)).sum(0).log())
    else:
        torch.testing.assert_close(prediction, (p * outputs).sum(0))
    assert_same(state(head), before)


def test_prediction_outlives_a_training_step(backend):
    """Its gradient is of the posterior at the time of the call, and autograd does not object."""
    head = classifier()
    x, y = batch(5)
    (expected,) = torch.autograd.grad(head(x).square().sum(), x)
    prediction = head(x)
    head(x.detach(), y)
    (grad,) = torch.autograd.grad(prediction.square().sum(), x)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("make", [classifier, regressor])
@pytest.mark.parametrize("evidence", ["mean", "sum"])
def test_training_mixes_first_and_then_updates(backend, make, evidence):
    head = make(evidence=evidence, dtype=torch.float64)
    x, y = batch(5, dtype=torch.float64)
    if make is regressor:
        y = torch.randn(5, C, dtype=torch.float64)
    partner = copy.deepcopy(head.switch)
    for step in range(3):
        logp = -torch.stack([own.detach() for own in own_losses(head, x, y)])
        # As BatchNorm's statistics: training mode counts, not the gradient mode.
        with torch.set_grad_enabled(step != 1):
            head(x, y)
        partner.update(logp * (5 if evidence == "sum" else 1))
        torch.testing.assert_close(head.switch.logw, partner.logw, rtol=1e-11, atol=0)
        assert head.switch.t.item() == step + 2


def test_loss_uses_the_posterior_from_before(backend):
    head = classifier()
    concentrate(head, -1, -9, -3)
    x, y = batch(5)
    log_probs = head(x)
    loss = head(x, y)
    torch.testing.assert_close(loss, F.nll_loss(log_probs, y))


@pytest.mark.parametrize("make", [classifier, regressor])
def test_eval_changes_nothing(backend, make):
    head = make().eval()
    x, y = batch(5)
    y = y if make is classifier else torch.randn(5, C)
    before = state(head)
    head(x)
    head(x, y).backward()
    assert_same(state(head), before)
    assert head.weight.grad.any()


def test_micro_batches_are_observations():
    head = classifier()
    x, y = batch(6)
    for part in range(3):
        head(x[2 * part : 2 * part + 2], y[2 * part : 2 * part + 2]).backward()
    assert head.switch.t.item() == 4
    assert head.clone_metrics()["count"].item() == 6


@pytest.mark.parametrize("evidence", ["mean", "sum"])
def test_ignored_targets(backend, evidence):
    head = classifier(ignore_index=-1, evidence=evidence)
    twin = copy.deepcopy(head)
    x, y = batch(6)
    y[::2] = -1
    loss, expected = head(x, y), twin(x[1::2], y[1::2])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head.switch.logw, twin.switch.logw)
    before = state(head)
    loss = head(x, torch.full((6,), -1))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any() and not head.weight.grad.any()
    assert_same(state(head), before)


def test_empty_batch(backend):
    head = classifier()
    before = state(head)
    x, y = batch(0)
    loss = head(x, y)
    loss.backward()
    assert loss.item() == 0
    assert not head.weight.grad.any()
    assert_same(state(head), before)


def test_reduction_sum(backend):
    mean, total = classifier(), classifier(reduction="sum")
    total.load_state_dict(mean.state_dict())
    x, y = batch(5)
    torch.testing.assert_close(total(x, y), 5 * mean(x, y))
    torch.testing.assert_close(total.switch.logw, mean.switch.logw)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("make", [classifier, regressor])
def test_dead_clone_is_as_if_it_had_no_weight(backend, make, poison):
    """Backbone and the other clones, trained for some steps, bit for bit as beside a clone that the mixture ignores."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, D), nn.Tanh(), make())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        net[2].weight[1] = poison
    data = torch.randn(4, 8, 5)
    target = torch.randint(C, (4, 8)) if make is classifier else torch.randn(4, 8, C)
    steppers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, twin)]
    for x, y in zip(data, target):
        twin[2].switch.load_state_dict(net[2].switch.state_dict())
        twin[2].switch.log_posterior[1] = -math.inf
        losses = []
        for m, stepper in zip((net, twin), steppers):
            stepper.zero_grad()
            losses.append(m[2](m[:2](x), y))
            losses[-1].backward()
            stepper.step()
        assert losses[0].isfinite()
        assert torch.equal(losses[0], losses[1])
        assert not net[2].weight.grad[1].any()
        assert not net[2].bias.grad[1].any()
    for (name, a), b in zip(net.named_parameters(), twin.parameters()):
        living = torch.tensor([0, 2]) if name.startswith("2.") else slice(None)
        assert torch.equal(a[living], b[living]), name
    posterior = net[2].switch.posterior()
    assert posterior.isfinite().all()
    assert posterior.argmin() == 1
    metrics = net[2].clone_metrics()
    assert metrics["loss"].isinf().tolist() == [False, True, False]


def test_probabilities_sum_to_1_whichever_clones_are_dead(backend):
    head = classifier()
    x, y = batch(6)
    for n in range(N):
        head(x, y)
        probabilities = head.eval()(x).exp()
        torch.testing.assert_close(probabilities.sum(1), torch.ones(6))
        with torch.no_grad():
            head.train().weight[n] = math.nan
    assert head.eval()(x).tolist() == [[-math.inf] * C] * 6


@pytest.mark.parametrize("make", [classifier, regressor])
def test_all_clones_dead(backend, make):
    head = make()
    with torch.no_grad():
        head.weight.fill_(math.nan)
    x, y = batch(4)
    y = y if make is classifier else torch.randn(4, C)
    before = state(head.switch)
    loss = head(x, y)
    loss.backward()
    assert loss.item() == math.inf
    for grad in (x.grad, head.weight.grad, head.bias.grad):
        assert torch.equal(grad, torch.zeros_like(grad))
    assert_same(state(head.switch), before)


def test_metrics_run_and_reset(backend):
    head = classifier()
    x, y = batch(2, 5)
    outputs = head.clone_outputs(x)
    head(x[0], y[0])
    head(x[1], y[1])
    metrics = head.clone_metrics(reset=True)
    losses = torch.stack([F.cross_entropy(out.flatten(0, 1), y.flatten()) for out in outputs])
    torch.testing.assert_close(metrics["loss"], losses.detach().double(), rtol=1e-5, atol=0)
    correct = (outputs.argmax(-1) == y).double().mean((1, 2))
    torch.testing.assert_close(metrics["accuracy"], correct)
    assert metrics["count"].item() == 10
    assert head.clone_metrics()["count"].item() == 0
    assert metrics["count"].item() == 10


def test_metrics_of_a_regressor(backend):
    head = regressor(sigma2=2.0)
    x, _ = batch(5)
    y = torch.randn(5, C)
    head(x, y)
    expected = (head.clone_outputs(x) - y).square().sum(-1).mean(1).detach().double()
    metrics = head.clone_metrics()
    torch.testing.assert_close(metrics["squared_error"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        metrics["loss"], expected / 4 + C / 2 * math.log(4 * math.pi), rtol=1e-5, atol=0
    )
