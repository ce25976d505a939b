"""Protects the Switch of compat and what a model does with it: averages, statistics, precision; last layers that
diverge and harm nobody else; catching up.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from compat_cases import B, D, Deep, N, Normed, batch, model, sgd
from torch import nn

import alrao_fast.compat as alrao
from alrao_fast import backends

# Diverged layers.


@pytest.mark.parametrize("layer", [alrao.LinearClassifier, Deep, Normed])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_diverged_layer_harms_nobody_else(layer, backend):
    x, y = batch()
    with backends.use_backend(backend):
        net = model(layer)
        healthy = copy.deepcopy(net)
        list(net.last_layer_1.parameters())[-2].data[0, 0] = math.nan
        optimizer = sgd(net)
        loss = F.nll_loss(net(x), y)
        loss.backward()
        assert math.isfinite(loss.item())
        alrao.alrao_step(net, optimizer, nn.NLLLoss(), y)
        assert all(p.isfinite().all() for p in net.parameters_internal_nn())
        posterior = net.posterior()
        # What is left to it is its share of the pool: a switch at the first observation has probability 1/2.
        assert posterior[1].item() == pytest.approx(0.5 / N, rel=1e-3)
        # The others are trained as without it.
        rest = sgd(healthy)
        F.nll_loss(healthy(x), y).backward()
        alrao.alrao_step(healthy, rest, nn.NLLLoss(), y)
        for k in (0, 2, 3):
            for a, b in zip(net.last_layer(k).parameters(), healthy.last_layer(k).parameters()):
                torch.testing.assert_close(a, b)
        assert net(x).isfinite().all()


@pytest.mark.parametrize("layer", [alrao.LinearClassifier, Deep])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_average_keeps_the_mass_of_a_diverged_layer(layer, backend):
    x, _ = batch()
    with backends.use_backend(backend):
        net = model(layer)
        net.switch.logposterior.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())
        outputs = [net.last_layer(k)(net.internal_nn(x)) for k in (0, 2, 3)]
        list(net.last_layer_1.parameters())[-2].data[0, 0] = math.nan
        joint = torch.stack(
            [a + out for a, out in zip(net.switch.logposterior[[0, 2, 3]], outputs)]
        )
        expected = torch.logsumexp(joint, 0)
        torch.testing.assert_close(net(x), expected)
        wanted = torch.autograd.grad(expected[:, 0].sum(), net.internal_nn[0].weight)
        torch.testing.assert_close(
            torch.autograd.grad(net(x)[:, 0].sum(), net.internal_nn[0].weight), wanted
        )


def test_a_diverged_layer_without_remove_non_numerical():
    net, (x, y) = model(), batch()
    net.last_layer_1.fc.weight.data[0, 0] = math.nan
    optimizer = sgd(net)
    F.nll_loss(net(x), y).backward()
    alrao.alrao_step(net, optimizer, nn.NLLLoss(), y, remove_non_numerical=False)
    assert net.last_layer_1.fc.bias.isnan().any()
    assert net.last_layer_0.fc.bias.isfinite().all()


def test_a_diverged_regressor():
    net = model(alrao.LinearRegressor, task="regression", loss=alrao.L2LossLog(), args=(D, 2))
    x, _ = batch()
    y = torch.randn(B, 2, dtype=torch.float64)
    net.last_layer_0.layer.bias.data.fill_(math.inf)
    out = means, ps = net(x)
    assert ps[0] == 0 and means.isfinite().all()
    torch.testing.assert_close(ps.sum(), torch.ones_like(ps[0]))
    alrao.L2LossAdditional()(out, y).backward()
    alrao.alrao_step(net, sgd(net), alrao.L2LossLog(), y)
    assert all(p.isfinite().all() for p in net.parameters_internal_nn())
    for k in range(N):
        net.last_layer(k).layer.bias.data.fill_(math.inf)
    with pytest.raises(ValueError, match="all diverged"):
        net(x)


@pytest.mark.parametrize(
    "layer", [alrao.LinearClassifier, alrao.LinearClassifierRNN, alrao.LinearRegressor, Deep]
)
def test_catch_up(layer):
    regression = layer is alrao.LinearRegressor
    net = model(
        layer,
        task="regression" if regression else "classification",
        loss=alrao.L2LossLog() if regression else None,
    )
    posterior = torch.tensor([0.25, 0.75, 1e-12, 1e-300], dtype=torch.float64)
    net.switch.logposterior.copy_(posterior.log())
    before = [[p.clone() for p in clone.parameters()] for clone in net.last_layers()]
    net.hard_catch_up(threshold=-20)
    for k, clone in enumerate(net.last_layers()):
        for p, *old in zip(clone.parameters(), *before):
            mean = sum(w * q for w, q in zip(posterior, old))
            torch.testing.assert_close(p, mean if k > 1 else old[k])
    # A mean with a diverged layer in it is taken over the others.
    next(net.last_layer_3.parameters()).data.fill_(math.nan)
    net.hard_catch_up()
    assert all(p.isfinite().all() for p in net.parameters())


def test_catch_up_in_the_step_and_a_tiny_posterior():
    net, (x, y) = model(), batch()
    net.switch.logw[:, 1] -= 2000.0
    net.switch.logposterior.copy_(torch.logsumexp(net.switch.logw, 0))
    F.nll_loss(net(x), y).backward()
    assert net(x).isfinite().all()
    alrao.alrao_step(net, sgd(net), nn.NLLLoss(), y, catch_up=True)
    assert net.switch.logposterior.isfinite().all()


# The switch.


def test_switch_average_and_perf():
    switch = alrao.Switch(2, save_ll_perf=True)
    outputs = [
        torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(),
        torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(),
    ]
    mixed = switch(outputs).exp()
    torch.testing.assert_close(mixed, torch.tensor([[0.7, 0.3], [0.225, 0.775]]))
    switch.Supdate(outputs, torch.tensor([0, 0]))
    (loss0, acc0), (loss1, acc1) = switch.get_ll_perf()
    assert loss0 == pytest.approx(-math.log(0.5 * 0.25) / 2) and acc0 == 0.5
    assert loss1 == pytest.approx(-math.log(0.9 * 0.2) / 2) and acc1 == 0.5
    assert switch.ll_total == 2
    switch.reset_ll_perf()
    assert switch.ll_total == 0 and switch.get_ll_perf() == [(0.0, 0.0)] * 2


def test_a_single_model_never_changes_the_switch():
    switch = alrao.Switch(1, save_ll_perf=True)
    before = switch.logw.clone()
    switch.Supdate([torch.tensor([[0.1, 0.9]]).log()], torch.tensor([0]))
    assert torch.equal(switch.logw, before) and switch.t == 1 and switch.ll_total == 1


def test_the_switch_keeps_its_precision_and_its_count():
    switch = alrao.Switch(3)
    switch.t = 7
    switch = switch.half()
    assert switch.logw.dtype == torch.float64 and switch.t == 7 and switch.piT(3) == 0.25
    fresh = alrao.Switch(3)
    fresh.load_state_dict(switch.state_dict())
    assert fresh.t == 7 and "t" not in switch.state_dict()


def test_invalid_switches():
    for arguments, message in (
        ({"nb_models": 0}, "nb_models is 0"),
        ({"nb_models": 2, "theta": 1.0}, "theta is 1.0"),
        ({"nb_models": 2, "task": "x"}, "task is 'x'"),
        ({"nb_models": 2, "task": "regression"}, "loss is None"),
    ):
        with pytest.raises(ValueError, match=message):
            alrao.Switch(**arguments)
    with pytest.raises(ValueError, match="expected no NaN"):
        alrao.Switch(2).Supdate([torch.full((1, 2), math.nan)] * 2, torch.tensor([0]))
