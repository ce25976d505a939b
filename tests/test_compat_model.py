"""Protects AlraoModel: what a forward returns, which path evaluates the last layers and that all paths agree, layers
that stay modules with parameters of their own, forwarded methods, the older names, checkpoints by the authors' keys,
and the message of each invalid input.
"""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from compat_cases import B, C, Clamped, D, Deep, Loose, N, Normed, batch, model, sgd
from torch import nn

import alrao_fast.compat as alrao
from alrao_fast import backends
from alrao_fast.compat._fused_pass import FusedPass
from alrao_fast.compat._graph_pass import GraphPass
from alrao_fast.compat._passes import LinearPass


def path_of(net):
    last = net.last_evaluation().clone_pass
    if isinstance(last, GraphPass):
        return "batched" if last._batched else "loop"
    assert isinstance(last, LinearPass)
    return "fused" if isinstance(last, FusedPass) else "linear"


def by_hand(net, x, y):
    """Mixture loss, gradients by the features' network, own gradients: every layer called on its own, twice."""
    features = net.internal_nn(x)
    layers = list(net.last_layers())
    outputs = torch.stack([layer(features) for layer in layers])
    prior = net.switch.logposterior.view(-1, 1, 1)
    loss = F.nll_loss(torch.logsumexp(outputs + prior, 0), y)
    internal = torch.autograd.grad(loss, list(net.parameters_internal_nn()), retain_graph=True)
    through = torch.autograd.grad(loss, [p for layer in layers for p in layer.parameters()])
    own = []
    for layer in layers:
        own += torch.autograd.grad(
            F.nll_loss(layer(features.detach()), y), list(layer.parameters())
        )
    return loss, internal, through, own


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("layer", "path"),
    [
        (alrao.LinearClassifier, "linear"),
        (Loose, "linear"),
        (Deep, "batched"),
        (Clamped, "batched"),
        (Normed, "loop"),
    ],
)
def test_every_path_against_the_layers_one_by_one(layer, path, backend):
    x, y = batch()
    with backends.use_backend(backend):
        net = model(layer)
        net.switch.logposterior.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
        frozen = copy.deepcopy(net)
        loss = F.nll_loss(net(x), y)
        loss.backward()
        if path == "linear" and backends.select("switch_mixture", x.device) != "reference":
            path = "fused"
        assert path_of(net) == path
        expected, internal, through, own = by_hand(frozen, x, y)
        torch.testing.assert_close(loss, expected)
        clones = [p for clone in net.last_layers() for p in clone.parameters()]
        for p, grad in zip([*net.parameters_internal_nn(), *clones], [*internal, *through]):
            torch.testing.assert_close(p.grad, grad)
        net.last_evaluation().own_gradients(nn.NLLLoss(), y, True)
        for p, grad in zip(clones, own):
            torch.testing.assert_close(p.grad, grad)
        for p, grad in zip(net.parameters_internal_nn(), internal):
            torch.testing.assert_close(p.grad, grad)
        for out, clone in zip(net.last_lst_ll_out, frozen.last_layers()):
            torch.testing.assert_close(out, clone(frozen.internal_nn(x)))


def test_a_temperature_changed_later_is_noticed():
    net = model(Loose)
    x, _ = batch()
    net(x)
    for layer in net.last_layers():
        layer.temperature = 3.0
    expected = [layer(net.internal_nn(x)) for layer in net.last_layers()]
    net(x)
    torch.testing.assert_close(torch.stack(net.last_lst_ll_out), torch.stack(expected))


def test_a_hook_on_one_layer_is_called():
    net, (x, _) = model(), batch()
    net(x)
    calls = []
    net.last_layer_2.register_forward_hook(lambda *args: calls.append(1))
    net(x)
    assert calls == [1] and path_of(net) == "loop"


