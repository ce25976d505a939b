"""Protects what a compat model shows and keeps: a forward's outputs after a step, layers that are edited later,
parameters that processes share, gradients of frozen parameters."""

import pytest
import torch
import torch.nn.functional as F
from compat_cases import B, C, D, Deep, Loose, N, batch, model, sgd
from torch import nn

import alrao_fast.compat as alrao

CRITERION = nn.NLLLoss()


class Hooked(alrao.LinearClassifier):
    """A last layer that only the loop evaluates."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_forward_hook(lambda module, args, output: None)


class Scaled(nn.Module):
    """One Linear and log_softmax, but for what it is divided by."""

    common = 1.0

    def __init__(self, d=D, c=C):
        super().__init__()
        self.out = nn.Linear(d, c)
        self._private = 1.0
        self.entries = [1.0]
        self.tensor = torch.ones(())
        self.table = {}

    def forward(self, x):
        scale = self._private * self.entries[0] * self.tensor * self.common
        return F.log_softmax(self.out(x) / (scale * self.table.get("scale", 1.0)), dim=-1)


class Plain(Scaled):
    """Without the attribute whose changes do not show."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.table

    def forward(self, x):
        scale = self._private * self.entries[0] * self.tensor * self.common
        return F.log_softmax(self.out(x) / scale, dim=-1)


class Deeper(Plain):
    def __init__(self, d=D, c=C):
        super().__init__(d, c)
        self.second = nn.Linear(c, c)

    def forward(self, x):
        return super().forward(self.second(super().forward(x).exp()) @ self.out.weight)


def called(net, x):
    """The layers' outputs one by one, without a graph."""
    with torch.no_grad():
        features = net.internal_nn(x)
        return torch.stack([layer(features) for layer in net.last_layers()])


LAYERS = [alrao.LinearClassifier, Loose, Deep, Hooked]


@pytest.mark.parametrize("layer", LAYERS)
def test_after_a_step_the_outputs_are_those_of_the_forward(layer):
    net, (x, y) = model(layer), batch()
    optimizer = sgd(net)
    expected = called(net, x)
    CRITERION(net(x), y).backward()
    alrao.alrao_step(net, optimizer, CRITERION, y)
    torch.testing.assert_close(torch.stack(net.last_lst_ll_out), expected)
    torch.testing.assert_close(torch.stack(net.last_layers_predictions()), expected)
    assert not torch.allclose(called(net, x), expected)


@pytest.mark.parametrize("optimizer_of", [sgd, lambda net: torch.optim.SGD(net.parameters(), 0.1)])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_switch_updated_after_the_step_observes_the_forward(layer, optimizer_of):
    net, (x, y) = model(layer), batch()
    optimizer = optimizer_of(net)
    expected = [-CRITERION(out, y) for out in called(net, x)]
    CRITERION(net(x), y).backward()
    optimizer.step()
    net.update_switch(y)
    torch.testing.assert_close(torch.stack(net.last_lst_logpx), torch.stack(expected))


@pytest.mark.parametrize("change", ["step", "in place"])
@pytest.mark.parametrize("layer", LAYERS)
def test_no_way_back_over_parameters_that_have_changed(layer, change):
    net, (x, y) = model(layer), batch()
    old = CRITERION(net(x), y)
    if change == "step":
        CRITERION(net(x), y).backward()
        alrao.alrao_step(net, sgd(net), CRITERION, y)
    else:
        with torch.no_grad():
            next(net.last_layer_2.parameters()).mul_(2)
        with pytest.raises(RuntimeError, match="modified since this forward"):
            alrao.alrao_step(net, sgd(net), CRITERION, y)
    with pytest.raises(RuntimeError, match=r"modified since this forward|modified by an inplace"):
        old.backward()


def edit(net, what):
    layer = net.last_layer_2
    if what == "private":
        layer._private = 3.0
    elif what == "list":
        layer.entries[0] = 3.0
    elif what == "tensor":
        layer.tensor.fill_(3.0)
    elif what == "dict":
        layer.table["scale"] = 3.0


@pytest.mark.parametrize(
    ("layer", "what"),
    [(Scaled, "dict")]
    + [
        (layer, what)
        for layer in (Plain, Deeper)
        for what in ("private", "list", "tensor", "class")
    ],
)
def test_an_edited_attribute_is_noticed(layer, what, monkeypatch):
    net, (x, _) = model(layer), batch()
    net(x)
    before = torch.stack(net.last_lst_ll_out)
    if what == "class":
        monkeypatch.setattr(Scaled, "common", 3.0)
    else:
        edit(net, what)
    net(x)
    outputs = torch.stack(net.last_lst_ll_out)
    torch.testing.assert_close(outputs, called(net, x))
    assert not torch.allclose(outputs, before)