@pytest.mark.parametrize(
    "criterion", [F.cross_entropy, nn.NLLLoss(ignore_index=1), nn.NLLLoss(torch.ones(C).double())]
)
def test_own_gradients_of_other_criteria(criterion):
    net, (x, y) = model(), batch()
    net(x)
    net.last_evaluation().own_gradients(criterion, y, True)
    for layer in net.last_layers():
        loss = criterion(layer(net.last_x.detach()), y)
        for p, grad in zip(layer.parameters(), torch.autograd.grad(loss, list(layer.parameters()))):
            torch.testing.assert_close(p.grad, grad)


def test_a_step_after_a_forward_without_graph():
    for layer in (alrao.LinearClassifier, Deep):
        net, (x, y) = model(layer), batch()
        optimizer = sgd(net)
        before = [p.clone() for p in net.parameters()]
        with torch.no_grad():
            net(x)
        alrao.alrao_step(net, optimizer, nn.NLLLoss(), y)
        changed = [not torch.equal(p, q) for p, q in zip(net.parameters(), before)]
        assert changed == [False, False] + [True] * (len(before) - 2)


@pytest.mark.parametrize("layer", [alrao.LinearClassifier, Deep])
def test_autocast(layer):
    net, (x, y) = model(layer).float(), batch()
    optimizer = sgd(net)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.nll_loss(net(x.float()), y)
    loss.backward()
    exact = F.nll_loss(net(x.float()), y)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    alrao.alrao_step(net, optimizer, nn.NLLLoss(), y)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in net.parameters())


def test_rnn_layers_flatten_and_other_outputs_follow():
    class Internal(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, D)

        def forward(self, x):
            return self.rnn(x)

    torch.manual_seed(0)
    net = alrao.AlraoModel(
        "classification", nn.NLLLoss(), Internal(), N, alrao.LinearClassifierRNN, D, C
    )
    out, (h, c) = net(torch.randn(7, 2, 5))
    assert out.shape == (14, C) and h.shape == c.shape == (1, 2, D)
    assert net.last_x.shape == (7, 2, D) and len(net.last_lst_ll_out) == N
    torch.testing.assert_close(out.exp().sum(1), torch.ones(14))


def test_regression():
    net = model(alrao.LinearRegressor, task="regression", loss=alrao.L2LossLog(), args=(D, 2))
    x, _ = batch()
    y = torch.randn(B, 2, dtype=torch.float64)
    out = means, ps = net(x)
    assert means.shape == (B, 2, N) and ps.shape == (N,) and not ps.requires_grad
    for k, layer in enumerate(net.last_layers()):
        torch.testing.assert_close(means[:, :, k], layer(net.internal_nn(x)))
    loss = alrao.L2LossAdditional()(out, y)
    density = torch.exp(-(means - y[:, :, None]).square().sum(1) / 2 - math.log(2 * math.pi) / 2)
    torch.testing.assert_close(loss, -(density * ps).sum(1).log().mean())
    loss.backward()
    before = [p.grad.clone() for p in net.parameters_internal_nn()]
    own = [alrao.L2LossLog()(layer(net.last_x.detach()), y) for layer in net.last_layers()]
    grads = torch.autograd.grad(
        sum(own), [p for k in range(N) for p in net.last_layer(k).parameters()]
    )
    # The criterion of the mixture scores no single layer: the model's own loss does.
    optimizer = sgd(net)
    copies = copy.deepcopy(list(net.last_layers()))
    alrao.alrao_step(net, optimizer, alrao.L2LossAdditional(), y)
    for p, grad in zip(net.parameters_internal_nn(), before):
        assert torch.equal(p.grad, grad)
    old = [p for layer in copies for p in layer.parameters()]
    new = [p for layer in net.last_layers() for p in layer.parameters()]
    for k, (a, b, grad) in enumerate(zip(old, new, grads)):
        torch.testing.assert_close(b, a - 0.1 * 2.0 ** -(k // 2) * grad)
    torch.testing.assert_close(torch.stack(net.last_lst_logpx), -torch.stack(own).detach())
    torch.testing.assert_close(
        torch.tensor(net.switch.get_ll_perf()), torch.stack(own).detach().float()
    )


# Layers as modules.


def test_state_dict_has_the_authors_keys():
    keys = set(model().state_dict())
    layers = {f"last_layer_{k}.fc.{name}" for k in range(N) for name in ("weight", "bias")}
    internal = {"internal_nn.0.weight", "internal_nn.0.bias"}
    assert keys == layers | internal | {"switch.logw", "switch.logposterior"}


def test_checkpoints():
    net, (x, y) = model(), batch()
    optimizer = sgd(net)
    for _ in range(3):
        F.nll_loss(net(x), y).backward()
        alrao.alrao_step(net, optimizer, nn.NLLLoss(), y)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = model(seed=5)
    other(x)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.switch.t == 4
    assert torch.equal(net.eval()(x), other.eval()(x))
    # A checkpoint of the authors' has float32 and no t.
    plain = {key: value.float() for key, value in net.state_dict().items()}
    other = model(seed=6)
    with pytest.warns(UserWarning, match="switch.t stays 1"):
        other.load_state_dict(plain)
    assert other.switch.logw.dtype == torch.float64 and other.switch.t == 1


def test_a_model_pickled_whole_by_another_package_is_refused():
    state = {k: v for k, v in model().__getstate__().items() if k != "_layer_names"}
    with pytest.raises(RuntimeError, match="save its state_dict there"):
        alrao.AlraoModel.__new__(alrao.AlraoModel).__setstate__(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "to", "flat vector", "replaced"])
def test_parameters_that_were_moved_are_found_again(how):
    net, (x, y) = model(), batch()
    F.nll_loss(net(x), y).backward()
    if how == "deepcopy":
        net = copy.deepcopy(net)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        net = torch.load(file, weights_only=False)
    elif how == "to":
        net = net.to(torch.float32).to(torch.float64)
    elif how == "flat vector":
        vector = torch.nn.utils.parameters_to_vector(net.parameters())
        torch.nn.utils.vector_to_parameters(vector.detach() * 1.5, net.parameters())
    else:
        net.last_layer_1.fc.weight = nn.Parameter(torch.randn(C, D, dtype=torch.float64))
    with torch.no_grad():
        net.last_layer_3.fc.bias.add_(0.25)
    expected, *_ = by_hand(net, x, y)
    torch.testing.assert_close(F.nll_loss(net(x), y), expected)
    optimizer = sgd(net)
    optimizer.zero_grad()
    F.nll_loss(net(x), y).backward()
    alrao.alrao_step(net, optimizer, nn.NLLLoss(), y)
    expected, *_ = by_hand(net, x, y)
    torch.testing.assert_close(F.nll_loss(net(x), y), expected)


def test_frozen_layers_stay():
    net, (x, y) = model(), batch()
    net.last_layer_1.requires_grad_(False)
    before = net.last_layer_1.fc.weight.clone()
    optimizer = sgd(net)
    F.nll_loss(net(x), y).backward()
    moved = net.last_layer_0.fc.weight.detach().clone()
    alrao.alrao_step(net, optimizer, nn.NLLLoss(), y)
    assert torch.equal(net.last_layer_1.fc.weight, before)
    assert not torch.equal(net.last_layer_0.fc.weight, moved)


def test_reset_parameters():
    net, (x, y) = model(), batch()
    net(x)
    net.update_switch(y)
    before = copy.deepcopy(net.state_dict())
    net.reset_parameters()
    assert net.switch.t == 1 and torch.equal(net.posterior(), torch.full((N,), 0.25).double())
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) == len(before)


# Names and methods.