def test_a_layer_that_counts_its_calls_counts_each_forward_once():
    class Counting(Loose):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    net, (x, _) = model(Counting), batch()
    for _ in range(40):
        net(x)
    assert [layer.calls for layer in net.last_layers()] == [40] * N
    assert len(net._runners) < 40


@pytest.mark.parametrize("layer", LAYERS)
def test_the_first_forward_may_be_in_inference_mode(layer):
    net, (x, y) = model(layer), batch()
    with torch.inference_mode():
        net(x)
    optimizer = sgd(net)
    CRITERION(net(x), y).backward()
    alrao.alrao_step(net, optimizer, CRITERION, y)
    net.zero_grad()
    net.last_layer_0(net.last_x.detach()).sum().backward()


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("layer", [alrao.LinearClassifier, Loose, Deep])
def test_shared_memory_stays_shared(layer, laid_out):
    net, (x, y) = model(layer), batch()
    if laid_out:
        net(x)
    net.share_memory()
    addresses = [p.data_ptr() for p in net.parameters()]
    expected = called(net, x)
    CRITERION(net(x), y).backward()
    torch.testing.assert_close(torch.stack(net.last_lst_ll_out), expected)
    alrao.alrao_step(net, sgd(net), CRITERION, y)
    assert all(p.is_shared() for p in net.parameters())
    assert [p.data_ptr() for p in net.parameters()] == addresses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS)
def test_networks_in_16_bits(layer, dtype):
    net, (x, y) = model(layer).to(dtype), batch()
    CRITERION(net(x.to(dtype)), y).backward()
    losses = torch.stack([CRITERION(out, y).double() for out in called(net, x.to(dtype))])
    alrao.alrao_step(net, sgd(net), CRITERION, y)
    assert net.switch.t == 2 and net.switch.logw.dtype == torch.float64
    expected = alrao.Switch(N)
    expected.observe(losses, None, y)
    torch.testing.assert_close(
        net.switch.posterior(), expected.posterior(), atol=0, rtol=2 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_a_frozen_parameter_does_not_follow_an_old_gradient(layer):
    net, (x, y) = model(layer), batch()
    optimizer = sgd(net)
    CRITERION(net(x), y).backward()
    alrao.alrao_step(net, optimizer, CRITERION, y)
    frozen = list(net.last_layer_1.parameters())
    before = [p.detach().clone() for p in frozen]
    net.last_layer_1.requires_grad_(False)
    CRITERION(net(x), y).backward()
    alrao.alrao_step(net, optimizer, CRITERION, y)
    assert all(map(torch.equal, frozen, before))


def test_what_cannot_be_scored_changes_nothing():
    net, (x, y) = model(loss=nn.NLLLoss(reduction="none")), batch()
    CRITERION(net(x), y).backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=rf"shape \[{B}\]; expected a scalar"):
        alrao.alrao_step(net, sgd(net), CRITERION, y)
    assert all(map(torch.equal, net.parameters(), before)) and net.switch.t == 1


@pytest.mark.parametrize("layer", LAYERS)
def test_hooks_of_parameters_see_their_gradients(layer):
    net, (x, y) = model(layer), batch()
    net(x).sum().backward()
    net.last_evaluation().own_gradients(CRITERION, y, True)
    params = [p for own in net.last_layers_parameters_list() for p in own]
    expected = [p.grad / 3 for p in params]
    for p in params:
        p.register_hook(lambda grad: grad / 3)
    net(x).sum().backward()
    net.last_evaluation().own_gradients(CRITERION, y, True)
    torch.testing.assert_close([p.grad for p in params], expected)


def test_a_hook_before_a_backward_is_called():
    net, (x, y) = model(), batch()
    net(x)
    calls = []
    net.last_layer_1.fc.register_full_backward_pre_hook(lambda *args: calls.append(1))
    CRITERION(net(x), y).backward()
    assert calls


@pytest.mark.parametrize("layer", LAYERS)
def test_weights_may_be_tied_later(layer):
    net, (x, y) = model(layer), batch()
    net(x)
    first, second = (list(net.last_layer(k).modules())[-1] for k in (1, 2))
    second.weight = first.weight
    optimizer = sgd(net)
    CRITERION(net(x), y).backward()
    torch.testing.assert_close(torch.stack(net.last_lst_ll_out), called(net, x))
    features = net.last_x.detach()
    losses = [CRITERION(net.last_layer(k)(features), y) for k in (1, 2)]
    (expected,) = torch.autograd.grad(sum(losses), first.weight)
    alrao.alrao_step(net, optimizer, CRITERION, y)
    torch.testing.assert_close(first.weight.grad, expected)