def test_forwarded_methods():
    net = model()
    net.internal_nn.hello = lambda name: f"hello {name}"
    net.method_fwd_internal_nn("hello")
    net.method_fwd_internal_nn("hello", "greet")
    assert net.hello("a") == net.greet(name="a") == "hello a"
    net.method_fwd_last_layers("extra_repr", "reprs")
    assert net.reprs() == [""] * N
    with pytest.raises(AssertionError, match="greet"):
        net.method_fwd_last_layers("train", "greet")
    with pytest.raises(AssertionError, match="forward"):
        net.method_fwd_internal_nn("forward")
    with pytest.raises(AttributeError, match="nothing"):
        net.nothing()


def test_predictions_and_posterior():
    net, (x, y) = model(), batch()
    outputs = net.last_layers_predictions(x)
    assert len(outputs) == N and all(
        torch.equal(a, b) for a, b in zip(outputs, net.last_layers_predictions())
    )
    net.update_switch(y, x=net.internal_nn(x))
    assert net.switch.t == 2 and len(net.last_lst_logpx) == N
    net.switch.logposterior.copy_(torch.tensor([0.5, 0.25, 0.25, 1e-60], dtype=torch.float64).log())
    assert net.repr_posterior() == "|█▄▄ |"
    assert net.posterior()[3] > 0


def test_older_names():
    internal = nn.Linear(5, D)
    net = alrao.AlraoModel(internal, N, Deep, D, C)
    paper = alrao.AlraoModel(internal, C, D, N)
    by_name = alrao.AlraoModel(preclassifier=internal, nb_classifiers=N, Classifier=Deep, d=D, c=C)
    for m in (net, paper, by_name):
        assert m.preclassifier is internal and m.nb_classifiers == N
        assert m(torch.randn(2, 5)).shape == (2, C)
        assert len(list(m.classifiers())) == len(m.classifiers_parameters_list()) == N
        assert list(m.parameters_preclassifier()) == list(internal.parameters())
    assert isinstance(paper.last_layer_0, alrao.LinearClassifier)
    net.method_fwd_preclassifier("extra_repr", "shape")
    assert net.shape().startswith("in_features=5")


# Invalid inputs.


def test_invalid_inputs():
    internal, layer = nn.Linear(5, D), alrao.LinearClassifier
    with pytest.raises(ValueError, match="task is 'ranking'"):
        alrao.AlraoModel("ranking", nn.NLLLoss(), internal, 2, layer, D, C)
    with pytest.raises(ValueError, match="n_last_layers: got 0"):
        alrao.AlraoModel("classification", nn.NLLLoss(), internal, 0, layer, D, C)
    with pytest.raises(TypeError, match="'last_layer_gen' is missing"):
        alrao.AlraoModel("classification", nn.NLLLoss(), internal, 2)
    with pytest.raises(TypeError, match="too many arguments"):
        alrao.AlraoModel(internal, C, D, N, 7)
    net = model()
    with pytest.raises(ValueError, match="internal_nn is not finite"):
        net(torch.full((B, 5), math.nan).double())
    with pytest.raises(RuntimeError, match="no forward"):
        net.update_switch(batch()[1])
    x, y = batch()
    net(x)
    with pytest.raises(ValueError, match="criterion returned"):
        net.last_evaluation().own_gradients(nn.NLLLoss(reduction="none"), y, True)
    with pytest.raises(ValueError, match="differ in shape"):
        net.last_layer_0.fc = nn.Linear(D, C + 1)
        net.hard_catch_up()


@pytest.mark.parametrize("layer", [alrao.LinearClassifier, Loose, Deep, Normed])
def test_second_derivatives_raise(layer):
    """Of the mixture and of a layer's output, whatever comes in; a created graph alone is as good as none."""
    x, y = batch()
    for take in (
        lambda net: net(x.requires_grad_()),
        lambda net: net.last_evaluation().outputs()[0],
    ):
        net = model(layer)
        net(x.requires_grad_())
        loss = F.nll_loss(take(net), y) ** 2
        expected = torch.autograd.grad(loss, x, retain_graph=True)
        created = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(created, expected)
        with pytest.raises(RuntimeError, match="no second derivative: call them one by one"):
            created[0].sum().backward()
